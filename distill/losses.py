"""The terms of an objective: one line of algebra each. Knows no model.

A loss cannot tell a live logit from a cached one. Shapes: logits ``(documents, classes)`` or, of spans,
``(documents, units, 2)``, results ``(documents,)``; terms of what two models hold inside have a value for each
token, and live.py makes means over documents of them. Gradients of the soft terms keep their scale when the
temperature T changes: that is what the T² is for (Hinton et al. 2015, section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, unflatten

from distill.schema import Loss, Schedule
from distill.tasks import UNREAD, Kind

if TYPE_CHECKING:
    from distill.batching import Batch


def hard(
    kind: Kind, logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy, mean binary cross-entropy over the labels, or squared error; see class_weights.py.

    span: mean of the cross-entropies of the answer's first and last unit.
    """
    if kind == "span":
        columns = zip(logits.unbind(2), labels.unbind(1), strict=True)
        return torch.stack([hard("single_label", *column) for column in columns]).mean(0)
    if kind == "single_label":
        return F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=smoothing)
    if kind == "multi_label":
        smooth = labels * (1 - smoothing) + smoothing / 2
        bce = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none", pos_weight=weights)
        return bce.mean(-1)
    return (logits[:, 0] - labels).square()


def soft(kind: Kind, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """What the teacher's softened probabilities ask for.

    single_label: ``T²·KL(softmax(t/T) ‖ softmax(s/T))``, Hinton et al. 2015.
    multi_label: ``T²·BCE(σ(t/T), σ(s/T))``, mean over the labels; they are independent, so a softmax over
    them would be wrong.
    regression: squared error; there is nothing to soften.
    span: mean of single_label's over the units, for first and last; units that the student has not read do not count.
    """
    if kind == "span":
        shown = torch.where(logits == UNREAD, logits, teacher)
        columns = zip(logits.unbind(2), shown.unbind(2), strict=True)
        return torch.stack([soft("single_label", *column, temperature) for column in columns]).mean(0)
    if kind == "regression":
        return mse_logits(logits, teacher)
    if kind == "multi_label":
        target = torch.sigmoid(teacher / temperature)
        bce = F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
        return temperature**2 * bce.mean(-1)
    target = F.log_softmax(teacher / temperature, dim=-1)
    student = F.log_softmax(logits / temperature, dim=-1)
    return temperature**2 * _kl(student, target).sum(-1)


def mse_logits(logits: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of the logits, mean over the classes (Ba and Caruana 2014)."""
    return (logits - teacher).square().mean(-1)


def dkd(
    logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, beta: float
) -> Tensor:
    """Decoupled knowledge distillation, ``T²·(α·TCKD + β·NCKD)``, Zhao et al. 2022.

    TCKD: ``KL(b(t/T) ‖ b(s/T))``, b the probability of the label's class, and of all others together.
    NCKD: ``KL(p̂(t/T) ‖ p̂(s/T))``, p̂ the softmax over the other classes alone; 0 where there is one other.
    With ``α = 1`` and the teacher's probability of the other classes in place of β it is Hinton's loss.

    Args:
        logits: the student's ``(documents, classes)``.
        teacher: the teacher's.
        labels: ``(documents,)`` class numbers.
        temperature: T.
        alpha: α.
        beta: β.
    """
    of_label = F.one_hot(labels, logits.shape[1]).bool()

    def split(of: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of the label ``(documents,)``, and log p̂ of the others ``(documents, classes - 1)``."""
        others = of[~of_label].view(len(of), -1) / temperature
        return of[of_label] / temperature - others.logsumexp(-1), F.log_softmax(others, dim=-1)

    (student_odds, student_others), (odds, others) = split(logits), split(teacher)
    tckd = _kl(F.logsigmoid(student_odds), F.logsigmoid(odds))
    tckd = tckd + _kl(F.logsigmoid(-student_odds), F.logsigmoid(-odds))
    nckd = _kl(student_others, others).sum(-1)
    return temperature**2 * (alpha * tckd + beta * nckd)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 − cos(s, t)`` of states, ``(…, width)`` to ``(…)``; Sanh et al. 2019."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of states, mean over the width, ``(…, width)`` to ``(…)``; Jiao et al. 2020."""
    return (student - teacher).square().mean(-1)


def relation(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """``KL(softmax(t·tᵀ/√w) ‖ softmax(s·sᵀ/√w))`` of each token, mean over the heads; Wang et al. 2021.

    Args:
        student: queries, keys or values of windows of one length, ``(windows, length, width)``.
        teacher: of the same tokens; its width may be another.
        heads: into which both widths are split; w is that of one of them.

    Returns:
        ``(windows, length)``.
    """

    def relations(of: Tensor) -> Tensor:
        parts = unflatten(of, -1, (heads, -1))
        return _scores(parts, parts).log_softmax(-1)

    return _kl(relations(student), relations(teacher)).sum(-1).mean(1)


def attention(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    distance: Literal["kl", "mse"],
) -> Tensor:
    """Compare where each token looks, mean over the heads.

    kl: ``KL(softmax(a_t) ‖ softmax(a_s))``, Sun et al. 2020. mse: ``(a_s − a_t)²``, mean over the
    keys, Jiao et al. 2020, whose authors found the scores a before the softmax better than after.

    Args:
        query: the student's, of windows of one length, ``(windows, length, heads, head width)``.
        key: the student's.
        teacher_query: of the same tokens; its head width may be another.
        teacher_key: see there.
        distance: see above.

    Returns:
        ``(windows, length)``.
    """
    student, teacher = _scores(query, key), _scores(teacher_query, teacher_key)
    if distance == "mse":
        return (student - teacher).square().mean(-1).mean(1)
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1)).sum(-1).mean(1)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Compute ``q·k/√w``: ``(windows, length, heads, w)`` twice to ``(windows, heads, length, length)``."""
    return query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / math.sqrt(query.shape[-1])


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Compute ``p·(log p − log q)``, element by element."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True)


def value_at(value: float | Schedule, step: int, total: int) -> float:
    """Return a weight or temperature at a step, counted from 0, of ``total``."""
    if not isinstance(value, Schedule):
        return value
    last = value.until * total - 1  # the last step of its share, where it has arrived
    gone = min(1.0, step / last) if last > 0 else 1.0
    factor = gone if value.shape == "linear" else 0.5 * (1 - math.cos(math.pi * gone))
    return value.start * (1 - factor) + value.end * factor


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms; each is a mean over the documents that it applies to."""

    kind: Kind
    terms: Sequence[Loss]
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    step: int = 0
    """Where scheduled weights and temperatures stand."""
    total: int = 1

    def at(self, step: int, total: int) -> Objective:
        """Return the objective of a step, counted from 0, of a run's ``total``."""
        return replace(self, step=step, total=total)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term learns from a teacher."""
        return any(term.needs_teacher for term in self.terms)

    @property
    def needs_logits(self) -> bool:
        """Whether any term reads the teacher's logits."""
        return any(term.needs_logits for term in self.terms)

    @property
    def names(self) -> list[str]:
        """The name under which each term is logged: its kind; ``soft_2`` for a second one."""
        kinds = [term.kind for term in self.terms]
        earlier = [kinds[:at].count(kind) for at, kind in enumerate(kinds)]
        return [f"{kind}_{count + 1}" if count else kind for kind, count in zip(kinds, earlier, strict=True)]

    @property
    def scheduled(self) -> dict[str, float]:
        """The weights and temperatures that move, as ``weight_soft``, with their values at this step."""
        return {
            f"{field}_{name}": value_at(value, self.step, self.total)
            for name, term in zip(self.names, self.terms, strict=True)
            for field, value in (("weight", term.weight), ("temperature", term.temperature))
            if isinstance(value, Schedule)
        }

    def weight(self, term: Loss) -> float:
        """Return a term's weight at this step."""
        return value_at(term.weight, self.step, self.total)

    def temperature(self, term: Loss) -> float:
        """Return a term's temperature at this step."""
        return value_at(term.temperature, self.step, self.total)

    def per_document(self, term: Loss, logits: Tensor, batch: Batch) -> Tensor:
        """Compute one term, unweighted, ``(documents,)``; 0 for documents without the label it needs.

        Those that need a live teacher are computed in live.py, beside the models.
        """
        assert not term.needs_live, "a term of the models' inside is not a function of logits"
        temperature = self.temperature(term)
        if term.kind == "hard":
            weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
            values = hard(self.kind, logits, batch.labels, self.label_smoothing, weights)
            return _absent_without_label(values, batch)
        assert batch.teacher_logits is not None, "a soft term needs the teacher's logits"
        if term.kind == "dkd":
            values = dkd(logits, batch.teacher_logits, batch.labels, temperature, term.alpha, term.beta)
            return _absent_without_label(values, batch)
        if term.kind == "soft":
            return soft(self.kind, logits, batch.teacher_logits, temperature)
        return mse_logits(logits, batch.teacher_logits)


def _absent_without_label(values: Tensor, batch: Batch) -> Tensor:
    """Take a term away from unlabelled rows: where(), so that nothing flows back from there."""
    return torch.where(batch.labelled, values, torch.zeros_like(values))
