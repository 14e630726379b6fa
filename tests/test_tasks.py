"""Metrics and probabilities of the three kinds of task, against direct calls and figures made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics

from distill.errors import RecipeError
from distill.evaluation import Predictions, agreement, buckets, calibration_error, measure
from distill.tasks import METRICS, Kind, better, check_metric, probabilities, quality

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("classes", "average"), [(2, "binary"), (4, "macro")])
def test_single_label_figures_are_scikit_learns(classes: int, average: str) -> None:
    logits, labels = RNG.normal(size=(50, classes)), RNG.integers(0, classes, 50)
    found, predicted = quality("single_label", logits, labels), logits.argmax(1)
    log_p = special.log_softmax(logits, axis=1)
    assert found == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(labels, predicted),
            "f1": metrics.f1_score(labels, predicted, average=average),
            "precision": metrics.precision_score(labels, predicted, average=average),
            "recall": metrics.recall_score(labels, predicted, average=average),
            "matthews": metrics.matthews_corrcoef(labels, predicted),
            "nll": metrics.log_loss(labels, np.exp(log_p), labels=range(classes)),
        }
    )
    assert tuple(found) == METRICS["single_label"]


def test_multi_label_figures_are_scikit_learns() -> None:
    logits, labels = RNG.normal(size=(50, 3)), RNG.integers(0, 2, (50, 3))
    labels[:, 2] = 0  # a label that never occurs has no ranking to measure
    found, predicted = quality("multi_label", logits, labels), logits > 0
    p = special.expit(logits)
    assert found == pytest.approx(
        {
            "micro_f1": metrics.f1_score(labels, predicted, average="micro"),
            "macro_f1": metrics.f1_score(labels, predicted, average="macro", zero_division=0.0),
            "roc_auc": metrics.roc_auc_score(labels[:, :2], logits[:, :2]),
            "average_precision": metrics.average_precision_score(labels[:, :2], logits[:, :2]),
            "nll": -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)),
        }
    )


def test_regression_figures_are_scipys() -> None:
    logits = RNG.normal(size=(50, 1))
    labels = logits[:, 0] + RNG.normal(size=50)
    assert quality("regression", logits, labels) == pytest.approx(
        {
            "pearson": stats.pearsonr(logits[:, 0], labels)[0],
            "spearman": stats.spearmanr(logits[:, 0], labels)[0],
            "mse": np.mean((logits[:, 0] - labels) ** 2),
        }
    )


@pytest.mark.parametrize(
    ("kind", "logits", "labels"),
    [
        ("single_label", np.zeros((4, 2)), np.zeros(4, int)),
        ("single_label", np.zeros((1, 3)), np.array([2])),
        ("multi_label", np.zeros((4, 2)), np.zeros((4, 2), int)),
        ("regression", np.zeros((4, 1)), np.arange(4.0)),
        ("regression", np.ones((1, 1)), np.ones(1)),
    ],
)
def test_a_group_without_variety_has_figures_and_no_nan(
    kind: Kind, logits: np.ndarray, labels: np.ndarray
) -> None:
    found = quality(kind, logits, labels)
    assert found
    assert all(np.isfinite(list(found.values())))


def test_huge_logits_neither_overflow_nor_lose_their_likelihood() -> None:
    found = quality("single_label", np.array([[1e4, -1e4], [-1e4, 1e4]]), np.array([0, 0]))
    assert found["nll"] == pytest.approx(1e4)
    assert quality("multi_label", np.array([[1e4], [-1e4]]), np.array([[0], [0]]))["nll"] == pytest.approx(
        5e3
    )


def test_the_calibration_error_of_four_documents_is_that_by_hand() -> None:
    # Confidences .9 and .9 (one right: |.9 - .5| weighs 2/4), .6 right (1/4), .7 wrong (1/4).
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    labels = np.array([0, 1, 0, 0])
    expected = (2 * 0.4 + 0.4 + 0.7) / 4
    assert calibration_error("single_label", np.log(p), labels, bins=10) == pytest.approx(expected)
    assert calibration_error("regression", p[:, :1], p[:, 0]) is None


def test_multi_label_calibration_counts_every_label() -> None:
    logits = special.logit(np.array([[0.85, 0.15], [0.85, 0.15]]))
    labels = np.array([[1, 0], [0, 0]])
    assert calibration_error("multi_label", logits, labels, bins=10) == pytest.approx((0.7 + 0.3) / 4)


def test_a_document_on_an_edge_is_in_the_group_that_begins_there() -> None:
    found = buckets(np.array([0, 99, 100, 199, 200, 5000]), [100, 200, 9000])
    assert [(name, mask.nonzero()[0].tolist()) for name, mask in found] == [
        ("0-99", [0, 1]),
        ("100-199", [2, 3]),
        ("200-8999", [4, 5]),
    ]


def test_figures_by_length_cover_every_row_once() -> None:
    labels = np.array([0, 1, 0, 1])
    logits = np.eye(2)[[0, 1, 1, 0]].astype(np.float32)
    rows = Predictions(np.arange(4), logits, labels, np.array([5, 6, 500, 600]))
    found = measure("single_label", "accuracy", rows, [100])
    assert found["rows"] == 4
    assert found["accuracy"] == 0.5
    assert found["buckets"] == [
        {"words": "0-99", "rows": 2, "accuracy": 1.0},
        {"words": "100+", "rows": 2, "accuracy": 0.0},
    ]


def test_agreement_is_the_share_of_equal_predictions() -> None:
    mine, theirs = np.eye(2)[[0, 1, 1, 0]], 9 * np.eye(2)[[0, 1, 0, 0]]
    assert agreement("single_label", mine, theirs) == 0.75
    assert agreement("regression", np.arange(5.0)[:, None], 3 - np.arange(5.0)[:, None]) == pytest.approx(-1)


def test_probabilities_are_a_softmax_for_one_label_and_a_sigmoid_for_many() -> None:
    logits = RNG.normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(
        probabilities("single_label", logits), special.softmax(logits, axis=1), rtol=1e-6
    )
    np.testing.assert_allclose(probabilities("multi_label", logits), special.expit(logits), rtol=1e-6)
    np.testing.assert_array_equal(probabilities("regression", logits), logits)


def test_better_knows_which_way_a_metric_points_and_that_nan_beats_nothing() -> None:
    assert better("accuracy", 0.9, 0.8)
    assert not better("accuracy", 0.8, 0.8)
    assert better("nll", 0.1, 0.2)
    assert not better("mse", 0.3, 0.2)
    assert better("accuracy", 0.0, None)
    assert not better("accuracy", float("nan"), None)


def test_a_metric_of_another_kind_is_refused_with_the_nearest_name() -> None:
    assert check_metric("regression", None) == "pearson"
    with pytest.raises(RecipeError, match="did you mean 'accuracy'"):
        check_metric("single_label", "acuracy")
