"""Logits of a whole split, on one process or many; and the device and precision they are computed in."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, Literal

import numpy as np
import torch

from distill import processes, sharding
from distill.batching import collate, micro_batches
from distill.encoding import Encoded
from distill.errors import Diverged, RecipeError
from distill.memory import by_parts
from distill.models import Classifier
from distill.progress import Tracker, track
from distill.tasks import Array, Floats

Precision = Literal["fp32", "bf16", "fp16"]


def resolve_precision(wish: Literal["auto"] | Precision) -> Precision:
    """Turn ``auto`` into what this hardware multiplies fast: bf16, else fp16 on a GPU, else fp32.

    Raises:
        RecipeError: fp16 without a GPU.
    """
    cuda = torch.cuda.is_available()
    if wish == "auto":
        if cuda:
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        has = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return "bf16" if has() else "fp32"
    if wish == "fp16" and not cuda:
        raise RecipeError("train.precision: fp16 needs a GPU; set it to auto, bf16 or fp32")
    return wish


def make_accelerator(precision: Precision) -> Any:
    """Make Accelerate's Accelerator; one process may need several, one after another.

    Raises:
        UsageError: it sees another number of processes than were started.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Its state is global and refuses a second precision, though a cache pass and a training run may differ.
    AcceleratorState._reset_state()
    if processes.count() > 1:
        processes.state()  # joins the job, with the timeout
    # Without this word it overlooks the other processes of a job on CPUs.
    several_cpus = processes.count() > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=several_cpus)
    processes.check(accelerator)
    return accelerator


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context in which a forward pass runs in this precision."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def predict(
    model: Classifier,
    data: Encoded,
    indices: Array,
    tokens_per_batch: int,
    precision: Precision,
    progress: Tracker | None = None,
) -> Floats:
    """Compute logits of some documents on this process.

    Args:
        model: in evaluation mode, on its device.
        data: the split.
        indices: ``(n,)`` the documents.
        tokens_per_batch: of a forward pass, padding included.
        precision: of the forward pass.
        progress: advanced by tokens.

    Returns:
        ``(n, classes)`` float32, or as in tasks.py, in the order of ``indices``, which are all different.
    """
    device = next(model.parameters()).device
    result = data.blank(indices, model.task.classes)
    order = np.argsort(indices)

    def work(part: Array) -> None:
        with torch.inference_mode(), autocast(precision, device):
            found = model(collate(data, part).to(device)).float().cpu().numpy()
        result[order[np.searchsorted(indices, part, sorter=order)], : found.shape[1]] = found
        if progress is not None:
            progress.advance(int(data.tokens[part].sum()))

    by_parts(model, data, indices, tokens_per_batch, work)
    return result


def predict_all(
    model: Classifier,
    data: Encoded,
    tokens_per_batch: int,
    precision: Precision,
    accelerator: Any,
    title: str | None = None,
) -> Floats:
    """Compute logits of a whole split, shared among all processes; every process gets all of them.

    The micro-batches are the same on any number of processes, and each is computed once: its logits are added to the
    other processes' zeros, which is exact. With a ``title`` the progress is shown.

    Raises:
        Diverged: a logit is not finite. (An accuracy can be computed of NaN, and would look like a figure.)
    """
    training = model.training
    model.eval()
    everything = np.arange(len(data))
    parts = micro_batches(data, everything, tokens_per_batch, model.padding)
    shares = [parts[at :: accelerator.num_processes] for at in range(accelerator.num_processes)]
    mine = shares.pop(accelerator.process_index)  # they come from long to short
    result = data.blank(everything, model.task.classes)
    for part in itertools.chain(*shares):
        result[part] = 0
    sharding.even_out(
        accelerator, len(mine), lambda: predict(model, data, parts[0][:1], tokens_per_batch, precision)
    )
    tokens = sum(int(data.tokens[part].sum()) for part in mine)
    shown = contextlib.nullcontext() if title is None else track(title, tokens, "tokens")
    with shown as progress:
        for part in mine:
            found = predict(model, data, part, tokens_per_batch, precision, progress)
            result[part, : found.shape[1]] = found
    model.train(training)
    if accelerator.num_processes > 1:
        summed = accelerator.reduce(torch.from_numpy(result).to(accelerator.device), "sum")
        result = np.asarray(summed.cpu().numpy())
    if not np.isfinite(result).all():
        raise Diverged(
            "the model's logits are not finite; lower train.learning_rate, or set train.precision=fp32"
        )
    return result
