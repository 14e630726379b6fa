"""BigBird's two kinds of attention through torch's fused kernel, with the stock modules' weights and plan.

The stock full attention is the eager one, and the stock block-sparse one fills a dense
``(length, length)`` tensor that nobody reads. Both give the same numbers as these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Attention(nn.Module):
    """What both kinds take over from the stock module."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = stock.query, stock.key, stock.value
        self.heads = stock.num_attention_heads
        self.train(stock.training)

    def _project(self, hidden_states: Tensor) -> list[Tensor]:
        """Return query, key and value, each ``(windows, heads, length, head width)``."""
        layers = (self.query, self.key, self.value)
        return [layer(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers]


class FullAttention(_Attention):
    """Takes the place and the arguments of ``BigBirdSelfAttention``."""

    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        self.dropout = stock.dropout.p

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """``(windows, length, width)`` and an additive mask to ``(windows, length, width)``."""
        query, key, value = self._project(hidden_states)
        mask = None if attention_mask is None else attention_mask.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return context.transpose(1, 2).flatten(2), None


class SparseAttention(_Attention):
    """Takes the place and the arguments of ``BigBirdBlockSparseAttention``.

    The first and the last block of queries see all keys. A middle block i gathers the blocks of keys 0,
    i − 1, i, i + 1, last, and its random ones: a block that is gathered twice counts twice, as it does in
    the stock code. There is no dropout in this path of the stock code either.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        self.block = stock.block_size
        # Only its plan of random blocks is asked for; a list hides its weights, which are shared, from torch.
        self._stock = [stock]

    def _random_blocks(self, length: int, device: torch.device) -> Tensor:
        """Return the stock plan ``(heads, blocks − 2, random blocks)``: seeded by layer; zeros in evaluation."""
        stock, size = self._stock[0].train(self.training), self.block
        if self.training:
            np.random.seed(stock.seed)
        if length in (1024, 3072, 4096):  # these lengths take the beginning of one plan
            whole = stock.max_seqlen
            plan = [
                stock._bigbird_block_rand_mask(
                    whole, whole, size, size, stock.num_random_blocks, last_idx=1024
                )[: length // size - 2]
                for _ in range(self.heads)
            ]
        else:
            lengths, counts = stock._get_rand_attn_plan(length, size, stock.num_random_blocks)
            plan = stock._bigbird_block_rand_mask_with_head(
                length, length, size, size, self.heads, lengths, counts
            )
        return torch.as_tensor(np.stack(plan), dtype=torch.long, device=device)

    def forward(
        self,
        hidden_states: Tensor,
        band_mask: Any = None,
        from_mask: Any = None,
        to_mask: Any = None,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """``(windows, length, width)`` and a mask of keys ``(windows, 1, 1, length)`` to the same."""
        query, key, value = self._project(hidden_states)
        windows, heads, length, width = query.shape
        size, blocks = self.block, length // self.block
        middle = blocks - 2
        hidden = ((1.0 - to_mask) * -10000.0).to(query.dtype)  # the stock penalty

        # The two global blocks of queries.
        ends = torch.cat([query[:, :, :size], query[:, :, -size:]], dim=2)
        ends = F.scaled_dot_product_attention(ends, key, value, attn_mask=hidden.expand(-1, -1, 2 * size, -1))

        # Which blocks of keys each middle block sees: (heads, middle, slots).
        at = torch.arange(1, blocks - 1, device=query.device)
        fixed = torch.stack(
            [torch.zeros_like(at), at - 1, at, at + 1, torch.full_like(at, blocks - 1)], dim=1
        )
        slots = torch.cat([fixed.expand(heads, -1, -1), self._random_blocks(length, query.device)], dim=2)
        count = slots.shape[2]

        def gather(states: Tensor) -> Tensor:
            """``(windows, heads, length, width)`` to ``(windows, heads · middle, slots · block, width)``."""
            blocked: Tensor = states.reshape(windows, heads, blocks, size, width)
            which = torch.arange(heads, device=query.device)[:, None, None]
            return blocked[:, which, slots].reshape(windows, heads * middle, count * size, width)

        # (windows, heads, middle, slots, block)
        masked = hidden.reshape(windows, blocks, size)[:, slots].clone()
        # Next to the ends a neighbour is a global block, which has its slot already.
        masked[:, :, 0, 1] = masked[:, :, -1, 3] = -10000.0
        masked = masked.reshape(windows, heads * middle, 1, count * size).expand(-1, -1, size, -1)
        inner = query[:, :, size:-size].reshape(windows, heads * middle, size, width)
        inner = F.scaled_dot_product_attention(inner, gather(key), gather(value), attn_mask=masked)
        inner = inner.reshape(windows, heads, middle * size, width)

        context = torch.cat([ends[:, :, :size], inner, ends[:, :, size:]], dim=2)
        return context.transpose(1, 2).flatten(2), None
