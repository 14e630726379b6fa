"""Attention over packed documents: exact, without padding, through torch's fused kernel.

States are ``(tokens, width)``, the documents one after another; everything but attention is blind to their
borders. Each kind of attention here is a function of one document alone. Documents of equal length that
stand side by side, a :class:`Run`, share a call. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn, unflatten

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values of some documents of one length, each ``(documents, heads, length, head width)``,
to the queries' contexts, of the same shape."""
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

    @property
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


def packed(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, kernel: Callable[[Run], Kernel]
) -> Tensor:
    """Let each document attend to itself.

    Args:
        query: ``(tokens, heads, head width)``, as are ``key`` and ``value``.
        key: see there.
        value: see there.
        layout: the documents.
        kernel: chooses a run's kernel.

    Returns:
        ``(tokens, heads · head width)``.
    """
    parts = []
    by_run = (layout.split(x) for x in (query, key, value))
    for run, *states in zip(layout.runs, *by_run, strict=True):
        context = kernel(run)(*(x.transpose(1, 2) for x in states))
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


def full(dropout: float = 0.0) -> Kernel:
    """Let every token see every token."""

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, None, dropout)

    return kernel


def window(half: int, global_tokens: int, dropout: float = 0.0, chunk: int = 128) -> Kernel:
    """Let each token see ``half`` tokens on either side, and the first ``global_tokens`` (Beltagy et al. 2020).

    What the global tokens themselves see is not computed here (see :func:`from_first`): their rows are of
    no use. Queries go in chunks, each with the keys around it, so that time and memory grow with the length.
    """

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[2]
        if length <= half + 1:
            return full(dropout)(query, key, value)
        seen, chunks = chunk + 2 * half, -(-length // chunk)
        device = query.device
        if length <= seen:  # one rectangle is less work than the chunks
            at = torch.arange(length, device=device)
            mask = ((at[:, None] - at).abs() <= half) | (at < global_tokens)
            return attend(query, key, value, mask, dropout)

        def around(states: Tensor) -> Tensor:
            """``(documents, heads, length, w)`` to ``(documents · heads, chunks, global + seen, w)``."""
            beginning = states[:, :, :global_tokens].flatten(0, 1).unsqueeze(1).expand(-1, chunks, -1, -1)
            padded = F.pad(states, (0, 0, half, half + chunks * chunk - length)).flatten(0, 1)
            return torch.cat([beginning, padded.unfold(1, seen, chunk).transpose(2, 3)], dim=2)

        row, column = torch.arange(chunk, device=device)[:, None], torch.arange(seen, device=device)
        near = (column >= row) & (column - row <= 2 * half)  # (chunk, seen)
        at = column + chunk * torch.arange(chunks, device=device)[:, None] - half  # (chunks, seen)
        band = near & ((at >= global_tokens) & (at < length))[:, None]
        mask = torch.cat([band.new_ones(chunks, chunk, global_tokens), band], dim=2)
        queries = F.pad(query, (0, 0, 0, chunks * chunk - length)).flatten(0, 1)
        queries = unflatten(queries, 1, (chunks, chunk))
        context = attend(queries, around(key), around(value), mask[None], dropout)
        return unflatten(context.flatten(1, 2)[:, :length], 0, query.shape[:2])

    return kernel


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


def blocks(plan: Blocks) -> Kernel:
    """Let each block of tokens see the blocks that a plan names."""

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, length = query.shape[1:3]
        size, first = plan.size, plan.global_blocks
        present = -(-length // size)
        whole = present == plan.count  # else the last, global block of the grid is padding
        stop = present - 1 if whole else present
        if stop <= first:
            return attend(query, key, value)
        begin = attend(query[:, :, : first * size], key, value)
        end = attend(query[:, :, stop * size :], key, value) if whole else query[:, :, :0]

        slots, bias = (x[:, : stop - first] for x in plan.slots())
        bias = bias.masked_fill(slots >= present, HIDDEN).unsqueeze(3)
        slots = slots.clamp(max=present - 1)
        tail = torch.arange(present * size, device=query.device).view(present, size) >= length
        mask = bias.expand(-1, -1, -1, size).masked_fill(tail[slots], HIDDEN)  # (heads, middle, slots, size)
        mask = mask.flatten(2).to(query.dtype).unsqueeze(2).expand(heads, -1, size, -1).flatten(0, 1)
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

    return kernel


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
