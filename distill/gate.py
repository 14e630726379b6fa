"""The gate: what must hold of a teacher and its logits before they are cached for students to learn from.

Reads logits and says yes or no; knows nothing of how they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import LogitsError
from distill.logits import Logits
from distill.tasks import Array, Floats, Kind, quality

if TYPE_CHECKING:
    from distill.encoding import Encoded
    from distill.models import Classifier

ROWS = 16
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
"""How far a logit may move, relative to max(1, |logit|), when its document stands in another batch."""
ROUNDING = {"float32": 0.0, "float16": 1e-3}
"""How far writing it down may move it, relative likewise."""


def check_kind(found: Kind, wanted: Kind, who: str) -> None:
    """Raise LogitsError when one of teacher and task finds spans, and the other does not."""
    if (found == "span") != (wanted == "span"):
        raise LogitsError(
            f"{who} is of task.kind: {found}, and the recipe of task.kind: {wanted}; take another teacher"
        )


def check_labels(found: Sequence[str], wanted: Sequence[str], who: str) -> str | None:
    """Compare a teacher's label order with the task's.

    Returns:
        A sentence to tell when the teacher has only numbers for names.

    Raises:
        LogitsError: other labels, or the same ones in another order.
    """
    if list(found) == list(wanted):
        return None
    if len(found) == len(wanted) and all(name == f"LABEL_{i}" for i, name in enumerate(found)):
        return f"{who} names no labels; its class numbers are taken to be {', '.join(wanted)}"
    what = "the same labels in another order" if sorted(found) == sorted(wanted) else "other labels"
    raise LogitsError(
        f"{who} has {what}: {', '.join(found)} there, {', '.join(wanted)} in the data; "
        f"set task.labels=[{', '.join(found)}] if the data agrees with it"
    )


def check_invariance(
    folder: Path, key: dict[str, Any], model: Classifier, data: Encoded, seed: int = 0
) -> float:
    """Recompute a few random rows alone and in another batch, and compare them with the cache.

    Returns:
        The largest difference, relative to max(1, |logit|).

    Raises:
        LogitsError: a document's logits depend on its batch.
    """
    from distill.inference import predict

    rng = np.random.default_rng(seed)
    rows = rng.choice(len(data), size=min(ROWS, len(data)), replace=False)
    cached = Logits(folder, key, verify=False)(data.row_id[rows])
    worst, allowed = 0.0, TOLERANCE[key["precision"]] + ROUNDING[key["dtype"]]
    everyone = np.arange(len(rows))
    for company in (everyone, *everyone[:, None]):  # together, then each alone
        again = predict(model, data, rows[company], 1 << 14, key["precision"])
        before = cached[company, : again.shape[1]]  # one document may have fewer units than all
        gaps = (np.abs(again - before) / np.maximum(1, np.abs(before))).reshape(len(company), -1).max(axis=1)
        worst = max(worst, float(gaps.max()))
        if not gaps.max() <= allowed:
            row = data.row_id[rows[company][gaps.argmax()]]
            raise LogitsError(
                f"{folder.name}: row {row} has other logits in another batch (by {gaps.max():.3g} of {allowed:.3g} allowed); "
                "this teacher cannot be cached"
            )
    return worst


def check_quality(
    kind: Kind, logits: Floats, labels: Array, metric: str, evaluated: float | None, who: str
) -> float:
    """Compare the quality of cached validation logits with what the teacher's own run had measured.

    Returns:
        The metric on the cached logits.

    Raises:
        LogitsError: it differs by more than a point and more than two rows' worth (of few rows, one whose
            logits round to the other side is more than a point), or (for a teacher that was not trained
            here) it is no better than always guessing the most frequent class.
    """
    found = quality(kind, logits, labels)[metric]
    allowed = None if evaluated is None else max(0.01, 2 / len(labels)) * max(1.0, abs(evaluated))
    if evaluated is not None and allowed is not None and not abs(found - evaluated) <= allowed:
        raise LogitsError(
            f"{who}: {metric} of the cached validation logits is {found:.3f}, and {evaluated:.3f} was measured when it was trained; "
            "the data or the model has changed since"
        )
    if evaluated is None and kind == "single_label":
        accuracy = quality(kind, logits, labels)["accuracy"]
        guess = float(np.bincount(labels).max() / len(labels))
        if accuracy < guess - 0.05:
            raise LogitsError(
                f"{who}: its accuracy on validation is {accuracy:.3f}, worse than guessing ({guess:.3f}); is the label order swapped?"
            )
    return found
