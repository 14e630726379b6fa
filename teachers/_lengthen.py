"""A BERT or RoBERTa checkpoint made ready for a longer model (Beltagy et al. 2020, section 5).

The positions are tiled; everything else is carried over. The result was never trained beyond the old
length, so it must be fine-tuned before it reads there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill import pretrained
from distill.errors import RecipeError
from distill.schema import Teacher

SHORT_TYPES = ("bert", "roberta")
_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "hidden_dropout_prob attention_probs_dropout_prob type_vocab_size initializer_range layer_norm_eps "
    "pad_token_id bos_token_id eos_token_id"
).split()


@dataclass(frozen=True)
class Encoder:
    """What a longer model is made of."""

    fields: dict[str, Any]
    """Fields of the configuration that both models share."""
    weights: dict[str, Tensor]
    """By their names inside the encoder; without positions."""
    positions: Tensor
    """``(length, width)``, that of the first token first."""
    length: int


def encoder(config: Teacher, found: Any) -> Encoder:
    """Read a checkpoint and tile its positions to ``config.max_length``.

    Raises:
        RecipeError: ``lengthen`` is off.
    """
    assert config.checkpoint is not None
    if not config.lengthen:
        raise RecipeError(
            f"teacher.checkpoint: {config.checkpoint} is a {found.model_type} model of "
            f"{found.max_position_embeddings} positions; set teacher.lengthen=true to make a {config.architecture} of it"
        )
    weights = pretrained.backbone_weights(config.checkpoint, "teacher.checkpoint")
    table = weights.pop("embeddings.position_embeddings.weight")
    weights = {
        name: w for name, w in weights.items() if not name.endswith(("position_ids", "token_type_ids"))
    }
    # RoBERTa and Longformer keep the rows up to and with the padding's for padding.
    first = 0 if found.model_type in ("bert", "big_bird") else int(found.pad_token_id) + 1
    learnt = table[first:]
    length = max(config.max_length, len(learnt))
    fields = {name: getattr(found, name) for name in _FIELDS if hasattr(found, name)}
    return Encoder(fields, weights, pretrained.tile(learnt, length), length)
