"""The terms of an objective: one line of algebra each, a value for each document. Knows no model.

A loss cannot tell a live logit from a cached one. Shapes: logits ``(documents, classes)``, results
``(documents,)``. Gradients of the soft terms keep their scale when the temperature T changes: that is
what the T² is for (Hinton et al. 2015, section 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.recipe import Loss
from distill.tasks import Kind

if TYPE_CHECKING:
    from distill.batching import Batch


def hard(kind: Kind, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, mean binary cross-entropy over the labels, or squared error."""
    if kind == "single_label":
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if kind == "multi_label":
        smooth = labels * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(-1)
    return (logits[:, 0] - labels).square()


def soft(kind: Kind, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """What the teacher's softened probabilities ask for.

    single_label: ``T²·KL(softmax(t/T) ‖ softmax(s/T))``, Hinton et al. 2015.
    multi_label: ``T²·BCE(σ(t/T), σ(s/T))``, mean over the labels; they are independent, so a softmax over
    them would be wrong.
    regression: squared error; there is nothing to soften.
    """
    if kind == "regression":
        return mse_logits(logits, teacher)
    if kind == "multi_label":
        target = torch.sigmoid(teacher / temperature)
        bce = F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
        return temperature**2 * bce.mean(-1)
    target = F.log_softmax(teacher / temperature, dim=-1)
    student = F.log_softmax(logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, target, reduction="none", log_target=True).sum(-1)


def mse_logits(logits: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of the logits, mean over the classes (Ba and Caruana 2014)."""
    return (logits - teacher).square().mean(-1)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms; each is a mean over the documents that it applies to."""

    kind: Kind
    terms: Sequence[Loss]
    label_smoothing: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any term reads the teacher's logits."""
        return any(term.kind != "hard" for term in self.terms)

    def per_document(self, term: Loss, logits: Tensor, batch: Batch) -> Tensor:
        """Compute one term, unweighted, ``(documents,)``; 0 for documents without the label it needs."""
        if term.kind == "hard":
            values = hard(self.kind, logits, batch.labels, self.label_smoothing)
            # On unlabelled rows the term is absent: where(), so that nothing flows back from there.
            return torch.where(batch.labelled, values, torch.zeros_like(values))
        assert batch.teacher_logits is not None, "a soft term needs the teacher's logits"
        if term.kind == "soft":
            return soft(self.kind, logits, batch.teacher_logits, term.temperature)
        return mse_logits(logits, batch.teacher_logits)
