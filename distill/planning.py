"""What a run will cost, before it is run: rows, lengths, steps, memory, disk. Trains nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.encoding import Encoded
from distill.errors import DataError
from distill.runs import runs_folder
from distill.schema import Train

PERCENTILES = (5, 50, 95, 100)


@dataclass(frozen=True)
class Cost:
    """An estimate."""

    steps: int
    parameters: int
    memory: int
    """Bytes: weights, gradients, two moments, and the activations of one batch."""
    disk: int
    """Bytes: the model and the checkpoints while it trains."""


def lengths(encoded: Encoded) -> dict[int, int]:
    """Return percentiles of the documents' lengths in tokens."""
    return {p: int(np.percentile(encoded.full_length, p)) for p in PERCENTILES}


def truncated(encoded: Encoded) -> float:
    """Return the share of documents of which the view leaves something out.

    A document loses tokens when its windows hold fewer than it has (those that overlap count twice, so
    with overlapping chunks this is a lower bound).
    """
    read = np.add.reduceat(np.diff(encoded.windows), encoded.documents[:-1])
    return float((encoded.full_length > read).mean())


def estimate(
    parameters: int,
    trained: int,
    hidden: int,
    depth: int,
    heads: int,
    longest: int,
    settings: Train,
    steps: int,
) -> Cost:
    """Estimate a training run's memory and disk.

    Activations: about 16 numbers of the hidden width for each token and layer, and the attention scores
    of one batch, in fp32; a quarter of that with gradient checkpointing. It is a rule of thumb, good to
    a factor of two.
    """
    tokens = max(settings.tokens_per_batch, longest)
    activations = 4 * depth * tokens * (16 * hidden + 2 * heads * longest)
    if settings.gradient_checkpointing:
        activations //= 4
    weights = 4 * parameters
    moments = 3 * 4 * trained
    # A checkpoint holds the weights, the best weights and two moments; three stand side by side for a moment.
    disk = weights + 3 * (2 * weights + 2 * 4 * trained)
    return Cost(steps, parameters, weights + moments + activations, disk)


def require_disk(needed: int, folder: Path | None = None) -> None:
    """Refuse to begin when the disk of the runs folder has too little room.

    Raises:
        DataError: with both figures.
    """
    folder = folder or runs_folder()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DataError(
            f"disk: the run needs about {size(needed)} in {folder.name}/, and {size(free)} are free; "
            "make room, or set DISTILL_RUNS to a folder on another disk"
        )


def size(count: float) -> str:
    """Write a number of bytes as people do: ``4.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
