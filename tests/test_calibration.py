"""The fitted temperature: against a search of its own, and what it does to targets."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from distill.calibration import Calibration, calibrate
from distill.errors import DataError
from distill.tasks import Kind, predictions


def overconfident(kind: Kind, by: float, rows: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are ``by`` times too large for labels that were drawn from the right ones."""
    rng = np.random.default_rng(0)
    honest = 1.5 * rng.normal(size=(rows, 4))
    if kind == "multi_label":
        return by * honest, (rng.random((rows, 4)) < special.expit(honest)).astype(np.float32)
    drawn = (special.softmax(honest, axis=1).cumsum(1) < rng.random((rows, 1))).sum(1)
    return by * honest, np.minimum(drawn, 3)


def likelihood(kind: Kind, logits: np.ndarray, labels: np.ndarray) -> float:
    if kind == "single_label":
        return float(-special.log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())
    return float(-(labels * special.log_expit(logits) + (1 - labels) * special.log_expit(-logits)).mean())


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
@pytest.mark.parametrize("by", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_one_of_least_nll_and_undoes_what_was_done(kind: Kind, by: float) -> None:
    logits, labels = overconfident(kind, by)
    found = calibrate(kind, logits, labels)
    assert found.temperature == pytest.approx(by, rel=0.1)
    grid = np.exp(np.linspace(np.log(0.06), np.log(19), 1000))
    nlls = [likelihood(kind, logits / t, labels) for t in grid]
    assert found.temperature == pytest.approx(grid[int(np.argmin(nlls))], rel=6e-3)
    assert found.nll_before == pytest.approx(likelihood(kind, logits, labels))
    assert found.nll_after == pytest.approx(min(nlls), abs=1e-5)
    assert found.rows == 2000
    if by != 1.0:
        assert found.ece_after < found.ece_before / 2
    np.testing.assert_array_equal(predictions(kind, logits / found.temperature), predictions(kind, logits))


def test_rows_that_settle_no_temperature_are_refused_with_the_reason() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50)
    right, noise = 5.0 * np.eye(3)[labels], 50 * rng.normal(size=(50, 3))
    with pytest.raises(
        DataError, match=r"50 validation rows settle no temperature \(all are classified rightly"
    ):
        calibrate("single_label", right, labels)
    with pytest.raises(DataError, match="the logits say nothing of them"):
        calibrate("single_label", noise, noise.argmin(1))


def test_it_is_told_in_one_sentence() -> None:
    told = str(Calibration(1.8349, 2000, 0.5, 0.41, 0.1, 0.021))
    assert told == "T = 1.83, fitted on 2,000 validation rows: NLL 0.500 → 0.410, ECE 0.100 → 0.021"
