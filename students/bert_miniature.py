"""The 24 BERT miniatures (Turc et al. 2019): 2 to 12 layers of width 128 to 768, full attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill.recipe import Student

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


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build from the checkpoint, or from scratch."""
    from transformers import BertConfig, BertForSequenceClassification

    from distill import pretrained
    from distill.errors import RecipeError

    if config.checkpoint is not None:
        key = "student.checkpoint"
        found = pretrained.read_config(config.checkpoint, key, ("bert",))
        if (found.num_hidden_layers, found.hidden_size) != (config.layers, config.width):
            raise RecipeError(
                f"{key}: {config.checkpoint} has {found.num_hidden_layers} layers of width {found.hidden_size}, "
                f"and the recipe says {config.layers} of {config.width}"
            )
        pretrained.check_length(config.max_length, found.max_position_embeddings, "student")
        return pretrained.from_checkpoint(
            BertForSequenceClassification, config.checkpoint, key, task, **config.config
        )
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.width // 64,
        "intermediate_size": 4 * config.width,
        "max_position_embeddings": max(512, config.max_length),
    }
    return BertForSequenceClassification(BertConfig(**{**fields, **config.config}, num_labels=task.classes))
