"""Row ids, many at once, in little memory: NumPy's own set functions take some eighty bytes for each."""

from __future__ import annotations

import numpy as np

from distill.tasks import Array

AT_ONCE = 1 << 16


def among(ids: Array, known: Array) -> Array:
    """Say which of the ids ``(n,)`` are known.

    Args:
        ids: in any order.
        known: sorted.

    Returns:
        ``(n,)`` bool.
    """
    result = np.zeros(len(ids), bool)
    for start in range(0, len(ids) if len(known) else 0, AT_ONCE):
        part = ids[start : start + AT_ONCE]
        at = np.minimum(np.searchsorted(known, part), len(known) - 1)
        result[start : start + AT_ONCE] = known[at] == part
    return result


def merge(known: Array, ids: Array) -> Array:
    """Put ids together, sorted; those that stand in both stand twice."""
    both = np.concatenate([known, ids])
    both.sort()
    return both
