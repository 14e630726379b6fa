"""BigBird (Zaheer et al. 2020): window, global and random blocks of keys.

transformers' model turns to full attention for good once it sees a batch that is short, so that a
document's logits depend on what came before. Here the kind of attention is a function of the document
alone: block-sparse where it is longer than all its attended blocks together, full elsewhere. A sparse
document is laid on its own grid of blocks, the last of which is global: documents of as many blocks share
a forward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distill.recipe import Teacher

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distill.batching import Batch
    from distill.tasks import TaskSpec

MODEL_TYPE = "big_bird"


class Config(Teacher):
    """BigBird's fields."""

    architecture: Literal["bigbird"]
    attention: Literal["block_sparse", "full"] = "block_sparse"
    block_size: int = Field(default=64, ge=4)
    random_blocks: int = Field(default=3, ge=1)
    """Random blocks of keys for each block of queries; in evaluation the stock model has none of its own."""


def positions(config: Any) -> int:
    """Return how many tokens a checkpoint reads."""
    return int(config.max_position_embeddings)


def longest_full(config: Config) -> int:
    """Return the length in tokens up to which a document is read with full attention."""
    return (5 + 2 * config.random_blocks) * config.block_size


def bucket(model: Any, config: Config, length: int) -> int:
    """Return the width in tokens of a sparse document's grid of blocks, 0 for full attention."""
    if config.attention == "full" or length <= longest_full(config):
        return 0
    return -(-length // config.block_size) * config.block_size


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build from a BigBird checkpoint, from a BERT or RoBERTa one made long, or from ``config``."""
    model = _build(config, task, tokenizer)
    # The head does not read the pooler: without gradients for it, several processes would wait for them.
    model.bert.pooler.requires_grad_(False)
    return model


def _build(config: Config, task: TaskSpec, tokenizer: Any) -> Any:
    from transformers import BigBirdConfig, BigBirdForSequenceClassification

    from distill import pretrained
    from distill.teachers import _lengthen

    key = "teacher.checkpoint"
    fields = {
        "attention_type": "block_sparse" if config.attention == "block_sparse" else "original_full",
        "block_size": config.block_size,
        "num_random_blocks": config.random_blocks,
        **config.config,
    }
    if config.checkpoint is None:
        base = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "max_position_embeddings": config.max_length,
        }
        made = BigBirdConfig(**{**base, **fields}, num_labels=task.classes)
        pretrained.check_length(config.max_length, positions(made), "teacher")
        return BigBirdForSequenceClassification(made)
    found = pretrained.read_config(config.checkpoint, key, (MODEL_TYPE, *_lengthen.SHORT_TYPES))
    if found.model_type == MODEL_TYPE and (not config.lengthen or config.max_length <= positions(found)):
        pretrained.check_length(config.max_length, positions(found), "teacher", may_lengthen=True)
        return pretrained.from_checkpoint(
            BigBirdForSequenceClassification, config.checkpoint, key, task, **fields
        )
    encoder = _lengthen.encoder(config, found)
    weights = {f"bert.{name.replace('pooler.dense', 'pooler')}": w for name, w in encoder.weights.items()}
    made = BigBirdConfig(
        **{
            **encoder.fields,
            "rescale_embeddings": False,
            "max_position_embeddings": encoder.length,
            **fields,
        },
        num_labels=task.classes,
    )
    weights["bert.embeddings.position_embeddings.weight"] = encoder.positions
    model = BigBirdForSequenceClassification(made)
    pretrained.fill(model, weights, config.checkpoint, key)
    return model


def forward(model: Any, config: Config, batch: Batch) -> Tensor:
    """Run the classifier, once for each grid; logits ``(windows, classes)``."""
    import numpy as np
    import torch

    lengths = batch.windows.diff().tolist()
    grids = [bucket(model, config, length) for length in lengths]
    result: list[Tensor] = []
    order: list[int] = []
    # The stock plan of random blocks seeds NumPy's global generator with the layer's number.
    state = np.random.get_state()
    for grid in sorted(set(grids)):
        members = [at for at, g in enumerate(grids) if g == grid]
        result.append(_one_grid(model, config, _select(batch, members), grid))
        order += members
    np.random.set_state(state)
    back = torch.empty(len(order), dtype=torch.long, device=result[0].device)
    back[torch.tensor(order, device=back.device)] = torch.arange(len(order), device=back.device)
    return torch.cat(result)[back]


def _select(batch: Batch, members: list[int]) -> Batch:
    """Take some windows out of a batch."""
    import torch

    spans = [slice(int(batch.windows[at]), int(batch.windows[at + 1])) for at in members]
    lengths = batch.windows.diff()[members]
    return replace(
        batch,
        token_ids=torch.cat([batch.token_ids[span] for span in spans]),
        segments=torch.cat([batch.segments[span] for span in spans]),
        windows=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
    )


def _one_grid(model: Any, config: Config, batch: Batch, grid: int) -> Tensor:
    from distill import padded

    for layer in model.bert.encoder.layer:
        if not layer.attention._forward_pre_hooks:
            layer.attention.register_forward_pre_hook(_take_kind, with_kwargs=True)
    # Says which masks the encoder makes; each layer then follows the masks that it is given.
    model.bert.attention_type = "block_sparse" if grid else "original_full"
    logits: Tensor = model(**padded.inputs(model, batch, grid or None)).logits
    return logits


def _take_kind(attention: Any, _: Any, arguments: dict[str, Any]) -> None:
    """Make a layer's attention of the kind whose masks it is given.

    Not once for each forward pass: gradient checkpointing calls the layers again later, when the last
    pass may have been of the other kind.
    """
    import torch

    from distill.teachers._bigbird_attention import FullAttention, SparseAttention

    sparse = arguments.get("band_mask") is not None
    # On the meta device the layers that transformers makes anew, only to put the old weights into them,
    # cost neither time nor random numbers.
    with torch.device("meta"):
        attention.set_attention_type("block_sparse" if sparse else "original_full")
    ours = SparseAttention if sparse else FullAttention
    if not isinstance(attention.self, ours):
        attention.self = ours(attention.self)
