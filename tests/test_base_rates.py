"""Where the head of a multi-label model begins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from distill import base_rates

LABELS = np.array([[1, 0, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0]])
SIZE = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 20,
}


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**SIZE, num_labels=3))


def test_the_head_says_the_base_rates() -> None:
    model = bert()
    base_rates.begin(model, LABELS, None)
    rates = expit(model.classifier.bias.detach().numpy())
    assert rates == pytest.approx((LABELS.sum(axis=0) + 0.5) / 5, abs=1e-6)


def test_weights_of_the_positive_rows_move_it_to_where_the_weighed_loss_is_least() -> None:
    labels, weights = torch.tensor(LABELS).double(), torch.tensor([2.0, 1.0, 3.0]).double()
    halves = torch.cat([labels, torch.full((1, 3), 0.5, dtype=torch.float64)])
    model = bert()
    base_rates.begin(model, LABELS, weights.tolist())
    bias = model.classifier.bias.detach().double().requires_grad_()
    logits = bias.expand_as(halves)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, halves, pos_weight=weights)
    (slope,) = torch.autograd.grad(loss, bias)
    assert slope.abs().max() < 1e-6


def test_the_heads_of_other_families_are_found() -> None:
    model: Any = RobertaForSequenceClassification(RobertaConfig(**SIZE, num_labels=3))
    base_rates.begin(model, LABELS, None)
    assert model.classifier.out_proj.bias.detach().numpy() == pytest.approx(
        np.log([3.5 / 1.5, 0.5 / 4.5, 1.5 / 3.5])
    )


def test_a_head_that_was_trained_stays() -> None:
    model = bert()
    with torch.no_grad():
        model.classifier.bias[1] = 0.25
    base_rates.begin(model, LABELS, None)
    assert model.classifier.bias.tolist() == [0.0, 0.25, 0.0]
