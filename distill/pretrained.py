"""Loading a checkpoint's weights into an architecture, and refusing what does not fit. Knows no recipe.

transformers fills missing weights with random numbers and says so in a log line; here that is an error,
unless they are the new classification head's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill import hub
from distill.errors import DataError, RecipeError
from distill.tasks import TaskSpec

HEAD = ("classifier", "pre_classifier", "pooler")
"""Modules that a checkpoint need not have: they are trained from scratch with the task."""


def read_config(checkpoint: str, key: str, model_types: tuple[str, ...]) -> Any:
    """Read a checkpoint's transformers configuration.

    Raises:
        RecipeError: it is of none of these model types.
        HubError: it is neither here nor reachable.
        DataError: it cannot be read.
    """
    from transformers import AutoConfig

    where = hub.checkpoint(checkpoint, key)
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: {checkpoint}: {str(error).splitlines()[0][:200]}") from None
    if config.model_type not in model_types:
        raise RecipeError(
            f"{key}: {checkpoint} is a {config.model_type} model, and {' or '.join(model_types)} is needed"
        )
    return config


def check_length(max_length: int, positions: int, section: str, *, may_lengthen: bool = False) -> None:
    """Refuse a window that is longer than the model's positions.

    Raises:
        RecipeError: with the two numbers and what to change.
    """
    if max_length > positions:
        fix = f"set {section}.max_length={positions}" + (
            f" or {section}.lengthen=true" if may_lengthen else ""
        )
        raise RecipeError(
            f"{section}.max_length is {max_length:,}, and the checkpoint has {positions:,} positions; {fix}"
        )


def from_checkpoint(auto: Any, checkpoint: str, key: str, task: TaskSpec, **changes: Any) -> Any:
    """Load a classifier with a checkpoint's weights and a head of the task's width.

    Args:
        auto: a transformers class with ``from_pretrained``.
        checkpoint: a folder, hub id or package address.
        key: the recipe key that named it.
        task: gives the head its width.
        changes: fields of the configuration to set.

    Raises:
        DataError: weights beside the head's are missing.
    """
    from safetensors import SafetensorError

    where = hub.checkpoint(checkpoint, key)
    try:
        model, info = auto.from_pretrained(
            where, num_labels=task.classes, ignore_mismatched_sizes=True, output_loading_info=True, **changes
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{key}: {checkpoint}: {str(error).splitlines()[0][:200]}") from None
    refuse_missing(info["missing_keys"], checkpoint, key)
    return model


def refuse_missing(missing: Any, checkpoint: str, key: str) -> None:
    """Raise DataError when weights beside the head's are missing."""
    lost = sorted(name for name in missing if not any(part in HEAD for part in name.split(".")))
    if lost:
        raise DataError(f"{key}: {checkpoint} lacks {len(lost)} of the model's weights, {lost[0]} among them")


def fill(model: Any, weights: Mapping[str, Tensor], checkpoint: str, key: str) -> None:
    """Copy weights into a model that was built from a configuration.

    Raises:
        DataError: weights beside the head's are missing, or are not the model's.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    refuse_missing(missing, checkpoint, key)
    assert not unexpected, f"weights without a place: {unexpected[:3]}"


def backbone_weights(checkpoint: str, key: str) -> dict[str, Tensor]:
    """Read an encoder's weights, by their names inside the encoder (no ``bert.`` before them).

    Raises:
        DataError: they cannot be read, or some beside the pooler's are missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(hub.checkpoint(checkpoint, key), output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{key}: {checkpoint}: {str(error).splitlines()[0][:200]}") from None
    refuse_missing(info["missing_keys"], checkpoint, key)
    return dict(model.state_dict())


def tile(positions: Tensor, length: int) -> Tensor:
    """Repeat learnt positions ``(old, width)`` to ``(length, width)`` (Beltagy et al. 2020, section 5)."""
    repeats = -(-length // len(positions))
    return positions.repeat(repeats, 1)[:length].clone()
