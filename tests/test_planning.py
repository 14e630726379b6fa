"""What a dry run says of a run's cost: tokens, FLOPs and bytes are those of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Write, distill, documents
from torch.utils.flop_counter import FlopCounterMode

from distill import catalog, fitting, models, planning
from distill.batching import collate
from distill.encoding import Encoded, encode_texts
from distill.models import Classifier
from distill.schema import Train
from distill.tasks import TaskSpec

torch.set_num_threads(1)

TASK = TaskSpec("single_label", ("bad", "good"), "accuracy")


@pytest.fixture
def build(tokenizer_folder: Path) -> Callable[..., Classifier]:
    def made(section: str, architecture: str, **fields: Any) -> Classifier:
        values = {
            "architecture": architecture,
            "tokenizer": str(tokenizer_folder),
            "max_length": 128,
            **fields,
        }
        config = catalog.load(section, architecture).Config.model_validate(values)
        return models.build(config, section, TASK, 0).eval()

    return made


def read(model: Classifier, words: int) -> Encoded:
    texts = [(" ".join(["good"] * words), None)] * 3
    return encode_texts(model.tokenizer, [texts], model.config)


@pytest.mark.parametrize("words", [10, 100])
def test_flops_are_those_that_torch_counts(words: int, build: Callable[..., Classifier]) -> None:
    wide = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512}
    model = build("teacher", "bert", config={**wide, "hidden_dropout_prob": 0.0})
    data = read(model, words)
    reading = fitting.reading_of(model, Train())
    tokens, pairs = planning.amount(data, model.keys)
    assert (tokens, pairs) == (3 * (words + 2), 3 * (words + 2) ** 2)
    model.train()
    with FlopCounterMode(display=False) as counter:
        logits = model(collate(data, np.arange(3)))
    forward = counter.get_total_flops()
    assert reading.forward(tokens, pairs) == pytest.approx(forward, rel=0.15), (
        "the last layer's rest is left out"
    )
    with counter:
        logits.sum().backward()
    assert reading.step(tokens, pairs) == pytest.approx(forward + counter.get_total_flops(), rel=0.15)


def test_what_is_frozen_costs_its_forward_pass_alone(build: Callable[..., Classifier]) -> None:
    model = build("teacher", "bert", config={**TINY, "num_hidden_layers": 3})
    frozen = fitting.reading_of(model, Train(freeze_layers=2))
    assert frozen.step(100, 1000) == frozen.forward(100, 1000)
    whole = fitting.reading_of(model, Train())
    assert whole.step(100, 1000) == 3 * whole.forward(100, 1000)


def test_attention_is_counted_as_the_architecture_has_it(build: Callable[..., Classifier]) -> None:
    bigbird = build("teacher", "bigbird", config=TINY, block_size=4, random_blocks=1)
    longformer = build("teacher", "longformer", config=TINY, window=16)
    fnet = build("student", "fnet", checkpoint=None, config={"hidden_size": 32, "num_hidden_layers": 2})
    assert [bigbird.keys(length) for length in (20, 128)] == [20, 4 * (3 + 1 + 1 + 1)]
    assert [longformer.keys(length) for length in (10, 128)] == [10, 16 + 1 + 1]
    assert fnet.keys(128) == 0


def test_a_dry_run_predicts_tokens_flops_and_bytes(runs: Path, recipe_file: Write) -> None:
    file = str(recipe_file({"teacher.train.max_steps": 4, "cache.precision": "fp32"}))
    asked = ("teacher", "--recipe", file)
    told = distill(*asked, "--dry-run", COLUMNS="300").stdout
    assert "tokens a second as in" not in told
    assert distill(*asked, "--name", "t").returncode == 0
    tokens = json.loads((runs / "t" / "metrics.json").read_text())["train"]["tokens"]
    said = int(told.split(" steps, ")[1].split(" tokens, ")[0].replace(",", ""))
    assert said == pytest.approx(tokens, rel=0.1), "32 of 50 documents, drawn at random"
    assert "FLOPs" in told
    again = distill(*asked, "--dry-run", COLUMNS="300").stdout
    assert "tokens a second as in t" in again
    assert "caching its logits of 130 documents afterwards" in again
    assert f"{130 * (8 + 4 * 2) / 1000:.1f} kB of disk" in again


def test_rows_that_are_drawn_oftener_are_counted_as_often(build: Callable[..., Classifier]) -> None:
    model = build("teacher", "bert", config=TINY)
    data = encode_texts(model.tokenizer, [[(text, None) for text, _ in documents(8)]], model.config)
    weighed = Encoded(**{**vars(data), "weights": np.full(8, 2.5)})
    assert planning.amount(weighed, model.keys)[0] == 2.5 * planning.amount(data, model.keys)[0]
