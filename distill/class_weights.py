"""How much each class counts in the hard loss, and in TF-IDF's fit. Knows no model.

The soft terms and the metrics are not weighed.

single_label  a row's cross-entropy counts as much as its class says
multi_label   a label's positive rows count as much as it says beside its negative ones (pos_weight)

``balanced`` gives every class the same weight altogether: rows / (classes · rows of the class), a mean of 1
over the rows (King and Zeng 2001); and negative / positive rows for each label of a multi-label task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from distill.errors import DataError, nearest
from distill.tasks import Array, TaskSpec


def check(wish: str | Mapping[str, float], names: Iterable[str]) -> None:
    """Refuse a weight for a label that does not exist.

    Raises:
        DataError: with the nearest label.
    """
    known = list(names)
    for name in wish if not isinstance(wish, str) else ():
        if name not in known:
            raise DataError(f"task.class_weights: no label {name!r}{nearest(name, known)}")


def compute(wish: str | Mapping[str, float], task: TaskSpec, labels: Array) -> tuple[float, ...] | None:
    """Compute the weights, in the order of the logits.

    Args:
        wish: the recipe's: none, balanced, or numbers by label.
        task: single_label or multi_label.
        labels: of the training rows, as in tasks.py.

    Returns:
        A weight for each class, 1 for one that has no rows (or, of a multi-label task, all rows); None
        where nothing is weighed.
    """
    if wish == "none":
        return None
    if not isinstance(wish, str):
        return tuple(float(wish.get(name, 1.0)) for name in task.labels)
    if task.kind == "multi_label":
        above = np.asarray(labels.sum(axis=0), dtype=np.float64)
        below = len(labels) - above
    else:
        above = np.bincount(labels, minlength=task.classes).astype(np.float64)
        below = np.full(task.classes, len(labels) / np.count_nonzero(above))
    weighed = (above > 0) & (below > 0)
    return tuple(np.where(weighed, below / np.where(weighed, above, 1.0), 1.0).tolist())
