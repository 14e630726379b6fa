"""Attention over packed documents: exact, without padding, through torch's fused kernel.

States are ``(tokens, width)``, the documents one after another; everything but attention is blind to their
borders. A :class:`Rule` says which keys a query sees, and is a function of one document alone. On a GPU one
call serves the whole batch (flex.py); elsewhere documents of equal length that stand side by side, a
:class:`Run`, share one. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn, unflatten

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
        parts = torch.split(states, [run.tokens for run in self.runs])  # one split: its gradient is one join
        return [
            unflatten(part, 0, (run.documents, run.length))
            for run, part in zip(self.runs, parts, strict=True)
        ]

    def positions(self, device: torch.device) -> Tensor:
        """Number each document's tokens from 0: ``(tokens,)``."""
        lengths = torch.tensor(self.lengths, device=device)
        starts = torch.tensor(self.offsets[:-1], device=device)
        return torch.arange(self.offsets[-1], device=device) - starts.repeat_interleave(lengths)

    def first(self, count: int, device: torch.device) -> Tensor:
        """Find each document's first ``count`` tokens, or all where it has fewer: ``(found,)`` rows."""
        rows = [at for start, stop in pairwise(self.offsets) for at in range(start, min(start + count, stop))]
        return torch.tensor(rows, device=device)


