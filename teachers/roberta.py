"""RoBERTa (Liu et al. 2019): full attention; its first positions are reserved for padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill.schema import Teacher

if TYPE_CHECKING:
    from pathlib import Path

    from distill.tasks import TaskSpec

MODEL_TYPE = "roberta"


class Config(Teacher):
    """RoBERTa's fields."""

    architecture: Literal["roberta"]
    attention: Literal["full"] = "full"


def reserved(config: Any) -> int:
    """Return how many position rows stand before that of the first token."""
    return int(config.pad_token_id) + 1


def positions(config: Any) -> int:
    """Return how many tokens a checkpoint reads."""
    return int(config.max_position_embeddings) - reserved(config)


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build the classifier from its checkpoint, with tiled positions, or from ``config``."""
    from distill.teachers import _plain

    return _plain.build(config, task, tokenizer, MODEL_TYPE, positions, reserved)
