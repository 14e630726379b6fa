"""Every term of an objective against its formula, written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor

from distill.batching import Batch
from distill.losses import (
    Objective,
    attention,
    cosine,
    dkd,
    hard,
    hidden_mse,
    mse_logits,
    relation,
    soft,
    value_at,
)
from distill.schema import Loss, Schedule
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


def test_a_class_weight_multiplies_its_rows_and_a_labels_weight_its_positive_rows() -> None:
    logits, labels, weights = logits_of("single_label"), labels_of("single_label"), np.array([1, 2, 0.5, 4])
    plain = hard("single_label", tensor(logits), tensor(labels))
    found = hard("single_label", tensor(logits), tensor(labels), 0.0, tensor(weights))
    np.testing.assert_allclose(found, np.asarray(plain) * weights[labels])
    many, p = labels_of("multi_label"), special.expit(logits)
    expected = -(weights * many * np.log(p) + (1 - many) * np.log(1 - p)).mean(1)
    found = hard("multi_label", tensor(logits), tensor(many), 0.0, tensor(weights))
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_class_weights_are_in_the_hard_term_and_in_no_other(kind: Kind) -> None:
    terms = [Loss(kind="hard"), Loss(kind="soft", temperature=2.0), Loss(kind="mse_logits")]
    logits, rows = tensor(logits_of(kind)), batch(kind, [True] * 6, logits_of(kind))
    plain, weighed = Objective(kind, terms), Objective(kind, terms, class_weights=(5.0,) * 4)
    same = [
        torch.equal(plain.per_document(term, logits, rows), weighed.per_document(term, logits, rows))
        for term in terms
    ]
    assert same == [False, True, True]


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


def decoupled(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, t: float) -> tuple[Any, Any]:
    """TCKD and NCKD from probabilities, class by class, as the paper defines them."""
    tckd, nckd = [], []
    for s_row, t_row, label in zip(student / t, teacher / t, labels, strict=True):
        q, p = np.exp(s_row) / np.exp(s_row).sum(), np.exp(t_row) / np.exp(t_row).sum()
        tckd.append(
            p[label] * np.log(p[label] / q[label]) + (1 - p[label]) * np.log((1 - p[label]) / (1 - q[label]))
        )
        other_p, other_q = np.delete(p, label) / (1 - p[label]), np.delete(q, label) / (1 - q[label])
        nckd.append((other_p * np.log(other_p / other_q)).sum())
    return np.array(tckd), np.array(nckd)


@pytest.mark.parametrize("t", [1.0, 2.0, 7.5])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (1.5, 8.0)])
def test_decoupled_loss_is_the_papers(t: float, alpha: float, beta: float) -> None:
    student, teacher, labels = logits_of("single_label"), logits_of("single_label"), labels_of("single_label")
    tckd, nckd = decoupled(student, teacher, labels, t)
    found = dkd(tensor(student), tensor(teacher), tensor(labels), t, alpha, beta)
    np.testing.assert_allclose(found, t**2 * (alpha * tckd + beta * nckd))


def test_the_parts_of_the_decoupled_loss_make_up_hintons() -> None:
    student, teacher, labels = logits_of("single_label"), logits_of("single_label"), labels_of("single_label")
    tckd, nckd = (dkd(tensor(student), tensor(teacher), tensor(labels), 2.0, a, 1.0 - a) for a in (1.0, 0.0))
    p = special.softmax(teacher / 2, axis=1)[np.arange(6), labels]
    hinton = soft("single_label", tensor(student), tensor(teacher), 2.0)
    np.testing.assert_allclose(tckd.numpy() + (1 - p) * nckd.numpy(), hinton)


def test_with_two_classes_the_decoupled_loss_is_alpha_times_hintons() -> None:
    student, teacher = logits_of("single_label")[:, :2], logits_of("single_label")[:, :2]
    found = dkd(tensor(student), tensor(teacher), tensor([0, 1, 0, 1, 1, 0]), 2.0, 3.0, 8.0)
    np.testing.assert_allclose(found, 3 * soft("single_label", tensor(student), tensor(teacher), 2.0))


def test_the_decoupled_loss_of_a_teacher_that_is_sure_is_finite_and_has_a_gradient() -> None:
    teacher = torch.tensor([[80.0, 0.0, -20.0], [0.0, 90.0, 3.0]])
    student = torch.zeros(2, 3, requires_grad=True)
    values = dkd(student, teacher, torch.tensor([0, 0]), 1.0, 1.0, 8.0)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_values(kind: Kind) -> None:
    student = tensor(logits_of(kind)).requires_grad_()
    teacher, labels = tensor(logits_of(kind)), tensor(labels_of(kind))
    assert torch.autograd.gradcheck(
        lambda s: hard(kind, s, labels, 0.1 if kind != "regression" else 0), student
    )
    assert torch.autograd.gradcheck(lambda s: soft(kind, s, teacher, 2.5), student)
    assert torch.autograd.gradcheck(lambda s: mse_logits(s, teacher), student)


def test_gradients_of_the_decoupled_loss_are_those_of_its_values() -> None:
    student = tensor(logits_of("single_label")).requires_grad_()
    teacher, labels = tensor(logits_of("single_label")), tensor(labels_of("single_label"))
    assert torch.autograd.gradcheck(lambda s: dkd(s, teacher, labels, 2.5, 1.5, 8.0), student)


@pytest.mark.parametrize("term", ["soft single_label", "soft multi_label", "dkd"])
def test_the_gradient_keeps_its_size_when_the_temperature_changes(term: str) -> None:
    kind: Kind = "multi_label" if "multi" in term else "single_label"
    student, teacher = tensor(0.01 * logits_of(kind)), tensor(0.01 * logits_of(kind))
    labels = tensor(labels_of("single_label"))

    def norm(t: float) -> float:
        at = student.clone().requires_grad_()
        values = dkd(at, teacher, labels, t, 1.0, 8.0) if term == "dkd" else soft(kind, at, teacher, t)
        (gradient,) = torch.autograd.grad(values.sum(), at)
        return float(gradient.norm())

    # (For small logits; a softmax's curvature makes a difference of a few per cent.)
    assert [norm(t) for t in (2.0, 4.0, 8.0)] == pytest.approx([norm(1.0)] * 3, rel=0.05)


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_the_soft_gradient_of_many_labels_is_t_times_the_difference_of_probabilities(t: float) -> None:
    student, teacher = logits_of("multi_label"), logits_of("multi_label")
    at = tensor(student).requires_grad_()
    (gradient,) = torch.autograd.grad(soft("multi_label", at, tensor(teacher), t).sum(), at)
    expected = t * (special.expit(student / t) - special.expit(teacher / t)) / 4  # mean over the labels
    np.testing.assert_allclose(gradient, expected)


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


@pytest.mark.parametrize(("kind", "term"), [*((kind, "hard") for kind in KINDS), ("single_label", "dkd")])
def test_a_row_without_a_label_gives_hard_and_dkd_neither_value_nor_gradient(kind: Kind, term: Any) -> None:
    objective = Objective(kind, [Loss(kind=term)])
    logits = tensor(logits_of(kind, 3)).requires_grad_()
    rows = batch(kind, [True, False, True], logits_of(kind, 3))
    values = objective.per_document(objective.terms[0], logits, rows)
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


def test_only_the_hard_term_needs_no_teacher() -> None:
    assert not Objective("single_label", [Loss(kind="hard")]).needs_teacher
    assert Objective("single_label", [Loss(kind="hard"), Loss(kind="mse_logits")]).needs_teacher
    inside = Objective("single_label", [Loss(kind="hard"), Loss(kind="cosine")])
    assert inside.needs_teacher
    assert not inside.needs_logits


def test_terms_of_one_kind_are_told_apart_by_name() -> None:
    terms = [Loss(kind="soft"), Loss(kind="hard"), Loss(kind="soft", temperature=4.0)]
    assert Objective("single_label", terms).names == ["soft", "hard", "soft_2"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"until": 0.6}, [1.0, 0.6, 0.2, 0.2, 0.2]),
        ({"shape": "cosine"}, [1.0, 0.8828427, 0.6, 0.3171573, 0.2]),
        ({"start": 0.0, "end": 4.0}, [0.0, 1.0, 2.0, 3.0, 4.0]),
        ({"until": 0.1}, [0.2, 0.2, 0.2, 0.2, 0.2]),
    ],
)
def test_a_schedule_runs_from_start_to_end_and_stays_there(
    changes: dict[str, Any], expected: list[float]
) -> None:
    schedule = Schedule.model_validate({"start": 1.0, "end": 0.2, **changes})
    assert [value_at(schedule, step, 5) for step in range(5)] == pytest.approx(expected)
    assert value_at(schedule, 4, 5) == schedule.end


def test_a_number_stays_what_it_is() -> None:
    assert [value_at(0.5, step, 3) for step in range(3)] == [0.5] * 3


def test_scheduled_temperatures_and_weights_are_those_of_the_step() -> None:
    moving = Schedule(start=4.0, end=1.0)
    objective = Objective(
        "single_label", [Loss(kind="soft", weight=moving, temperature=moving), Loss(kind="hard")]
    )
    student, teacher = logits_of("single_label", 3), logits_of("single_label", 3)
    rows = batch("single_label", [True] * 3, teacher)
    for step, value in ((0, 4.0), (1, 3.0), (3, 1.0)):
        now = objective.at(step, 4)
        found = now.per_document(now.terms[0], tensor(student), rows)
        np.testing.assert_allclose(found, soft("single_label", tensor(student), tensor(teacher), value))
        assert now.scheduled == pytest.approx({"weight_soft": value, "temperature_soft": value})
        assert now.weight(now.terms[0]) == pytest.approx(value)


def test_cosine_and_mse_of_states_are_their_formulas_for_each_token() -> None:
    student, teacher = RNG.normal(size=(2, 7, 12))
    lengths = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    np.testing.assert_allclose(
        cosine(tensor(student), tensor(teacher)), 1 - (student * teacher).sum(1) / lengths
    )
    np.testing.assert_allclose(
        hidden_mse(tensor(student), tensor(teacher)), ((student - teacher) ** 2).sum(1) / 12
    )


def maps(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Scores of one head of one window, token by token."""
    return np.array([[q @ k / np.sqrt(len(q)) for k in key] for q in query])


