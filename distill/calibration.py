"""One temperature that makes a classifier's probabilities honest, fitted on held-out rows. Knows no model.

Guo et al. 2017, section 4.2: logits are divided by the T that gives the labels the least negative
log-likelihood. No prediction changes, for T is the same for every class and row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill.errors import DataError
from distill.evaluation import calibration_error
from distill.tasks import Array, Kind, nll

BOUNDS = (0.05, 20.0)
"""Where T is looked for: rows that are all classified rightly would have it go to 0,
and logits that have nothing to do with the labels to infinity."""


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature, and what it does on the rows that it was fitted on."""

    temperature: float
    rows: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float

    def __str__(self) -> str:
        return (
            f"T = {self.temperature:.2f}, fitted on {self.rows:,} validation rows: NLL {self.nll_before:.3f} "
            f"→ {self.nll_after:.3f}, ECE {self.ece_before:.3f} → {self.ece_after:.3f}"
        )


def calibrate(kind: Kind, logits: Array, labels: Array) -> Calibration:
    """Fit the temperature.

    Args:
        kind: single_label (softmax) or multi_label (a sigmoid for each label, one T for all).
        logits: ``(n, classes)``.
        labels: as in tasks.py.

    Raises:
        DataError: no temperature within the bounds is best, as where every row is classified rightly.
    """
    from scipy.optimize import minimize_scalar

    def at(log_t: float) -> float:
        return nll(kind, logits / math.exp(log_t), labels)

    # The NLL is convex in 1/T, so that it has one minimum in log T too.
    low, high = (math.log(bound) for bound in BOUNDS)
    found = minimize_scalar(at, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    if min(at(low), at(high)) <= found.fun:
        why = "all are classified rightly" if at(low) <= at(high) else "the logits say nothing of them"
        raise DataError(
            f"student.calibrate: {len(labels):,} validation rows settle no temperature ({why}); "
            "take more of them, or leave the key out"
        )
    temperature = math.exp(found.x)
    before, after = (calibration_error(kind, logits / t, labels) for t in (1.0, temperature))
    assert before is not None, "a regression has no probabilities to calibrate"
    assert after is not None
    return Calibration(
        temperature, len(labels), nll(kind, logits, labels), nll(kind, logits / temperature, labels), before, after
    )  # fmt: skip
