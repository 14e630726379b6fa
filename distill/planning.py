"""What a run will cost, before it is run: rows, lengths, steps, tokens, FLOPs, memory, disk. Trains nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.batching import steps_per_epoch
from distill.encoding import Encoded
from distill.errors import DataError
from distill.runs import runs_folder
from distill.schema import Train

PERCENTILES = (5, 50, 95, 100)


@dataclass(frozen=True)
class Cost:
    """An estimate."""

    steps: int
    tokens: int
    """Read in training, special ones included, as often as they are drawn."""
    flops: float
    """Of training; evaluations are not in it."""
    parameters: int
    memory: int
    """Bytes: weights, gradients, two moments, and the activations of one batch."""
    disk: int
    """Bytes: the model and the checkpoints while it trains."""


@dataclass(frozen=True)
class Reading:
    """What a model computes of each token."""

    weights: int
    """Numbers of the layers' matrices that every token is multiplied by. Embeddings are looked up, and the classifier
    reads one token of a window: neither counts."""
    trained: int
    """Those of them that are trained."""
    hidden: int
    depth: int
    """Layers that compute attention for every token."""
    trained_depth: int
    keys: Callable[[int], int]
    """From a window's length to the keys that each of its queries sees, 0 where there is no attention."""

    def forward(self, tokens: float, pairs: float) -> float:
        """Return the FLOPs of a forward pass over so many tokens, whose queries see ``pairs`` keys together.

        A weight is a multiplication and an addition a token (Kaplan et al. 2020, section 2.1); a key is as many as
        two rows of the hidden width have, one for its score and one for its value.
        """
        return 2 * self.weights * tokens + 4 * self.hidden * self.depth * pairs

    def step(self, tokens: float, pairs: float) -> float:
        """Return the FLOPs of forward and backward passes: what is trained costs three times as much."""
        backward = 4 * self.trained * tokens + 8 * self.hidden * self.trained_depth * pairs
        return self.forward(tokens, pairs) + backward


def amount(encoded: Encoded, keys: Callable[[int], int]) -> tuple[float, float]:
    """Count the tokens of an epoch, and the keys that their queries see together in a layer."""
    often = None if encoded.weights is None else np.repeat(encoded.weights, encoded.window_counts)
    counts = np.bincount(np.diff(encoded.windows), often)  # by length
    found = [(length * counts[length], keys(length)) for length in np.flatnonzero(counts).tolist()]
    return float(sum(tokens for tokens, _ in found)), float(sum(tokens * seen for tokens, seen in found))


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
    documents: Encoded,
    reading: Reading,
) -> Cost:
    """Estimate a training run's tokens, FLOPs, memory and disk.

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
    passes = steps / steps_per_epoch(documents.draws, settings.batch_size)
    read, pairs = amount(documents, reading.keys)
    flops = passes * reading.step(read, pairs)
    return Cost(steps, round(passes * read), flops, parameters, weights + moments + activations, disk)


def cache_bytes(documents: int, rows: int, classes: int, dtype: str) -> int:
    """Count the bytes of cached logits: an id for each document, and ``rows`` of logits (of spans, one a unit)."""
    return 8 * documents + np.dtype(dtype).itemsize * classes * rows


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
