"""From which probability on a label of a multi-label task is given: one half, or fitted. Knows no model.

Fitted thresholds maximise each label's F1 on validation, and only there. They are kept in the saved
model's ``distill.json`` and used by ``distill predict``. Figures at these thresholds end in ``_fitted``; all
others, ``micro_f1`` and ``macro_f1`` among them, are at one half or need none.
"""

from __future__ import annotations

import numpy as np

from distill.tasks import Array, probabilities


def fit(logits: Array, labels: Array) -> list[float]:
    """Find the thresholds that maximise each label's F1.

    Args:
        logits: ``(n, classes)`` of the validation rows.
        labels: ``(n, classes)`` of 0 and 1.

    Returns:
        A probability for each label: one half where it is as good as any, and where the label never
        occurs; else the middle between the lowest probability that is accepted and the next one, of equally
        good ones the nearest to one half.
    """
    p = probabilities("multi_label", logits)
    return [_best(p[:, label], labels[:, label]) for label in range(p.shape[1])]


def _best(p: Array, labels: Array) -> float:
    order = np.argsort(-p, kind="stable")
    high, low = p[order], np.append(p[order][1:], 0.0)
    cuts = high > low  # of equal probabilities all are accepted, or none
    if not labels.any() or not cuts.any():
        return 0.5
    f1 = 2 * np.cumsum(labels[order]) / (np.arange(1, len(p) + 1) + labels.sum())
    best = cuts & (f1 == f1[cuts].max())
    high, low = high[best], low[best]
    if ((low <= 0.5) & (high > 0.5)).any():
        return 0.5
    middle = (high + low) / 2
    middle = np.where(middle < high, middle, low)  # of neighbours among the floats there is none
    return float(middle[np.abs(middle - 0.5).argmin()])


def given(logits: Array, thresholds: list[float]) -> Array:
    """Say which labels are given, ``(n, classes)`` of 0 and 1."""
    return np.asarray((probabilities("multi_label", logits) > np.asarray(thresholds)).astype(np.int64))


def figures(logits: Array, labels: Array, thresholds: list[float]) -> dict[str, float]:
    """Compute F1 at fitted thresholds: ``micro_f1_fitted`` and ``macro_f1_fitted``."""
    from sklearn.metrics import f1_score

    predicted = given(logits, thresholds)
    return {
        f"{mean}_f1_fitted": float(f1_score(labels, predicted, average=mean, zero_division=0.0))
        for mean in ("micro", "macro")
    }


def by_label(
    names: tuple[str, ...], logits: Array, labels: Array, thresholds: list[float] | None
) -> dict[str, dict[str, float]]:
    """Compute each label's own figures.

    Args:
        names: of the labels.
        logits: ``(n, classes)``.
        labels: ``(n, classes)`` of 0 and 1.
        thresholds: the fitted ones, where there are.

    Returns:
        By label: ``rows`` that have it, ``f1``, with thresholds ``f1_fitted`` and ``threshold``, and for a
        label that occurs with both values ``roc_auc`` and ``average_precision``.
    """
    from sklearn import metrics

    halves = [0.5] * len(names)
    plain, fitted = given(logits, halves), given(logits, thresholds or halves)
    result: dict[str, dict[str, float]] = {}
    for at, name in enumerate(names):
        truth = labels[:, at]
        found = {
            "rows": int(truth.sum()),
            "f1": float(metrics.f1_score(truth, plain[:, at], zero_division=0.0)),
        }
        if thresholds is not None:
            found["f1_fitted"] = float(metrics.f1_score(truth, fitted[:, at], zero_division=0.0))
            found["threshold"] = thresholds[at]
        if 0 < truth.sum() < len(truth):
            found["roc_auc"] = float(metrics.roc_auc_score(truth, logits[:, at]))
            found["average_precision"] = float(metrics.average_precision_score(truth, logits[:, at]))
        result[name] = found
    return result
