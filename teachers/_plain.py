"""What BERT and RoBERTa share: load, lengthen, or build from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig

from distill import pretrained
from distill.schema import Teacher
from distill.tasks import TaskSpec


def build(
    config: Teacher,
    task: TaskSpec,
    tokenizer: Any,
    model_type: str,
    positions: Callable[[Any], int],
    reserved: Callable[[Any], int],
) -> Any:
    """Build a full-attention classifier.

    Args:
        config: the recipe's teacher.
        task: gives the head its width.
        tokenizer: gives the vocabulary's size where there is no checkpoint.
        model_type: transformers' name of the architecture.
        positions: tokens that a configuration reads.
        reserved: rows of the position table before the first token's.

    Raises:
        RecipeError: max_length is beyond the positions and ``lengthen`` is off.
    """
    if config.checkpoint is None:
        fields = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "num_labels": task.classes,
        }
        made = AutoConfig.for_model(model_type, **{**fields, **config.config})
        if "max_position_embeddings" not in config.config:
            made.max_position_embeddings = config.max_length + reserved(made)
        pretrained.check_length(config.max_length, positions(made), "teacher")
        return pretrained.head(task).from_config(made)
    key = "teacher.checkpoint"
    found = pretrained.read_config(config.checkpoint, key, (model_type,))
    return pretrained.classifier(
        config.checkpoint, key, task, found, config.max_length, first=reserved(found), lengthen=config.lengthen, **config.config
    )  # fmt: skip
