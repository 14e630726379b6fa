"""Which documents make a step, who computes them, and how they meet a model. Knows no model.

A step is a fixed set of documents, drawn without replacement (those with a weight as often as it says) and
the same on any number of processes; its order is a function of seed and epoch alone, so that a resumed run
needs no sampler state. Inside a step documents are sorted by length and cut into micro-batches of a token budget: padding is small, while
the step itself stays a fair draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from distill.encoding import Encoded, epoch_size
from distill.tasks import Array

if TYPE_CHECKING:
    import torch

Padding = Callable[[int], int]
"""From a window's length to the width in tokens that it must be padded to, 0 where any width will do; windows
of one width share a forward pass (see teachers/bigbird.py)."""


@dataclass(frozen=True)
class Batch:
    """Documents as a model reads them: packed windows."""

    token_ids: torch.Tensor
    """``(tokens,)`` int64."""
    segments: torch.Tensor
    """``(tokens,)`` int64."""
    windows: torch.Tensor
    """``(windows + 1,)`` int64: where each window begins."""
    documents: torch.Tensor
    """``(windows,)`` int64: the document, counted in this batch, that each window is of."""
    size: int
    """Documents."""
    labels: torch.Tensor
    """As in tasks.py."""
    labelled: torch.Tensor
    """``(documents,)`` bool."""
    teacher_logits: torch.Tensor | None = None
    """``(documents, classes)`` or ``(documents, units, 2)`` float32."""
    unit_of: torch.Tensor | None = None
    """Of spans, ``(tokens, 2)`` int64, as in ``Encoded``."""
    units: int = 0
    """Of spans: units of the document that has most."""

    def to(self, device: torch.device) -> Batch:
        """Move every tensor to a device."""
        logits, unit_of = self.teacher_logits, self.unit_of
        return Batch(
            self.token_ids.to(device, non_blocking=True),
            self.segments.to(device, non_blocking=True),
            self.windows.to(device, non_blocking=True),
            self.documents.to(device, non_blocking=True),
            self.size,
            self.labels.to(device, non_blocking=True),
            self.labelled.to(device, non_blocking=True),
            None if logits is None else logits.to(device, non_blocking=True),
            None if unit_of is None else unit_of.to(device, non_blocking=True),
            self.units,
        )

    def select(self, members: Sequence[int]) -> Batch:
        """Take some windows out of the batch, for a forward pass of their own."""
        import torch

        spans = [slice(int(self.windows[at]), int(self.windows[at + 1])) for at in members]
        lengths = self.windows.diff()[members]
        return replace(
            self,
            token_ids=torch.cat([self.token_ids[span] for span in spans]),
            segments=torch.cat([self.segments[span] for span in spans]),
            windows=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        )


def steps_per_epoch(documents: int, batch_size: int) -> int:
    """Count the optimizer steps of an epoch; the last one may be smaller."""
    return -(-documents // batch_size)


def epoch_order(documents: int, weights: Array | None, seed: int, epoch: int) -> Array:
    """Return the documents of an epoch in their order.

    A document of weight w is drawn ⌊w⌋ or ⌈w⌉ times, w on average over the epochs: systematic sampling (Madow
    1949), whose epochs are all of one size.

    Args:
        documents: how many there are.
        weights: ``(documents,)`` as in ``Encoded``, or None: each is drawn once.
        seed: with the epoch's number it settles the order.
        epoch: counted from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(documents)
    if weights is None:
        return order
    ends = weights[order]
    np.cumsum(ends, out=ends)
    draws = epoch_size(documents, weights)  # not ends[-1], which is rounded otherwise in each epoch
    points = np.arange(draws, dtype=np.float64)
    points += rng.random()
    points *= ends[-1] / draws
    drawn = np.searchsorted(ends[:-1], points, side="right")
    del ends, points  # there may be a hundred million of each
    order = order[drawn]
    rng.shuffle(order)
    return order


def steps(
    documents: int, batch_size: int, seed: int, start: int = 0, weights: Array | None = None
) -> Iterator[Array]:
    """Yield the documents of each step for ever, epoch after epoch.

    Args:
        documents: how many there are.
        batch_size: how many make a step.
        seed: with the epoch's number it settles the order.
        start: the first step to yield, counted from 0 over all epochs.
        weights: how often each is drawn in an epoch (see :func:`epoch_order`).
    """
    each = steps_per_epoch(epoch_size(documents, weights), batch_size)
    step = start
    while True:
        epoch, first = divmod(step, each)
        order = epoch_order(documents, weights, seed, epoch)
        for at in range(first, each):
            yield order[at * batch_size : (at + 1) * batch_size]
            step += 1


