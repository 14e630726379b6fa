"""Numbers that do not fit the memory: written once, one after another, into a file without a name, and read by slices.

The file lies in the runs folder, whose disk is meant for much, and has no name: it is gone with the process that made
it, however that ends. It is read by calls and not mapped, for the pages of a mapped file count as the process's memory.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from distill.runs import runs_folder
from distill.tasks import Array

Slices = Any
"""An array, or what gives slices of one: ``Spool`` or ``Joined``."""


class Spool:
    """An array ``(n, *row)`` on disk.

    Args:
        dtype: of the numbers.
        row: the shape of what is counted.
    """

    def __init__(self, dtype: Any, row: tuple[int, ...] = ()) -> None:
        self.dtype = np.dtype(dtype)
        self.row = row
        self._each = self.dtype.itemsize * int(np.prod(row))
        self._count = 0
        folder = runs_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", dir=folder)
        Path(name).unlink()
        self._handle = handle

    def append(self, values: Array) -> None:
        """Write ``(k, *row)`` more."""
        rest = np.ascontiguousarray(values, self.dtype).tobytes()
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        self._count += len(values)

    def __del__(self) -> None:
        os.close(self._handle)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> Array:
        start, stop, step = part.indices(self._count)
        assert step == 1
        found = os.pread(self._handle, max(stop - start, 0) * self._each, start * self._each)
        return np.frombuffer(found, self.dtype).reshape(-1, *self.row)


class Joined:
    """Arrays one after another, without a copy; a slice must lie in one of them."""

    def __init__(self, parts: Sequence[Slices]) -> None:
        self._parts: list[Slices] = [
            p for part in parts for p in (part._parts if isinstance(part, Joined) else [part])
        ]
        self._starts = [0, *accumulate(len(part) for part in self._parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> Array:
        at = bisect_right(self._starts, part.start, hi=len(self._parts)) - 1
        start = self._starts[at]
        found: Array = self._parts[at][part.start - start : part.stop - start]
        return found
