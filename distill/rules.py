"""Which keys each query of a document sees: all, those of a window, or those of a plan of blocks.

A rule is a function of one document alone, and never of its company. Each says it twice: as a computation
over documents of one length, sparse where the rule is, and as a score for every pair of tokens, for GPUs
(flex.py). The tests hold the two against one another. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, unflatten

from distill.attention import HIDDEN, Layout, attend


class Rule(Protocol):
    """Which keys each query of a document sees."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Compute the contexts of documents of one length, ``(documents, heads, length, head width)``."""

    def sees_all(self, length: int) -> bool:
        """Say whether every token of a document of this length sees every token."""

    def score(self, layout: Layout, heads: int, device: torch.device) -> tuple[Score, int]:
        """Say it of every pair of tokens of a packed batch, for flex.py.

        Returns:
            The function, and how many heads differ in it: 1 where all see the same.
        """


Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Head, query and key of one document, counted over the packed tokens, to what is added to their score;
:data:`HIDDEN` where the key is not seen."""


@dataclass(frozen=True)
class Full:
    """Every token sees every token."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """See :class:`Rule`."""
        return attend(query, key, value, None, dropout)

    def sees_all(self, length: int) -> bool:
        """See :class:`Rule`."""
        return True

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

    def sees_all(self, length: int) -> bool:
        """See :class:`Rule`."""
        return length <= self.half + 1

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Say of places in a document whether the one sees the other."""
        return ((query - key).abs() <= self.half) | (key < self.global_tokens)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """See :class:`Rule`."""
        half, chunk, first, length = self.half, self.chunk, self.global_tokens, query.shape[2]
        if self.sees_all(length):
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
        """Do as :meth:`slots` for a document that ends in the grid's block ``present - 1``.

        Only as many slots are left as any block needs; those that another has no use for are hidden.
        """
        middle = min(present, self.count - 1) - self.global_blocks
        slots, bias = (x[:, :middle] for x in self.slots())
        bias, order = bias.masked_fill(slots >= present, HIDDEN).sort(dim=2, descending=True, stable=True)
        most = int((bias > HIDDEN).sum(2).max())
        return slots.gather(2, order).clamp(max=present - 1)[..., :most], bias[..., :most]

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
        size, first, present = plan.size, plan.global_blocks, -(-length // plan.size)
        stop = present - 1 if present == plan.count else present  # else the last, global block is padding
        if stop <= first:
            return attend(query, key, value)
        slots, bias = plan.seen(present)
        sparse = length * size * (first + present - stop) + (stop - first) * size * size * slots.shape[2]
        if length * length <= 1.25 * sparse:  # one square is less work than gathering
            rows = plan.scores(present).to(query.dtype).unsqueeze(3).expand(-1, -1, -1, size).flatten(2)
            mask = rows.unsqueeze(2).expand(-1, -1, size, -1).flatten(1, 2)[None, :, :length, :length]
            return attend(query, key, value, mask)

        begin = attend(query[:, :, : first * size], key, value)
        end = attend(query[:, :, stop * size :], key, value) if stop < present else query[:, :, :0]
        tail = torch.arange(present * size, device=query.device).view(present, size) >= length
        mask = bias.unsqueeze(3).expand(-1, -1, -1, size).masked_fill(tail[slots], HIDDEN)
        mask = mask.flatten(2).to(query.dtype).expand(heads, -1, -1).flatten(0, 1)
        mask = mask.unsqueeze(1).expand(-1, size, -1)  # of no memory: every query of a block sees the same
        which = (slots + present * torch.arange(heads, device=query.device)[:, None, None]).flatten()

        def gather(states: Tensor) -> Tensor:
            """``(documents, heads, length, w)`` to ``(documents, heads · middle, slots · size, w)``."""
            padded = unflatten(F.pad(states, (0, 0, 0, present * size - length)).flatten(1, 2), 1, (-1, size))
            found = padded.index_select(1, which)
            return unflatten(found.flatten(1, 2), 1, (heads * (stop - first), -1))

        inner = F.pad(query, (0, 0, 0, present * size - length))[:, :, first * size : stop * size]
        inner = unflatten(inner, 2, (stop - first, size)).flatten(1, 2)
        middle = attend(inner, gather(key), gather(value), mask[None])
        middle = unflatten(middle, 1, (heads, stop - first)).flatten(2, 3)
        return torch.cat([begin, middle, end], dim=2)[:, :, :length]

    def sees_all(self, length: int) -> bool:
        """See :class:`Rule`."""
        return self.plan(length) is None

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
