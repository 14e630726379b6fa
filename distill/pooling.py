"""From what a model says of windows to what it says of documents. Knows no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.tasks import UNREAD

if TYPE_CHECKING:
    from distill.batching import Batch


def mean(logits: Tensor, batch: Batch) -> Tensor:
    """Average the windows of each document: ``(windows, classes)`` to ``(documents, classes)``."""
    if len(logits) == batch.size:
        return logits
    pooled = logits.new_zeros(batch.size, logits.shape[1]).index_add(0, batch.documents, logits)
    return pooled / torch.bincount(batch.documents, minlength=batch.size).unsqueeze(1)


def by_unit(logits: Tensor, batch: Batch) -> Tensor:
    """Make a document's logits of its units from those of the tokens of all its windows.

    A softmax over the document gives a unit the sum of what its tokens would have in one over all tokens of all
    windows (Clark and Gardner 2018, section 3.2), whatever tokenizer cut them. Of a unit that several windows hold it is
    the mean over these, so that overlap makes no unit likelier.

    Args:
        logits: ``(tokens, 2)``, that an answer begins and ends here.
        batch: with the units of its tokens.

    Returns:
        ``(documents, units, 2)``; UNREAD where no token is of a unit, or the document has no such unit.
    """
    assert batch.unit_of is not None
    lengths = batch.windows.diff()
    windows = torch.repeat_interleave(torch.arange(len(lengths), device=logits.device), lengths)
    fresh = torch.ones_like(batch.unit_of, dtype=torch.bool)  # the first token of its unit in its window
    fresh[1:] = (batch.unit_of.diff(dim=0) != 0) | (windows.diff() != 0).unsqueeze(1)
    document = batch.documents[windows].unsqueeze(1)
    cells = (document * batch.units + batch.unit_of) * 2 + torch.arange(2, device=logits.device)
    read = batch.unit_of >= 0
    cells, values, fresh = cells[read], logits[read], fresh[read]
    nothing = logits.new_zeros(batch.size * batch.units * 2)
    top = nothing.fill_(UNREAD).scatter_reduce(0, cells, values.detach(), "amax")
    sums = torch.zeros_like(top).index_add(0, cells, (values - top[cells]).exp())
    held = torch.zeros_like(top).index_add(0, cells, fresh.to(top.dtype))
    pooled = top + (sums.clamp_min(1) / held.clamp_min(1)).log()  # a sum has a term of 1, where it has any
    return pooled.view(batch.size, batch.units, 2)
