"""Text that is read from its beginning, batch by batch, whenever it is wanted: never held, and never copied.

Of each row of a source a stream keeps one byte: whether it is among the documents. Knows no format, which is the
business of ``datasets``, and no row id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import DataError
from distill.tasks import Array

if TYPE_CHECKING:
    import datasets

READ_AT_ONCE = 1000
"""Rows."""


@dataclass(frozen=True)
class Shards:
    """Parquet files, one after another. Of each a few rows are held, and not a row group, which may be all of it."""

    files: tuple[str, ...]
    features: datasets.Features
    """Of the first; the others have its columns."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, as a data set has them."""
        return list(self.features)

    def tables(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield ``READ_AT_ONCE`` rows at a time, as Arrow's batches."""
        from pyarrow.parquet import ParquetFile

        for name in self.files:
            with ParquetFile(name, pre_buffer=False, buffer_size=1 << 20) as file:
                yield from file.iter_batches(READ_AT_ONCE, columns=list(columns), use_threads=False)


Source = Any
"""``datasets.Dataset``, ``datasets.IterableDataset`` or ``Shards``."""


def read(source: Source, columns: Sequence[str], where: str) -> Iterator[dict[str, list[Any]]]:
    """Yield a source's columns, ``READ_AT_ONCE`` rows at a time.

    Args:
        source: of any kind.
        columns: which of its columns.
        where: its address, for messages.

    Raises:
        DataError: it cannot be read any further.
    """
    import datasets

    if isinstance(source, datasets.Dataset):
        yield from source.select_columns(list(columns)).iter(READ_AT_ONCE)
        return
    try:
        if isinstance(source, Shards):
            tables = source.tables(columns)
        else:
            tables = source.select_columns(list(columns)).with_format("arrow").iter(READ_AT_ONCE)
        for table in tables:
            yield table.to_pydict()
    except (ValueError, OSError) as error:  # Arrow's are of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{where}: cannot be read: {reason}") from None


@dataclass(frozen=True)
class Part:
    """Some rows of one source."""

    source: Source
    columns: tuple[str, ...]
    """Of the text and, for pairs, of the second one."""
    kept: Array
    """``(rows of the source,)`` bool."""
    where: str
    """The source, for messages."""


@dataclass(frozen=True)
class Stream:
    """Documents of one source after another, in their order."""

    parts: tuple[Part, ...]

    def batches(self) -> Iterator[list[tuple[str, str | None]]]:
        """Yield all documents as (text, text_pair or None)."""
        for part in self.parts:
            at = 0
            for batch in read(part.source, part.columns, part.where):
                fields = [
                    ["" if cell is None else str(cell) for cell in batch[name]] for name in part.columns
                ]
                seconds: Sequence[str | None] = fields[1] if len(fields) > 1 else [None] * len(fields[0])
                kept = np.flatnonzero(part.kept[at : at + len(seconds)]).tolist()
                at += len(seconds)
                if kept:
                    yield [(fields[0][row], seconds[row]) for row in kept]

    def select(self, positions: Array) -> Stream:
        """Take some of the documents, ``(n,)`` positions in ascending order."""
        counts = np.cumsum([0, *(int(part.kept.sum()) for part in self.parts)])
        parts = []
        for part, start, end in zip(self.parts, counts[:-1], counts[1:], strict=True):
            own = positions[np.searchsorted(positions, start) : np.searchsorted(positions, end)] - start
            kept = np.zeros_like(part.kept)
            kept[np.flatnonzero(part.kept)[own]] = True
            parts.append(Part(part.source, part.columns, kept, part.where))
        return Stream(tuple(parts))


def parts_of(texts: datasets.Dataset | Stream) -> tuple[Part, ...]:
    """Return documents as parts of a stream; a data set's columns are named as in ``Rows``."""
    if isinstance(texts, Stream):
        return texts.parts
    columns = tuple(name for name in ("text", "text_pair") if name in texts.column_names)
    return (Part(texts, columns, np.ones(len(texts), bool), "data.source"),)
