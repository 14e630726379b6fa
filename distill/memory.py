"""What fits the memory: a lack of it is recognised, batches of tokens are halved, freed memory is given back.

Knows no loop. A result does not depend on how documents are cut into batches, but for rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from distill.batching import micro_batches
from distill.errors import OutOfMemory
from distill.progress import say
from distill.tasks import Array

if TYPE_CHECKING:
    from distill.encoding import Encoded
    from distill.masking import MaskedModel
    from distill.models import Classifier

FLOOR = 64
"""Tokens of a batch that is not halved any more; what a recipe may ask for at least."""
_SAID = (
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a primitive",  # oneDNN, which gives no reason
)
"""What allocators say whose errors have no type of their own."""
_room: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
"""Tokens of a batch that a model's pass without gradients was last halved to, in this process."""


def release_memory() -> None:
    """Give freed memory back to the system: batches of ever new shapes leave glibc's heap full of holes."""
    gc.collect(1)  # the youngest: a whole collection takes a second where much is imported
    with contextlib.suppress(OSError, AttributeError):  # another C library: it has no such call
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Releases:
    """Freed memory is given back now and then, for a hundredth of the time at most.

    Without it a process takes the more, the more batches of new shapes there have been.
    """

    def __init__(self) -> None:
        self._next = time.monotonic() + 1.0

    def __call__(self) -> None:
        """Give it back, if it is time."""
        began = time.monotonic()
        if began >= self._next:
            release_memory()
            ended = time.monotonic()
            self._next = ended + max(1.0, 99 * (ended - began))


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """Recognise a lack of memory, on a GPU or a CPU, and say what to do about it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in _SAID):
        return OutOfMemory(
            "out of memory; halve train.tokens_per_batch (the batch size and the result stay the same)"
        )
    return None


def fits(work: Callable[[], object]) -> bool:
    """Do some work; say whether the memory was enough for it. What it held is free again afterwards."""
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error) is None:
            raise
    else:
        return True
    gc.collect()  # an exception and its frames can hold each other
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def halved(tokens: int) -> int:
    """Return the next smaller size of a batch.

    Raises:
        OutOfMemory: there is none.
    """
    if tokens // 2 < FLOOR:
        raise OutOfMemory(
            f"out of memory with batches of {tokens} tokens or of one document; lower max_length, set "
            "train.gradient_checkpointing=true, or close other programs"
        )
    return tokens // 2


def by_parts(
    model: Classifier | MaskedModel,
    data: Encoded,
    indices: Array,
    tokens_per_batch: int,
    work: Callable[[Array], object],
) -> None:
    """Do some work without gradients on micro-batches, on smaller ones where the memory is not enough.

    Args:
        model: what works; the size that it has room for is kept for its next documents.
        data: the split.
        indices: the documents.
        tokens_per_batch: of the micro-batches.
        work: called with the documents of each, and again with fewer of them where it ran out of memory.

    Raises:
        OutOfMemory: the smallest size is too large as well.
    """
    tokens = min(tokens_per_batch, _room.get(model, tokens_per_batch))
    parts = micro_batches(data, indices, tokens, model.padding)
    while parts:
        if fits(partial(work, parts[0])):
            del parts[0]
            continue
        before, tokens = tokens, halved(tokens)
        if model not in _room:
            say(f"out of memory with batches of {before:,} tokens: going on with smaller ones")
        _room[model] = tokens
        parts = micro_batches(data, np.concatenate(parts), tokens, model.padding)
