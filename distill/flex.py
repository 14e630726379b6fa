"""Attention over a whole packed batch in one call of torch's flex_attention, for GPUs.

The rules are those of rules.py; here each becomes one mask of documents and one function of scores.
Masks are worked out once a batch and rule. On a CPU flex_attention has no backward pass: there the tests
hold its forward pass against the runs of attention.py. **It has not been run on a GPU.**
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from distill.attention import HIDDEN, Layout
from distill.rules import Rule


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """Let each document attend to itself; arguments and result as in attention.packed."""
    run = _compiled if query.is_cuda else lambda function: function
    heads = query.shape[1]
    if (rule, heads) not in layout.masks:
        layout.masks[rule, heads] = _masks(layout, rule, heads, query.device, run)
    score, seen = layout.masks[rule, heads]
    states = (x.transpose(0, 1)[None] for x in (query, key, value))
    found: Tensor = run(flex_attention.flex_attention)(*states, score_mod=score, block_mask=seen)
    return found[0].transpose(0, 1).flatten(1)


def _masks(layout: Layout, rule: Rule, heads: int, device: torch.device, run: Any) -> tuple[Any, Any]:
    """Make flex_attention's function of scores and its mask of blocks."""
    lengths = torch.tensor(layout.lengths, device=device)
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    added, each = rule.score(layout, heads, device)
    tokens = layout.offsets[-1]

    def score(value: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return value + added(head, query, key)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (added(head, query, key) > HIDDEN / 2)

    differ = heads if each > 1 else None
    return score, run(flex_attention.create_block_mask)(seen, None, differ, tokens, tokens, device=device)
