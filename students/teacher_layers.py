"""The teacher's own embeddings with a chosen few of its layers, as DistilBERT was made (Sanh et al. 2019).

The student is the full-attention sibling of its teacher (BERT of a BigBird, RoBERTa of a Longformer): its
window is short, and the long-context attention has no use there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.errors import RecipeError
from distill.schema import Student

if TYPE_CHECKING:
    from pathlib import Path

    from distill.tasks import TaskSpec

SIBLINGS = {"bert": "bert", "big_bird": "bert", "roberta": "roberta", "longformer": "roberta"}


class Config(Student):
    """The fields of a student that is cut out of its teacher."""

    architecture: Literal["teacher_layers"]
    layers: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1], min_length=1)
    """Which of the teacher's layers, counted from 0 at the bottom, in the student's order."""

    @model_validator(mode="after")
    def _from_the_teacher(self) -> Config:
        if self.checkpoint or self.tokenizer:
            raise ValueError(
                "teacher_layers takes weights and tokenizer from its teacher: no checkpoint, no tokenizer"
            )
        return self


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build the sibling and copy the teacher's weights into it; the head is new."""
    from transformers import AutoConfig

    from distill import pretrained

    if teacher is None:
        raise RecipeError(
            "student.architecture: teacher_layers needs a teacher of the families " + ", ".join(SIBLINGS)
        )
    source = pretrained.backbone(str(teacher), "teacher")
    found = source.config
    if found.model_type not in SIBLINGS:
        raise RecipeError(
            f"student.architecture: teacher_layers cannot cut a {found.model_type}; use {', '.join(SIBLINGS)}"
        )
    if max(config.layers) >= found.num_hidden_layers:
        raise RecipeError(
            f"student.layers: {max(config.layers)} is out of range; the teacher has layers 0 to {found.num_hidden_layers - 1}"
        )
    kind = SIBLINGS[found.model_type]
    first = 0 if kind == "bert" else int(found.pad_token_id) + 1
    weights = dict(source.state_dict())
    table = "embeddings.position_embeddings.weight"
    pretrained.check_length(config.max_length, len(weights[table]) - first, "student")
    weights[table] = weights[table][: first + config.max_length].clone()
    names = (
        "vocab_size hidden_size num_attention_heads intermediate_size hidden_act hidden_dropout_prob "
        "attention_probs_dropout_prob type_vocab_size layer_norm_eps pad_token_id"
    ).split()
    fields = {name: getattr(found, name) for name in names} | {
        "num_hidden_layers": len(config.layers),
        "max_position_embeddings": len(weights[table]),
        **config.config,
    }
    model = pretrained.head(task).from_config(AutoConfig.for_model(kind, **fields, num_labels=task.classes))
    own = set(model.state_dict())
    picked = {}
    for at, layer in enumerate(config.layers):
        for name, weight in weights.items():
            if name.startswith(f"encoder.layer.{layer}."):
                picked[re.sub(r"layer\.\d+", f"layer.{at}", name, count=1)] = weight
    picked |= {n: w for n, w in weights.items() if n.startswith("embeddings.")}
    pooler = {"weight": weights.get("pooler.weight"), "bias": weights.get("pooler.bias")}
    picked |= {f"pooler.dense.{n}": w for n, w in pooler.items() if w is not None}
    picked |= {n: w for n, w in weights.items() if n.startswith("pooler.dense.")}
    named = {f"{model.base_model_prefix}.{n}": w for n, w in picked.items()}
    pretrained.fill(model, {n: w for n, w in named.items() if n in own}, str(teacher), "teacher")
    return model
