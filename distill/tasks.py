"""What is predicted: targets, metrics, and the probabilities that logits stand for. Knows no model.

| kind         | labels of n rows      | logits              | probabilities | selects by          |
|--------------|-----------------------|---------------------|---------------|---------------------|
| single_label | (n,) class numbers    | (n, classes)        | softmax       | accuracy            |
| multi_label  | (n, classes) of 0, 1  | (n, classes)        | sigmoid       | micro_f1            |
| regression   | (n,) numbers          | (n, 1)              | none          | pearson             |
| span         | (n, 2) units          | (n, units, 2)       | softmax       | f1                  |

An answer is two choices of one among the units of a text, its first and its last (see spans.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from distill.errors import RecipeError, nearest

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Kind = Literal["single_label", "multi_label", "regression", "span"]
UNREAD = -30000.0
"""Logit of a unit that a document does not have, or a model has not read: its probability is 0, no difference of two
such is NaN, and float16 holds it exactly."""

METRICS: dict[Kind, tuple[str, ...]] = {
    "single_label": ("accuracy", "f1", "precision", "recall", "matthews", "nll"),
    "multi_label": ("micro_f1", "macro_f1", "roc_auc", "average_precision", "nll"),
    "regression": ("pearson", "spearman", "mse"),
    "span": ("f1", "exact_match"),
}
"""Names that each kind reports; the first one selects by default."""
LOWER_IS_BETTER = frozenset({"nll", "mse"})


@dataclass(frozen=True)
class TaskSpec:
    """A task whose classes are known."""

    kind: Kind
    labels: tuple[str, ...]
    """Class names in the order of the logits; one name, the label column's, for regression; start, end for span."""
    metric: str

    @property
    def classes(self) -> int:
        """Width of the logits."""
        return len(self.labels)

    @property
    def problem_type(self) -> str | None:
        """The name that transformers has for this kind, if any."""
        if self.kind == "span":
            return None
        return self.kind if self.kind == "regression" else f"{self.kind}_classification"


def check_metric(kind: Kind, metric: str | None) -> str:
    """Return the metric that selects, the kind's usual one for None.

    Raises:
        RecipeError: this kind of task has no such metric.
    """
    if metric is None:
        return METRICS[kind][0]
    if metric not in METRICS[kind]:
        raise RecipeError(f"task.metric: {kind} has no metric {metric!r}{nearest(metric, METRICS[kind])}")
    return metric


def log_probabilities(kind: Kind, logits: Array) -> Array:
    """Log-probability of each class: log softmax over classes (or units), or log sigmoid of each one."""
    if kind == "multi_label":
        return np.asarray(-np.logaddexp(0, -logits.astype(np.float64)))
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def probabilities(kind: Kind, logits: Array) -> Array:
    """Probability of each class ``(n, classes)`` or unit; the prediction itself for regression."""
    return logits if kind == "regression" else np.exp(log_probabilities(kind, logits))


def predictions(kind: Kind, logits: Array) -> Array:
    """Most probable class ``(n,)`` or answer ``(n, 2)``, classes above one half ``(n, classes)``, or the number ``(n,)``."""
    if kind == "span":
        from distill import spans

        return spans.best(logits)
    if kind == "single_label":
        return np.asarray(logits.argmax(axis=-1))
    if kind == "multi_label":
        return np.asarray((logits > 0).astype(np.int64))
    return np.asarray(logits[:, 0])


def nll(kind: Kind, logits: Array, labels: Array) -> float:
    """Mean negative log-likelihood of the labels, in nats (for multi-label: a label, not a row)."""
    log_p = log_probabilities(kind, logits)
    if kind == "single_label":
        return float(-log_p[np.arange(len(labels)), labels].mean())
    log_q = -np.logaddexp(0, logits.astype(np.float64))
    return float(-(labels * log_p + (1 - labels) * log_q).mean())


def quality(kind: Kind, logits: Array, labels: Array) -> dict[str, float]:
    """Compute every metric of the kind, with scikit-learn and SciPy.

    Args:
        kind: the task's kind.
        logits: as in the module's table.
        labels: see there; of spans the :class:`distill.spans.Truth` of each row.

    Returns:
        Figures by the names in ``METRICS[kind]``. F1, precision and recall of two classes are those of
        class 1, as GLUE has them; of more classes the macro mean. ROC-AUC and average precision are
        means over the labels that occur with both values; absent where no label does.
    """
    from scipy import stats
    from sklearn import metrics

    predicted = predictions(kind, logits)
    if kind == "span":
        from distill import spans

        return spans.figures(predicted, labels)
    if kind == "regression":
        constant = len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0
        return {
            "pearson": 0.0 if constant else float(stats.pearsonr(predicted, labels).statistic),
            "spearman": 0.0 if constant else float(stats.spearmanr(predicted, labels).statistic),
            "mse": float(metrics.mean_squared_error(labels, predicted)),
        }
    if kind == "single_label":
        average = "binary" if logits.shape[1] == 2 else "macro"
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0.0
        )
        with warnings.catch_warnings():  # one class only: Matthews is 0, and scikit-learn warns of it
            warnings.simplefilter("ignore")
            matthews = float(metrics.matthews_corrcoef(labels, predicted))
        return {
            "accuracy": float(metrics.accuracy_score(labels, predicted)),
            "f1": float(f1),
            "precision": float(precision),
            "recall": float(recall),
            "matthews": matthews,
            "nll": nll(kind, logits, labels),
        }
    result = {
        "micro_f1": float(metrics.f1_score(labels, predicted, average="micro", zero_division=0.0)),
        "macro_f1": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }
    both = (labels.min(axis=0) == 0) & (labels.max(axis=0) == 1)
    if both.any():
        result["roc_auc"] = float(metrics.roc_auc_score(labels[:, both], logits[:, both], average="macro"))
        result["average_precision"] = float(
            metrics.average_precision_score(labels[:, both], logits[:, both], average="macro")
        )
    return {**result, "nll": nll(kind, logits, labels)}


def better(metric: str, new: float, old: float | None) -> bool:
    """Say whether ``new`` beats ``old`` by this metric; anything beats None, a NaN beats nothing."""
    if np.isnan(new):
        return False
    return old is None or (new < old if metric in LOWER_IS_BETTER else new > old)
