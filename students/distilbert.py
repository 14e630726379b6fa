"""DistilBERT (Sanh et al. 2019): six layers, no segments, no pooler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill.padded import forward as forward
from distill.recipe import Student

if TYPE_CHECKING:
    from pathlib import Path

    from distill.tasks import TaskSpec

MODEL_TYPE = "distilbert"


class Config(Student):
    """DistilBERT's fields."""

    architecture: Literal["distilbert"]
    checkpoint: str | None = "distilbert/distilbert-base-uncased"
    """null: random weights, sized by ``config``, with the teacher's vocabulary."""


def positions(config: Any) -> int:
    """Return how many tokens a checkpoint reads."""
    return int(config.max_position_embeddings)


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build from the checkpoint, or from scratch."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    from distill import pretrained

    if config.checkpoint is not None:
        key = "student.checkpoint"
        found = pretrained.read_config(config.checkpoint, key, (MODEL_TYPE,))
        pretrained.check_length(config.max_length, positions(found), "student")
        return pretrained.from_checkpoint(
            DistilBertForSequenceClassification, config.checkpoint, key, task, **config.config
        )
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": max(512, config.max_length),
        **config.config,
    }
    return DistilBertForSequenceClassification(DistilBertConfig(**fields, num_labels=task.classes))
