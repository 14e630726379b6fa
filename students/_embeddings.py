"""A student from scratch whose embeddings are its teacher's, reduced to its width by SVD.

The teacher's tokenizer comes with them. Layers, norms and head are random; what norm the teacher's embeddings go
through is of another width, and is not carried over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill import pretrained
from distill.errors import RecipeError

SIZES = {
    "word_embeddings": "vocab_size",
    "position_embeddings": "max_position_embeddings",
    "token_type_embeddings": "type_vocab_size",
}
"""Of each table: the field of the configuration that is its count of rows."""


def build(kind: Any, made: Any, teacher: Path | None, max_length: int, lengthen: bool) -> Any:
    """Build a classifier with its teacher's embeddings.

    Args:
        kind: makes a BERT or DistilBERT with its head of a configuration.
        made: its configuration; the tables' sizes are set here.
        teacher: the teacher's model folder.
        max_length: tokens of the student's window.
        lengthen: tile the teacher's positions where they are fewer.

    Raises:
        RecipeError: there is no teacher, it has no such tables, it is narrower than the student, or its positions
            are fewer than max_length and ``lengthen`` is off.
    """
    key = "student.init: teacher_embeddings"
    if teacher is None:
        raise RecipeError(f"{key} needs a teacher")
    source = pretrained.backbone(str(teacher), "teacher")
    found = getattr(source, "embeddings", None)
    if not all(hasattr(found, name) for name in SIZES):
        raise RecipeError(f"{key}: a {source.config.model_type} has no {', '.join(SIZES)}; take another init")
    tables = {name: getattr(found, name).weight.detach() for name in SIZES}
    tables["position_embeddings"] = tables["position_embeddings"][getattr(found, "padding_idx", -1) + 1 :]
    width = tables["word_embeddings"].shape[1]
    if made.hidden_size > width:
        raise RecipeError(
            f"{key}: the student is {made.hidden_size} wide and the teacher {width}; a width can be reduced, "
            f"not enlarged: take a student of {width} or less"
        )
    tables = dict(zip(tables, pretrained.reduce(list(tables.values()), made.hidden_size), strict=True))
    positions = tables["position_embeddings"]
    if not lengthen:
        pretrained.check_length(max_length, len(positions), "student", may_lengthen=True)
    tables["position_embeddings"] = pretrained.tile(positions, max_length)
    if not hasattr(made, "type_vocab_size"):  # DistilBERT: every token is of the first segment
        tables["position_embeddings"] += tables.pop("token_type_embeddings")[0]
    for name, table in tables.items():
        setattr(made, SIZES[name], len(table))
    model = kind(made)
    with torch.no_grad():
        for name, table in tables.items():
            getattr(model.base_model.embeddings, name).weight.copy_(table)
    return model
