"""Attention alone on a CPU: torch's fused kernel against the one that distill/attention.py chooses.

    python benchmarks/attention.py

Forward and backward, documents of several lengths, with and without dropout, in bf16 and fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _shared import here, say, take_turns

from distill.rules import Full

SHAPES = (
    (16, 12, 128, 32),
    (4, 12, 300, 64),
    (1, 12, 700, 64),
    (1, 12, 1024, 64),
)  # documents, heads, length, width


def fused(states: list[Any], dropout: float) -> Any:
    """Run torch's kernel."""
    query, key, value = states
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


def ours(states: list[Any], dropout: float) -> Any:
    """Run the one of distill."""
    query, key, value = states
    return Full().attend(query, key, value, dropout)


def train(kind: Callable[[list[Any], float], Any], states: list[Any], dropout: float) -> None:
    """Go forward and back."""
    found = kind(states, dropout)
    found.backward(found.detach())


def main() -> None:
    """Measure in turns, and print a line for each case."""
    torch.set_num_threads(1)
    say(here())
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for dropout in (0.0, 0.1):
                states = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
                took = take_turns(
                    {
                        "fused": partial(train, fused, states, dropout),
                        "ours": partial(train, ours, states, dropout),
                    },
                    7,
                )
                say(
                    f"{shape} {str(dtype)[6:]} dropout {dropout}: fused {took['fused'] * 1000:.1f} ms, "
                    f"ours {took['ours'] * 1000:.1f} ms ({took['fused'] / took['ours']:.2f}x)"
                )


if __name__ == "__main__":
    main()
