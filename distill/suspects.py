"""Training labels that the teacher does not believe, for a person to look at. Knows no model.

Labels are ranked by the teacher's probability of them (self-confidence in Northcutt et al. 2021). The teacher
has been trained on these very labels and may have learned some of the wrong ones by heart: what it doubts
is worth a look, and what it does not doubt is not thereby right.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distill.data import Rows
from distill.tasks import Array, TaskSpec, predictions, probabilities

MOST = 20
"""Labels that are listed."""
DOUBTED = 0.1
"""A label of less probability than this looks wrong."""
HEAD = 200
"""Characters of a text that are listed."""


def find(task: TaskSpec, logits: Array, rows: Rows) -> dict[str, Any]:
    """List the labels that the teacher contradicts, the least probable first.

    Args:
        task: single_label or multi_label; of the latter each label of a row is judged for itself.
        logits: the teacher's ``(n, classes)``, as the student's targets are.
        rows: the labelled split.

    Returns:
        What ``suspects.json`` holds: how many ``labels`` there are, how many of them the teacher contradicts
        (``contradicted``) and how many of these are less probable than ``below`` (``doubted``), and under
        ``suspects`` up to 20 of ``{"row_id", "label", "teacher", "p_label", "p_teacher", "text"}``. For
        multi_label ``name`` is the label's, and ``label`` and ``teacher`` are true or false.
    """
    assert rows.labels is not None, "a labelled split"
    says = predictions(task.kind, logits)
    if task.kind == "single_label":
        row, column = np.arange(len(rows)), rows.labels
        p_label = probabilities(task.kind, logits)[row, column]
    else:
        row, column = (at.ravel() for at in np.indices(logits.shape))
        p_label = probabilities(task.kind, np.where(rows.labels == 1, logits, -logits)).ravel()
    against = np.flatnonzero((says != rows.labels).ravel())
    worst = against[np.argsort(p_label[against], kind="stable")][:MOST]
    texts = rows.texts(row[worst])
    suspects = []
    for at, (text, pair) in zip(worst, texts, strict=True):
        here = int(row[at])
        found: dict[str, Any] = {"row_id": int(rows.row_id[here])}
        if task.kind == "single_label":
            found |= {"label": task.labels[column[at]], "teacher": task.labels[says[here]]}
            p_teacher = probabilities(task.kind, logits[here : here + 1])[0, says[here]]
        else:
            given = bool(rows.labels[here, column[at]])
            found |= {"name": task.labels[column[at]], "label": given, "teacher": not given}
            p_teacher = 1 - p_label[at]
        found |= {"p_label": float(p_label[at]), "p_teacher": float(p_teacher), "text": text[:HEAD]}
        suspects.append(found if pair is None else found | {"text_pair": pair[:HEAD]})
    return {
        "split": rows.name, "labels": len(p_label), "contradicted": len(against), "doubted": int((p_label[against] < DOUBTED).sum()),
        "below": DOUBTED, "suspects": suspects,
    }  # fmt: skip


def sentence(found: dict[str, Any], where: object) -> str:
    """Say how many labels look wrong, and where they are listed."""
    return (
        f"{found['doubted']:,} of {found['labels']:,} training labels look wrong to the teacher "
        f"(p < {found['below']}; it contradicts {found['contradicted']:,}): {where}"
    )
