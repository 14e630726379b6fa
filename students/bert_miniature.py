"""The 24 BERT miniatures (Turc et al. 2019): 2 to 12 layers of width 128 to 768, full attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from distill.schema import Student

if TYPE_CHECKING:
    from pathlib import Path

    from distill.tasks import TaskSpec

NAMED = {"bert_tiny": (2, 128), "bert_mini": (4, 256), "bert_small": (4, 512), "bert_medium": (8, 512)}
SIZES = [(layers, width) for layers in (2, 4, 6, 8, 10, 12) for width in (128, 256, 512, 768)]


def _hub_id(layers: int, width: int) -> str:
    return f"google/bert_uncased_L-{layers}_H-{width}_A-{width // 64}"


def _keys(layers: int, width: int) -> dict[str, Any]:
    return {"layers": layers, "width": width, "checkpoint": _hub_id(layers, width)}


PRESETS = {
    **{name: _keys(*size) for name, size in NAMED.items()},
    **{f"bert_L{layers}_H{width}": _keys(layers, width) for layers, width in SIZES},
}


class Config(Student):
    """The miniatures' fields."""

    architecture: Literal["bert_miniature"]
    layers: Literal[2, 4, 6, 8, 10, 12] = 2
    width: Literal[128, 256, 512, 768] = 128
    checkpoint: str | None = _hub_id(2, 128)
    """null: random weights of this size, with the teacher's vocabulary."""
    lengthen: bool = False
    """Make the positions reach max_length by tiling them (Beltagy et al. 2020, section 5)."""
    init: Literal["checkpoint", "teacher_embeddings"] = "checkpoint"
    """teacher_embeddings: random weights but for the teacher's embeddings, reduced to this width."""

    @model_validator(mode="after")
    def _one_beginning(self) -> Config:
        if self.init == "teacher_embeddings" and (self.checkpoint or self.tokenizer):
            raise ValueError(
                "init: teacher_embeddings takes the embeddings and the tokenizer from the teacher; "
                "set student.checkpoint=null, and no tokenizer"
            )
        return self


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build from the checkpoint, or from scratch."""
    from transformers import BertConfig

    from distill import pretrained
    from distill.errors import RecipeError
    from distill.students import _embeddings

    if config.checkpoint is not None:
        key = "student.checkpoint"
        found = pretrained.read_config(config.checkpoint, key, ("bert",))
        if (found.num_hidden_layers, found.hidden_size) != (config.layers, config.width):
            raise RecipeError(
                f"{key}: {config.checkpoint} has {found.num_hidden_layers} layers of width {found.hidden_size}, "
                f"and the recipe says {config.layers} of {config.width}"
            )
        return pretrained.classifier(
            config.checkpoint, key, task, found, config.max_length, first=0, lengthen=config.lengthen, **config.config
        )  # fmt: skip
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.width // 64,
        "intermediate_size": 4 * config.width,
        "max_position_embeddings": max(512, config.max_length),
    }
    made = BertConfig(**{**fields, **config.config}, num_labels=task.classes)
    if config.init == "teacher_embeddings":
        return _embeddings.build(
            pretrained.head(task).from_config, made, teacher, config.max_length, config.lengthen
        )
    return pretrained.head(task).from_config(made)
