"""How good logits are: quality, calibration, agreement, and each of these by document length.

Pure functions of logits and labels; knows no model and reads no file but a run's predictions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.files import replacing
from distill.tasks import Array, Kind, predictions, probabilities, quality


@dataclass(frozen=True)
class Predictions:
    """What a model said of the test rows."""

    row_id: Array
    """``(n,)`` int64."""
    logits: Array
    """``(n, classes)`` float32, or as in tasks.py."""
    labels: Array
    """As in tasks.py."""
    words: Array
    """``(n,)`` int32: words in the document."""

    def save(self, path: Path) -> None:
        """Write them, complete or not at all."""
        from safetensors.numpy import save_file

        arrays = {"row_id": self.row_id, "logits": self.logits, "labels": self.labels, "words": self.words}
        with replacing(path) as aside:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside)

    @staticmethod
    def load(path: Path) -> Predictions:
        """Read what :meth:`save` wrote.

        Raises:
            SafetensorError: it is no such file.
            TypeError: a part is missing.
            ValueError: the parts are not of the same rows.
        """
        from safetensors.numpy import load_file

        found = Predictions(**load_file(path))
        flat = found.row_id.ndim == found.words.ndim == 1
        if not flat or found.logits.ndim not in (2, 3) or found.labels.ndim not in (1, 2):
            raise ValueError("its parts have other shapes than predictions")
        if len({len(part) for part in vars(found).values()}) != 1:
            raise ValueError("its parts are not of the same rows")
        return found


def calibration_error(kind: Kind, logits: Array, labels: Array, bins: int = 15) -> float | None:
    """Expected calibration error (Guo et al. 2017): mean |confidence − accuracy| over equal-width bins.

    Of the predicted class for single-label tasks, of every label's probability for multi-label ones;
    None for regression and spans.
    """
    if kind in ("regression", "span"):
        return None
    p = probabilities(kind, logits)
    if kind == "single_label":
        confidence, correct = p.max(axis=-1), p.argmax(axis=-1) == labels
    else:
        confidence, correct = p.ravel(), labels.ravel() == 1
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def agreement(kind: Kind, logits: Array, other: Array) -> float:
    """Share of equal predictions of two models; for regression Pearson's correlation."""
    mine, theirs = predictions(kind, logits), predictions(kind, other)
    if kind == "regression":
        return quality(kind, logits, theirs)["pearson"]
    same = mine == theirs
    return float((same.all(axis=1) if kind == "span" else same).mean())


def buckets(words: Array, edges: Sequence[int]) -> list[tuple[str, Array]]:
    """Group documents by length.

    Args:
        words: ``(n,)`` words in each document.
        edges: increasing; a document of ``e`` words is in the group that begins at ``e``.

    Returns:
        A name such as ``"100-199"`` and a boolean mask ``(n,)`` for each group that is not empty.
    """
    bounds = [0, *sorted(edges), None]
    result = []
    for low, high in itertools.pairwise(bounds):
        mask = (words >= low) & (True if high is None else words < high)
        if mask.any():
            result.append((f"{low}+" if high is None else f"{low}-{high - 1}", mask))
    return result


def measure(
    kind: Kind, metric: str, found: Predictions, edges: Sequence[int], truth: Array | None = None
) -> dict[str, Any]:
    """Compute everything that is reported of one model's predictions on rows with labels.

    Args:
        kind: the task's kind.
        metric: the one that is reported by document length.
        found: the predictions.
        edges: of the groups of documents.
        truth: what the metrics read, where it is more than the labels.

    Returns:
        The metrics of tasks.quality, ``ece`` and ``rows``, and under ``buckets`` a list of
        ``{"words", "rows", metric}`` by document length.
    """
    labels = found.labels if truth is None else truth
    result: dict[str, Any] = {"rows": len(labels), **quality(kind, found.logits, labels)}
    ece = calibration_error(kind, found.logits, found.labels)
    if ece is not None:
        result["ece"] = ece
    result["buckets"] = [
        {
            "words": name,
            "rows": int(mask.sum()),
            metric: quality(kind, found.logits[mask], labels[mask])[metric],
        }
        for name, mask in buckets(found.words, edges)
        if metric in quality(kind, found.logits[mask], labels[mask])
    ]
    return result
