"""BigBird's full attention through torch's fused kernel; the stock model has only the eager one."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class FullAttention(nn.Module):
    """Takes the place, the weights and the arguments of the stock ``BigBirdSelfAttention``."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = stock.query, stock.key, stock.value
        self.heads = stock.num_attention_heads
        self.dropout = stock.dropout.p
        self.train(stock.training)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """``(windows, width, hidden)`` and an additive mask to ``(windows, width, hidden)``."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mask = None if attention_mask is None else attention_mask.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return context.transpose(1, 2).flatten(2), None
