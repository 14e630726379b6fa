"""BigBird's random blocks, drawn as transformers draws them: by layer, head and length of the grid."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=512)
def random_blocks(layer: int, heads: int, size: int, blocks: int, count: int, positions: int) -> Tensor:
    """Return which blocks of keys each middle block sees at random, in training.

    Args:
        layer: counted from 0; it is the plan's seed.
        heads: of the attention.
        size: tokens of a block.
        blocks: of the grid.
        count: random blocks for each block of queries.
        positions: tokens that the model reads; some lengths take the beginning of that plan.

    Returns:
        ``(heads, blocks - 2, count)``; a block may occur twice.
    """
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    length = size * blocks
    with torch.device("meta"):
        config = BigBirdConfig(
            num_attention_heads=heads, hidden_size=heads, max_position_embeddings=positions
        )
        stock: Any = BigBirdBlockSparseAttention(config, layer).train()
    state = np.random.get_state()  # the global generator: the stock code draws from it
    np.random.seed(layer)
    try:
        if length in (1024, 3072, 4096):
            # Longer ones than this are drawn from a part of the grid, these from the whole.
            draws = [
                stock._bigbird_block_rand_mask(positions, positions, size, size, count, last_idx=1024)
                for _ in range(heads)
            ]
            plan = [draw[: blocks - 2] for draw in draws]
        else:
            plan = stock._bigbird_block_rand_mask_with_head(
                length, length, size, size, heads, *stock._get_rand_attn_plan(length, size, count)
            )
    finally:
        np.random.set_state(state)
    return torch.as_tensor(np.stack(plan), dtype=torch.long)
