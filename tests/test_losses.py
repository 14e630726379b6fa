"""Every term of an objective against its formula, written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor

from distill.batching import Batch
from distill.losses import Objective, hard, mse_logits, soft
from distill.recipe import Loss
from distill.tasks import Kind

RNG = np.random.default_rng(0)
KINDS: list[Kind] = ["single_label", "multi_label", "regression"]


def tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array))


def logits_of(kind: Kind, documents: int = 6) -> np.ndarray:
    return 3 * RNG.normal(size=(documents, 1 if kind == "regression" else 4))


def labels_of(kind: Kind, documents: int = 6) -> np.ndarray:
    if kind == "single_label":
        return RNG.integers(0, 4, documents)
    return (
        RNG.integers(0, 2, (documents, 4)).astype(float)
        if kind == "multi_label"
        else RNG.normal(size=documents)
    )


def bce(target: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.asarray(-(target * np.log(p) + (1 - target) * np.log(1 - p)).mean(1))


def test_hard_loss_of_one_label_is_cross_entropy() -> None:
    logits, labels = logits_of("single_label"), labels_of("single_label")
    expected = -special.log_softmax(logits, axis=1)[np.arange(6), labels]
    np.testing.assert_allclose(hard("single_label", tensor(logits), tensor(labels)), expected)


def test_hard_loss_of_many_labels_is_their_mean_binary_cross_entropy() -> None:
    logits, labels = logits_of("multi_label"), labels_of("multi_label")
    expected = bce(labels, special.expit(logits))
    np.testing.assert_allclose(hard("multi_label", tensor(logits), tensor(labels)), expected)


def test_hard_loss_of_a_number_is_its_squared_error() -> None:
    logits, labels = logits_of("regression"), labels_of("regression")
    np.testing.assert_allclose(
        hard("regression", tensor(logits), tensor(labels)), (logits[:, 0] - labels) ** 2
    )


def test_smoothing_moves_the_labels_towards_uniform() -> None:
    logits, labels = logits_of("single_label"), labels_of("single_label")
    target = 0.9 * np.eye(4)[labels] + 0.1 / 4
    expected = -(target * special.log_softmax(logits, axis=1)).sum(1)
    np.testing.assert_allclose(hard("single_label", tensor(logits), tensor(labels), 0.1), expected)
    many = labels_of("multi_label")
    expected = bce(0.9 * many + 0.05, special.expit(logits))
    np.testing.assert_allclose(hard("multi_label", tensor(logits), tensor(many), 0.1), expected)


@pytest.mark.parametrize("t", [1.0, 2.0, 7.5])
def test_soft_loss_of_one_label_is_hintons(t: float) -> None:
    student, teacher = logits_of("single_label"), logits_of("single_label")
    p, q = special.softmax(teacher / t, axis=1), special.softmax(student / t, axis=1)
    expected = t**2 * special.rel_entr(p, q).sum(1)
    np.testing.assert_allclose(soft("single_label", tensor(student), tensor(teacher), t), expected)


@pytest.mark.parametrize("t", [1.0, 2.0, 7.5])
def test_soft_loss_of_many_labels_is_a_binary_cross_entropy_for_each(t: float) -> None:
    student, teacher = logits_of("multi_label"), logits_of("multi_label")
    expected = t**2 * bce(special.expit(teacher / t), special.expit(student / t))
    np.testing.assert_allclose(soft("multi_label", tensor(student), tensor(teacher), t), expected)


def test_soft_loss_of_a_number_is_the_squared_error_at_any_temperature() -> None:
    student, teacher = logits_of("regression"), logits_of("regression")
    expected = (student - teacher)[:, 0] ** 2
    np.testing.assert_allclose(soft("regression", tensor(student), tensor(teacher), 3.0), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_mse_of_logits_is_the_mean_over_classes(kind: Kind) -> None:
    student, teacher = logits_of(kind), logits_of(kind)
    expected = ((student - teacher) ** 2).mean(1)
    np.testing.assert_allclose(mse_logits(tensor(student), tensor(teacher)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_values(kind: Kind) -> None:
    student = tensor(logits_of(kind)).requires_grad_()
    teacher, labels = tensor(logits_of(kind)), tensor(labels_of(kind))
    assert torch.autograd.gradcheck(
        lambda s: hard(kind, s, labels, 0.1 if kind != "regression" else 0), student
    )
    assert torch.autograd.gradcheck(lambda s: soft(kind, s, teacher, 2.5), student)
    assert torch.autograd.gradcheck(lambda s: mse_logits(s, teacher), student)


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_the_soft_gradient_keeps_its_size_when_the_temperature_changes(kind: Kind) -> None:
    student, teacher = tensor(0.01 * logits_of(kind)), tensor(0.01 * logits_of(kind))

    def norm(t: float) -> float:
        at = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(soft(kind, at, teacher, t).sum(), at)
        return float(gradient.norm())

    # (For small logits; a softmax's curvature makes a difference of a few per cent.)
    assert norm(2.0) == pytest.approx(norm(1.0), rel=0.05)
    assert norm(8.0) == pytest.approx(norm(1.0), rel=0.05)


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_a_student_that_says_what_the_teacher_says_has_no_soft_gradient(kind: Kind) -> None:
    teacher = tensor(logits_of(kind))
    student = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(soft(kind, student, teacher, 4.0).sum(), student)
    assert float(gradient.abs().max()) < 1e-12


def batch(kind: Kind, labelled: list[bool], teacher: np.ndarray | None) -> Batch:
    empty = torch.zeros(0, dtype=torch.long)
    return Batch(
        empty, empty, empty, empty, len(labelled), tensor(labels_of(kind, len(labelled))),
        torch.tensor(labelled), None if teacher is None else tensor(teacher),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_label_gives_the_hard_term_neither_value_nor_gradient(kind: Kind) -> None:
    objective = Objective(kind, [Loss(kind="hard")])
    logits = tensor(logits_of(kind, 3)).requires_grad_()
    values = objective.per_document(objective.terms[0], logits, batch(kind, [True, False, True], None))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert values[1] == 0
    assert (gradient[1] == 0).all()
    assert (gradient[[0, 2]].abs().sum(1) > 0).all()


def test_a_row_without_a_label_still_has_its_soft_terms() -> None:
    objective = Objective("single_label", [Loss(kind="soft", temperature=2.0), Loss(kind="mse_logits")])
    logits, teacher = logits_of("single_label", 2), logits_of("single_label", 2)
    rows = batch("single_label", [False, False], teacher)
    for term, expected in zip(
        objective.terms,
        [
            soft("single_label", tensor(logits), tensor(teacher), 2.0),
            mse_logits(tensor(logits), tensor(teacher)),
        ],
        strict=True,
    ):
        np.testing.assert_allclose(objective.per_document(term, tensor(logits), rows), expected)


def test_only_soft_terms_need_a_teacher() -> None:
    assert not Objective("single_label", [Loss(kind="hard")]).needs_teacher
    assert Objective("single_label", [Loss(kind="hard"), Loss(kind="mse_logits")]).needs_teacher
