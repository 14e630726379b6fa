"""BigBird (Zaheer et al. 2020): window, global and random blocks of keys.

transformers' model turns to full attention for good once it sees a batch that is short, so that a
document's logits depend on what came before. Here the kind of attention is a function of the document
alone: block-sparse where it is longer than all its attended blocks together, full elsewhere. A sparse
document is laid on its own grid of blocks, the last of which is global.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distill.schema import Teacher

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from distill.batching import Batch, Padding
    from distill.packed import Taps
    from distill.rules import Blocks
    from distill.tasks import TaskSpec

MODEL_TYPE = "big_bird"


class Config(Teacher):
    """BigBird's fields."""

    architecture: Literal["bigbird"]
    attention: Literal["block_sparse", "full"] = "block_sparse"
    block_size: int = Field(default=64, ge=4)
    random_blocks: int = Field(default=3, ge=0)
    """Random blocks of keys for each block of queries."""
    random_plan: Literal["stock", "fixed"] = "stock"
    """stock: in evaluation all of them are the first block, as in transformers; fixed: the same in both."""
    global_blocks: int = Field(default=1, ge=1)
    """Blocks at the beginning that see all and are seen by all, beside the last one; stock has 1."""
    grid: Literal["document", "max_length"] = "document"
    """max_length: as if each document were padded to it, which the published recipes do; never full then."""


def positions(config: Any) -> int:
    """Return how many tokens a checkpoint reads."""
    return int(config.max_position_embeddings)


def longest_full(config: Any) -> int:
    """Return the length in tokens up to which stock reads a document with full attention."""
    return int((5 + 2 * config.num_random_blocks) * config.block_size)


def keys(model: Any, config: Config, length: int) -> int:
    """Return how many keys a token of a window sees: its block, those beside it, global and random ones."""
    if not grid(model, config, length):
        return length
    blocks = 3 + config.global_blocks + 1 + config.random_blocks
    return min(length, blocks * int(model.config.block_size))


def grid(model: Any, config: Config, length: int) -> int:
    """Return how many blocks a document's grid has, 0 where it is read with full attention."""
    settings = model.config
    if settings.attention_type == "original_full":
        return 0
    if config.grid == "max_length":
        return -(-config.max_length // int(settings.block_size))
    return 0 if length <= longest_full(settings) else -(-length // int(settings.block_size))


def padding(model: Any, config: Config) -> Padding | None:
    """Say how the stock forward pads: to a document's grid, to any width where it has none."""
    if config.engine == "packed":
        return None
    return lambda length: grid(model, config, length) * int(model.config.block_size)


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build from a BigBird checkpoint, from a BERT or RoBERTa one made long, or from ``config``."""
    model = _build(config, task, tokenizer)
    freeze_unread(model)
    return model


def freeze_unread(model: Any) -> None:
    """Leave the pooler out of training: the head does not read it, and several processes would wait for gradients."""
    if model.bert.pooler is not None:
        model.bert.pooler.requires_grad_(False)


def _build(config: Config, task: TaskSpec, tokenizer: Any) -> Any:
    from transformers import BigBirdConfig

    from distill import pretrained
    from distill.teachers import _lengthen

    key = "teacher.checkpoint"
    # transformers finds by the separator where a question ends.
    separator = {"sep_token_id": tokenizer.sep_token_id} if task.kind == "span" else {}
    fields = {
        **separator,
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
        return pretrained.head(task).from_config(made)
    found = pretrained.read_config(config.checkpoint, key, (MODEL_TYPE, *_lengthen.SHORT_TYPES))
    if found.model_type == MODEL_TYPE and (not config.lengthen or config.max_length <= positions(found)):
        pretrained.check_length(config.max_length, positions(found), "teacher", may_lengthen=True)
        return pretrained.from_checkpoint(pretrained.head(task), config.checkpoint, key, task, **fields)
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
    model = pretrained.head(task).from_config(made)
    own = set(model.state_dict())  # a model that finds spans has no pooler
    pretrained.fill(model, {n: w for n, w in weights.items() if n in own}, config.checkpoint, key)
    return model


def forward(model: Any, config: Config, batch: Batch, taps: Taps | None = None) -> Tensor:
    """Run the classifier; logits ``(windows, classes)``."""
    from functools import cache

    from distill import packed, rules

    device = batch.token_ids.device

    @cache
    def rule(layer: int) -> rules.BlockSparse:
        def plan(length: int) -> Blocks | None:
            count = grid(model, config, length)
            return _plan(model, config, layer, count, device) if count else None

        return rules.BlockSparse(plan, int(model.config.block_size))

    # Without random blocks all layers see the same.
    drawn = _draws(model, config)
    return packed.bert_forward(model, batch, lambda layer: rule(layer if drawn else 0), taps=taps)


def _draws(model: Any, config: Config) -> bool:
    """Say whether the plan has random blocks: in evaluation stock has none, but counts the first block more."""
    return bool(model.config.num_random_blocks) and (model.training or config.random_plan == "fixed")


def _plan(model: Any, config: Config, layer: int, count: int, device: torch.device) -> Blocks:
    """Say which blocks a layer's middle blocks see on a grid of ``count`` blocks."""
    import torch

    from distill.rules import Blocks
    from distill.teachers import _bigbird_plan

    settings = model.config
    size, random, first = int(settings.block_size), int(settings.num_random_blocks), config.global_blocks
    none = torch.zeros(1, max(count - 1 - first, 0), 0, dtype=torch.long, device=device)
    if not random or count <= first + 1:
        return Blocks(size, count, none, 1, first)
    if not _draws(model, config):
        return Blocks(size, count, none, 1 + random, first)
    drawn = _bigbird_plan.random_blocks(
        layer, settings.num_attention_heads, size, count, random, settings.max_position_embeddings
    )
    return Blocks(size, count, drawn[:, first - 1 :].to(device), 1, first)


def stock(model: Any, config: Config, batch: Batch) -> Tensor:
    """Run transformers' own forward, for comparison, once for each grid; logits ``(windows, classes)``."""
    import numpy as np
    import torch

    from distill import padded

    pad = padding(model, config)
    assert pad is not None, "the stock forward pass pads"
    lengths = batch.windows.diff().tolist()
    widths = np.array([pad(length) for length in lengths])
    result: dict[int, Tensor] = {}
    # The stock plan of random blocks seeds NumPy's global generator with the layer's number.
    state = np.random.get_state()
    for width in sorted(set(widths)):
        members = np.flatnonzero(widths == width).tolist()
        kind = "block_sparse" if width else "original_full"
        if model.bert.attention_type != kind:
            model.bert.set_attention_type(kind)
        logits = model(**padded.inputs(model, batch.select(members), int(width) or None)).logits
        result |= dict(zip(members, logits, strict=True))
    np.random.set_state(state)
    return torch.stack([result[at] for at in range(len(lengths))])
