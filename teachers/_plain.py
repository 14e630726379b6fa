"""What BERT and RoBERTa share: load, lengthen, or build from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from distill import pretrained
from distill.recipe import Teacher
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
        return AutoModelForSequenceClassification.from_config(made)
    key = "teacher.checkpoint"
    found = pretrained.read_config(config.checkpoint, key, (model_type,))
    longer = config.lengthen and config.max_length > positions(found)
    if not longer:
        pretrained.check_length(config.max_length, positions(found), "teacher", may_lengthen=True)
        return pretrained.from_checkpoint(
            AutoModelForSequenceClassification, config.checkpoint, key, task, **config.config
        )
    weights = pretrained.backbone_weights(config.checkpoint, key)
    first, table = reserved(found), "embeddings.position_embeddings.weight"
    weights[table] = torch.cat(
        [weights[table][:first], pretrained.tile(weights[table][first:], config.max_length)]
    )
    for field, value in {**config.config, "max_position_embeddings": len(weights[table])}.items():
        setattr(found, field, value)
    found.num_labels = task.classes
    model = AutoModelForSequenceClassification.from_config(found)
    own = set(model.base_model.state_dict())
    prefixed = {f"{model.base_model_prefix}.{name}": w for name, w in weights.items() if name in own}
    pretrained.fill(model, prefixed, config.checkpoint, key)
    return model