def test_relations_are_softmaxed_scaled_products_within_each_head() -> None:
    heads, student, teacher = 3, RNG.normal(size=(2, 5, 6)), RNG.normal(size=(2, 5, 12))
    expected = np.zeros((2, 5))
    for window in range(2):
        for head in range(heads):
            p, q = (
                special.softmax(maps(part, part), axis=1)
                for part in (teacher[window, :, 4 * head :][:, :4], student[window, :, 2 * head :][:, :2])
            )
            expected[window] += special.rel_entr(p, q).sum(1) / heads
    np.testing.assert_allclose(relation(tensor(student), tensor(teacher), heads), expected)


@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_attention_is_compared_head_by_head(distance: Any) -> None:
    (query, key), (t_query, t_key) = RNG.normal(size=(2, 2, 5, 3, 4)), RNG.normal(size=(2, 2, 5, 3, 6))
    expected = np.zeros((2, 5))
    for window in range(2):
        for head in range(3):
            theirs = maps(t_query[window, :, head], t_key[window, :, head])
            ours = maps(query[window, :, head], key[window, :, head])
            p, q = (special.softmax(scores, axis=1) for scores in (theirs, ours))
            apart = special.rel_entr(p, q).sum(1) if distance == "kl" else ((ours - theirs) ** 2).mean(1)
            expected[window] += apart / 3
    found = attention(tensor(query), tensor(key), tensor(t_query), tensor(t_key), distance)
    np.testing.assert_allclose(found, expected)


def test_gradients_of_the_terms_of_the_inside_are_those_of_their_values() -> None:
    states, wanted = (tensor(RNG.normal(size=(1, 4, 6))).requires_grad_(at) for at in (True, False))
    query, key = (tensor(RNG.normal(size=(1, 4, 2, 3))).requires_grad_() for _ in range(2))
    other = tensor(RNG.normal(size=(1, 4, 2, 5)))
    check = torch.autograd.gradcheck
    assert check(lambda s: cosine(s, wanted), states)
    assert check(lambda s: hidden_mse(s, wanted), states)
    assert check(lambda s: relation(s, wanted, 2), states)
    assert check(lambda q, k: attention(q, k, other, other.flip(1), "kl"), (query, key))
    assert check(lambda q, k: attention(q, k, other, other.flip(1), "mse"), (query, key))
