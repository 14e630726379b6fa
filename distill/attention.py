"""Attention over packed documents: exact, without padding, through torch's fused kernel.

States are ``(tokens, width)``, the documents one after another; everything but attention is blind to their
borders. Which keys a query sees is a rule of one document alone (rules.py). On a GPU one call serves the
whole batch (flex.py); elsewhere documents of equal length that stand side by side, a :class:`Run`, share one.
Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, unflatten

if TYPE_CHECKING:
    from distill.rules import Rule

HIDDEN = -1e9
"""Score of a key that must not be seen; finite, since a row of infinities would give NaN."""


@dataclass(frozen=True)
class Run:
    """Documents of one length, side by side."""

    documents: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return self.documents * self.length


@dataclass(frozen=True)
class Layout:
    """Where each document stands."""

    offsets: Sequence[int]
    """``documents + 1`` numbers: where each begins, and where the last one ends."""
    masks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What flex.py has worked out of each rule, for the layers that share it."""

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [stop - start for start, stop in pairwise(self.offsets)]

    @cached_property
    def runs(self) -> list[Run]:
        """The documents, those of equal length together."""
        return [Run(len(list(group)), length) for length, group in groupby(self.lengths)]

    def split(self, states: Tensor) -> list[Tensor]:
        """Take ``(tokens, …)`` apart by runs, each ``(documents, length, …)``: views."""
        if len(self.runs) == 1:
            return [unflatten(states, 0, (self.runs[0].documents, self.runs[0].length))]
        parts = torch.split(states, [run.tokens for run in self.runs])  # one split: its gradient is one join
        return [
            unflatten(part, 0, (run.documents, run.length))
            for run, part in zip(self.runs, parts, strict=True)
        ]

    def positions(self, device: torch.device) -> Tensor:
        """Number each document's tokens from 0: ``(tokens,)``."""
        starts = np.repeat(self.offsets[:-1], self.lengths)
        return torch.from_numpy(np.arange(len(starts)) - starts).to(device)

    def first(self, count: int, device: torch.device) -> Tensor:
        """Find each document's first ``count`` tokens, or all where it has fewer: ``(found,)`` rows."""
        if count == 1:
            return torch.tensor(self.offsets[:-1], device=device)
        rows = [at for start, stop in pairwise(self.offsets) for at in range(start, min(start + count, stop))]
        return torch.tensor(rows, device=device)


def packed(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, dropout: float = 0.0
) -> Tensor:
    """Let each document attend to itself.

    Args:
        query: ``(tokens, heads, head width)``, as are ``key`` and ``value``.
        key: see there.
        value: see there.
        layout: the documents.
        rule: which keys are seen.
        dropout: probability, of attention weights.

    Returns:
        ``(tokens, heads · head width)``.
    """
    if query.is_cuda and not dropout:  # flex_attention drops nothing out
        from distill import flex

        return flex.attend(query, key, value, layout, rule)
    parts = []
    for q, k, v in zip(*(layout.split(x) for x in (query, key, value)), strict=True):
        context = rule.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout)
        parts.append(context.transpose(1, 2).flatten(0, 1).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Compute ``softmax(q·k / √width + mask)·v`` the fastest way that the processor has.

    On a CPU torch's fused kernel is slow to go back through in bf16, and has none that drops weights out:
    there the score matrix is written down, as long as it is not too large (benchmarks/attention.py).

    Args:
        query: ``(…, queries, width)``.
        key: ``(…, keys, width)``, as is ``value``.
        value: see there.
        mask: broadcasts to ``(…, queries, keys)``: bool, True where a key is seen, or scores to be added.
        dropout: probability, of attention weights.
    """
    scores = query[0].numel() // query.shape[-1] * key.shape[-2]  # of one document: its way is its own
    plain = (
        query.device.type == "cpu" and (query.dtype == torch.bfloat16 or dropout > 0) and scores <= 1 << 25
    )
    if not plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    found = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
    if mask is not None:
        found = found.masked_fill(~mask, HIDDEN) if mask.dtype == torch.bool else found + mask
    with torch.autocast("cpu", enabled=False):  # it would have the softmax written down in fp32
        weights = found.softmax(-1)
    return drop(weights, dropout) @ value


def drop(weights: Tensor, probability: float) -> Tensor:
    """Set entries to zero with a probability, and enlarge the others; its steps are 1/65,536.

    On a CPU random numbers are dearer than the attention itself: one of 64 bits serves four entries; and a
    product is twice as fast there and back as a fill under a mask.
    """
    if not probability:
        return weights
    if weights.device.type != "cpu":
        return F.dropout(weights, probability)
    draws = torch.empty(-(-weights.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: weights.numel()].view(weights.shape)
    kept = (bits >= round(probability * 65536) - 32768).to(weights.dtype)
    return weights * kept.mul_(1 / (1 - probability))


def from_first(
    states: Tensor,
    layout: Layout,
    query: nn.Linear,
    key: nn.Linear,
    value: nn.Linear,
    heads: int,
    count: int = 1,
    dropout: float = 0.0,
) -> Tensor:
    """Let each document's first tokens see all of it, and compute nothing for the others.

    Keys and values are never projected: ``q·(K x) = (Kᵀ q)·x``, and the mean of projected values is the
    projection of the mean.

    Args:
        states: ``(tokens, width)``.
        layout: the documents.
        query: projection ``(width, width)`` with bias, as are ``key`` and ``value``.
        key: see there.
        value: see there.
        heads: of the attention.
        count: how many of the first tokens; all where a document has fewer.
        dropout: probability, of attention weights.

    Returns:
        ``(rows of layout.first, width)``.
    """
    rows = layout.first(count, states.device)
    queries = unflatten(query(states[rows]), 1, (heads, -1)) / math.sqrt(query.out_features // heads)
    by_head = queries.transpose(0, 1)  # (heads, rows, head width)
    sought = (by_head @ unflatten(key.weight, 0, (heads, -1))).transpose(0, 1)  # (rows, heads, width)
    sizes = [run.documents * min(count, run.length) for run in layout.runs]
    learns = torch.is_grad_enabled() and key.bias is not None and key.bias.requires_grad
    # The key's bias adds the same to every score, so that no weight changes: it is here for its gradient of 0.
    same = (by_head @ unflatten(key.bias, 0, (heads, -1, 1))).transpose(0, 1) if learns else None
    added = torch.split(same, sizes) if same is not None else [None] * len(sizes)
    means, sums = [], []
    for tokens, looked_for, plus in zip(layout.split(states), torch.split(sought, sizes), added, strict=True):
        looked_for = unflatten(looked_for, 0, (len(tokens), -1)).flatten(1, 2)
        scores = looked_for @ tokens.transpose(1, 2)  # (documents, own · heads, length)
        if plus is not None:
            scores = scores + plus.reshape(len(tokens), -1, 1)
        weights = drop(scores.softmax(2, dtype=torch.float32), dropout)
        means.append(unflatten((weights.to(tokens.dtype) @ tokens).flatten(0, 1), 0, (-1, heads)))
        if dropout:
            sums.append(weights.sum(2).view(-1, heads))
    mean = means[0] if len(means) == 1 else torch.cat(means)  # (rows, heads, width)
    context = (mean.transpose(0, 1) @ unflatten(value.weight, 0, (heads, -1)).transpose(1, 2)).transpose(0, 1)
    if not dropout:
        return context.flatten(1) + value.bias
    # Weights of which some were dropped do not add up to 1.
    total = torch.cat(sums).unsqueeze(2).to(context.dtype)
    return (context + unflatten(value.bias, 0, (heads, -1)) * total).flatten(1)
