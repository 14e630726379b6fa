"""BERT (Devlin et al. 2019): full attention over at most its checkpoint's positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill.schema import Teacher

if TYPE_CHECKING:
    from pathlib import Path

    from distill.tasks import TaskSpec

MODEL_TYPE = "bert"


class Config(Teacher):
    """BERT's fields."""

    architecture: Literal["bert"]
    attention: Literal["full"] = "full"


def positions(config: Any) -> int:
    """Return how many tokens a checkpoint reads."""
    return int(config.max_position_embeddings)


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build the classifier from its checkpoint, with tiled positions, or from ``config``."""
    from distill.teachers import _plain

    return _plain.build(config, task, tokenizer, MODEL_TYPE, positions, reserved=lambda _: 0)