def share(indices: Array, lengths: Array, rank: int, world: int) -> Array:
    """Return this rank's documents of a step: sorted by length and dealt to and fro, so none waits long."""
    if world == 1:
        return indices
    order = indices[np.argsort(-lengths[indices], kind="stable")]
    at = np.arange(len(order)) % (2 * world)
    return np.asarray(order[np.where(at < world, at, 2 * world - 1 - at) == rank])


def deal(tokens: Array, most_tokens: int, most_documents: int, world: int) -> list[list[slice]]:
    """Cut documents into pieces of so many tokens, and deal them out so that each process has as many tokens.

    Args:
        tokens: ``(documents,)`` of each; neighbours share a piece.
        most_tokens: of a piece; less where the processes would not have one each. A longer document is a piece.
        most_documents: of a piece.
        world: how many processes there are.

    Returns:
        Each process's pieces, those of most tokens first (Graham 1969: none has more than 4/3 of what it must).
    """
    ends = np.cumsum(tokens, dtype=np.int64)
    most_tokens = min(most_tokens, -(-int(ends[-1]) // world))
    pieces: list[tuple[int, slice]] = []
    start = before = 0
    while start < len(tokens):
        end = int(np.searchsorted(ends, before + most_tokens, side="right"))
        end = min(max(end, start + 1), start + most_documents)
        pieces.append((int(ends[end - 1]) - before, slice(start, end)))
        start, before = end, int(ends[end - 1])
    result: list[list[slice]] = [[] for _ in range(world)]
    load = [0] * world
    for size, piece in sorted(pieces, key=lambda one: -one[0]):
        least = load.index(min(load))
        result[least].append(piece)
        load[least] += size
    return result


def micro_batches(
    data: Encoded, indices: Array, tokens_per_batch: int, padding: Padding | None = None
) -> list[Array]:
    """Cut documents into batches of at most ``tokens_per_batch`` tokens.

    The longest come first, so that a lack of memory shows at once. A document that is longer than the
    budget makes a batch of its own.

    Args:
        data: the split.
        indices: the documents.
        tokens_per_batch: the budget.
        padding: for models that pad: the padding counts too, and only windows of one width stand together.
    """
    longest, counts, tokens = data.longest_window[indices], data.window_counts[indices], data.tokens[indices]
    groups = np.array([padding(int(length)) if padding else 0 for length in longest])
    longest = np.maximum(longest, groups)
    result: list[Array] = []
    current: list[int] = []
    width = windows = total = 0
    for at in np.lexsort((-longest, -groups)):
        cost = (windows + counts[at]) * max(width, longest[at]) if padding else total + tokens[at]
        if current and (cost > tokens_per_batch or groups[at] != groups[current[-1]]):
            result.append(indices[current])
            current, width, windows, total = [], 0, 0, 0
        current.append(int(at))
        width, windows, total = (
            max(width, int(longest[at])),
            windows + int(counts[at]),
            total + int(tokens[at]),
        )
    return [*result, indices[current]] if current else result


def collate(data: Encoded, indices: Sequence[int] | Array, teacher_logits: Array | None = None) -> Batch:
    """Gather documents into a batch.

    Args:
        data: the split.
        indices: the documents, in the batch's order.
        teacher_logits: ``(documents, classes)``, or as in tasks.py, for these documents.
    """
    import torch

    ids, segments, lengths, owners, unit_of = [], [], [], [], []
    for position, document in enumerate(indices):
        first, last = data.documents[document], data.documents[document + 1]
        start, end = data.windows[first], data.windows[last]
        ids.append(data.token_ids[start:end])
        segments.append(data.segments[start:end])
        lengths.append(np.diff(data.windows[first : last + 1]))
        owners.append(np.full(last - first, position))
        if data.unit_of is not None:
            unit_of.append(data.unit_of[start:end])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return Batch(
        token_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        segments=torch.from_numpy(np.concatenate(segments).astype(np.int64)),
        windows=torch.from_numpy(offsets.astype(np.int64)),
        documents=torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        size=len(indices),
        labels=torch.from_numpy(data.labels[indices]),
        labelled=torch.from_numpy(data.labelled[indices]),
        teacher_logits=None if teacher_logits is None else torch.from_numpy(teacher_logits),
        unit_of=torch.from_numpy(np.concatenate(unit_of).astype(np.int64)) if unit_of else None,
        units=0 if data.units is None else int(data.units[indices].max()),
    )