class Rule(Protocol):
    """Which keys each query of a document sees."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Compute the contexts of documents of one length, ``(documents, heads, length, head width)``."""

    def score(self, layout: Layout, heads: int, device: torch.device) -> tuple[Score, int]:
        """Say it of every pair of tokens of a packed batch, for flex.py.

        Returns:
            The function, and how many heads differ in it: 1 where all see the same.
        """


Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Head, query and key of one document, counted over the packed tokens, to what is added to their score;
:data:`HIDDEN` where the key is not seen."""


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

    On a CPU random numbers are dearer than the attention itself: one of 64 bits serves four entries.
    """
    if not probability or weights.device.type != "cpu":
        return F.dropout(weights, probability, probability > 0)
    draws = torch.empty(-(-weights.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: weights.numel()].view(weights.shape)
    return weights.masked_fill(bits < round(probability * 65536) - 32768, 0.0) / (1 - probability)


@dataclass(frozen=True)
class Full:
    """Every token sees every token."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """See :class:`Rule`."""
        return attend(query, key, value, None, dropout)

    def score(self, layout: Layout, heads: int, device: torch.device) -> tuple[Score, int]:
        """See :class:`Rule`."""
        return lambda head, query, key: torch.zeros_like(query, dtype=torch.float32), 1


@dataclass(frozen=True)
class Window:
    """Each token sees ``half`` tokens on either side, and the first ones of the document (Beltagy et al. 2020).

    What these global tokens themselves see is not computed here (see :func:`from_first`): their rows are of
    no use. Queries go in chunks, each with the keys around it, so that time and memory grow with the length.
    """

    half: int
    global_tokens: int
    chunk: int = 128

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Say of places in a document whether the one sees the other."""
        return ((query - key).abs() <= self.half) | (key < self.global_tokens)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """See :class:`Rule`."""
        half, chunk, first, length = self.half, self.chunk, self.global_tokens, query.shape[2]
        if length <= half + 1:
            return attend(query, key, value, None, dropout)
        seen, chunks, device = chunk + 2 * half, -(-length // chunk), query.device
        if length <= seen:  # one rectangle is less work than the chunks
            at = torch.arange(length, device=device)
            return attend(query, key, value, self.sees(at[:, None], at), dropout)

        def around(states: Tensor) -> Tensor:
            """``(documents, heads, length, w)`` to ``(documents · heads, chunks, global + seen, w)``."""
            beginning = states[:, :, :first].flatten(0, 1).unsqueeze(1).expand(-1, chunks, -1, -1)
            padded = F.pad(states, (0, 0, half, half + chunks * chunk - length)).flatten(0, 1)
            return torch.cat([beginning, padded.unfold(1, seen, chunk).transpose(2, 3)], dim=2)

        start = chunk * torch.arange(chunks, device=device)[:, None]
        rows, columns = (
            start + torch.arange(chunk, device=device),
            start + torch.arange(seen, device=device) - half,
        )
        band = (
            self.sees(rows[:, :, None], columns[:, None]) & ((columns >= first) & (columns < length))[:, None]
        )
        mask = torch.cat([band.new_ones(chunks, chunk, first), band], dim=2)
        queries = F.pad(query, (0, 0, 0, chunks * chunk - length)).flatten(0, 1)
        queries = unflatten(queries, 1, (chunks, chunk))
        context = attend(queries, around(key), around(value), mask[None], dropout)
        return unflatten(context.flatten(1, 2)[:, :length], 0, query.shape[:2])

    def score(self, layout: Layout, heads: int, device: torch.device) -> tuple[Score, int]:
        """See :class:`Rule`."""
        at = layout.positions(device)
        return lambda head, query, key: torch.where(self.sees(at[query], at[key]), 0.0, HIDDEN), 1


@dataclass(frozen=True)
class Blocks:
    """Which blocks of keys each block of queries sees (Zaheer et al. 2020, section 2).

    The first ``global_blocks`` blocks and the last one see everything, and are seen by everything. A block in
    the middle sees its neighbours and itself too, and the blocks that ``extra`` names: one that is named
    twice, or is seen already, counts once more, as in the authors' code.
    """

    size: int
    """Tokens of a block."""
    count: int
    """Blocks of the grid; those beyond the document's end are padding that nobody computes."""
    extra: Tensor
    """``(heads or 1, middle blocks, extra blocks)`` int64."""
    weight_of_first: int = 1
    """How often the first block counts, for every block in the middle."""
    global_blocks: int = 1

    def slots(self) -> tuple[Tensor, Tensor]:
        """List the blocks of keys that each middle block gathers, and the scores to be added to theirs.

        Returns:
            ``(heads or 1, middle, slots)`` block numbers, and as many scores; :data:`HIDDEN` where a
            neighbour is a global block, which has its slot already.
        """
        first, last, device = self.global_blocks, self.count - 1, self.extra.device
        at = torch.arange(first, last, device=device)
        ends = torch.tensor([*range(first), last], device=device).expand(len(at), -1)
        near = torch.stack([at - 1, at, at + 1], dim=1)
        fixed = torch.cat([ends, near], dim=1)
        bias = torch.zeros(fixed.shape, device=device)
        bias[:, 0] = math.log(self.weight_of_first)
        bias[:, first + 1 :] = torch.where((near < first) | (near >= last), HIDDEN, 0.0)
        heads = len(self.extra)
        slots = torch.cat([fixed.expand(heads, -1, -1), self.extra], dim=2)
        return slots, torch.cat(
            [bias.expand(heads, -1, -1), torch.zeros_like(self.extra, dtype=bias.dtype)], 2
        )

    def seen(self, present: int) -> tuple[Tensor, Tensor]:
        """Do as :meth:`slots` for a document that ends in the grid's block ``present - 1``."""
        middle = min(present, self.count - 1) - self.global_blocks
        slots, bias = (x[:, :middle] for x in self.slots())
        return slots.clamp(max=present - 1), bias.masked_fill(slots >= present, HIDDEN)

    def scores(self, present: int) -> Tensor:
        """Write :meth:`seen` down for every pair of blocks: ``(heads or 1, present, present)``."""
        slots, bias = self.seen(present)
        first, middle = self.global_blocks, slots.shape[1]
        counted = bias.new_zeros(len(slots), middle, present).scatter_add(2, slots, bias.exp())
        result = bias.new_zeros(len(slots), present, present)
        result[:, first : first + middle] = counted.log().clamp(min=HIDDEN)
        return result


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """Each block of tokens sees the blocks that its document's plan names; a document without one sees all."""

    plan: Callable[[int], Blocks | None]
    """From a document's length."""
    size: int
    """Tokens of a block."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """See :class:`Rule`. Only documents that see all have weights dropped out, as in transformers."""
        heads, length = query.shape[1:3]
        plan = self.plan(length)
        if plan is None:
            return attend(query, key, value, None, dropout)
        size, first = plan.size, plan.global_blocks
        present = -(-length // size)
        stop = present - 1 if present == plan.count else present  # else the last, global block is padding
        if stop <= first:
            return attend(query, key, value)
        begin = attend(query[:, :, : first * size], key, value)
        end = attend(query[:, :, stop * size :], key, value) if stop < present else query[:, :, :0]

        slots, bias = plan.seen(present)
        tail = torch.arange(present * size, device=query.device).view(present, size) >= length
        mask = bias.unsqueeze(3).expand(-1, -1, -1, size).masked_fill(tail[slots], HIDDEN)
        mask = mask.flatten(2).to(query.dtype).expand(heads, -1, -1).flatten(0, 1)
        mask = mask.unsqueeze(1).expand(-1, size, -1)  # of no memory: every query of a block sees the same
        which = torch.arange(heads, device=query.device)[:, None, None]

        def gather(states: Tensor) -> Tensor:
            """``(documents, heads, length, w)`` to ``(documents, heads · middle, slots · size, w)``."""
            padded = unflatten(F.pad(states, (0, 0, 0, present * size - length)), 2, (present, size))
            return padded[:, which, slots].flatten(3, 4).flatten(1, 2)

        inner = F.pad(query, (0, 0, 0, present * size - length))[:, :, first * size : stop * size]
        inner = unflatten(inner, 2, (stop - first, size)).flatten(1, 2)
        middle = attend(inner, gather(key), gather(value), mask[None])
        middle = unflatten(middle, 1, (heads, stop - first)).flatten(2, 3)
        return torch.cat([begin, middle, end], dim=2)[:, :, :length]

    def score(self, layout: Layout, heads: int, device: torch.device) -> tuple[Score, int]:
        """See :class:`Rule`."""
        plans = {length: self.plan(length) for length in layout.lengths}
        each = max((len(plan.extra) for plan in plans.values() if plan is not None), default=1)
        most = max(-(-length // self.size) for length in plans)
        table = torch.zeros(len(plans), each, most, most, device=device)
        for number, (length, plan) in enumerate(plans.items()):
            if plan is not None:
                present = -(-length // self.size)
                table[number, :, :present, :present] = plan.scores(present)
        numbers = {length: number for number, length in enumerate(plans)}
        lengths = torch.tensor(layout.lengths, device=device)
        which = torch.tensor([numbers[length] for length in layout.lengths], device=device)
        which, block = which.repeat_interleave(lengths), layout.positions(device) // self.size

        def score(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return table[which[query], head * (each > 1), block[query], block[key]]

        return score, each


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
    looked_for = torch.einsum("rhe,hew->rhw", queries, _by_head(key.weight, heads))
    # The same for every key, so that no weight changes; it is here for the bias's gradient, which is zero.
    base = (
        (queries * _by_head(key.bias, heads)).sum(2)
        if key.bias is not None
        else queries.new_zeros(queries.shape[:2])
    )
    means, sums = [], []
    sizes = [run.documents * min(count, run.length) for run in layout.runs]
    for run, tokens, sought, plus in zip(
        layout.runs,
        layout.split(states),
        torch.split(looked_for, sizes),
        torch.split(base, sizes),
        strict=True,
    ):
        own = min(count, run.length)
        scores = unflatten(sought, 0, (run.documents, own)).flatten(1, 2) @ tokens.transpose(1, 2)
        scores = scores + plus.reshape(run.documents, -1, 1)
        weights = drop(scores.softmax(2, dtype=torch.float32), dropout)
        means.append(unflatten(weights.to(tokens.dtype) @ tokens, 1, (own, heads)).flatten(0, 1))
        sums.append(weights.sum(2).view(-1, heads))
    mean, total = torch.cat(means), torch.cat(sums)
    context = torch.einsum("rhw,hew->rhe", mean, _by_head(value.weight, heads))
    if value.bias is not None:  # dropped weights do not add up to 1
        context = context + _by_head(value.bias, heads) * total.unsqueeze(2).to(context.dtype)
    return context.flatten(1)


def _by_head(weight: Tensor, heads: int) -> Tensor:
    """``(width, …)`` to ``(heads, head width, …)``."""
    return unflatten(weight, 0, (heads, -1))
