"""The one training loop, for teachers, students and pre-training, on one process or many, through Accelerate.

They differ in their model, documents and objective; all are passed in. The loop knows no
architecture and no file but its checkpoints and its journal.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distill import checkpoint, memory, models, sharding
from distill.batching import collate, micro_batches, share, steps, steps_per_epoch
from distill.checkpoint import TrainState
from distill.encoding import Encoded
from distill.errors import Diverged, Interrupted
from distill.gradients import TermGradients
from distill.live import Pair
from distill.losses import Objective
from distill.masked_live import MaskedPair
from distill.masking import MaskedModel
from distill.memory import release_memory
from distill.models import Classifier
from distill.progress import say, track
from distill.runs import RunFolder
from distill.schema import Train
from distill.tasks import Array, Floats, better

Lookup = Callable[[Array], Floats]
"""Row ids ``(documents,)`` to teacher logits ``(documents, classes)``."""
Evaluate = Callable[[Any], dict[str, float]]
"""Validation figures by name."""
ONE_WISH = 1.0
"""Seconds within which a second SIGTERM repeats the first."""


@dataclass(frozen=True)
class Trained:
    """What came of a training run; the model holds its best weights."""

    steps: int
    seconds: float
    tokens: int
    best: float
    best_step: int


class TooLarge(Exception):
    """A process of the job has no memory for its share of a step; no process has applied anything of the step."""


class NotFinite(Exception):
    """The loss of a step, or its gradient, is not finite; no process has applied anything of the step."""

    def __init__(self, figures: dict[str, float], rows: list[int]) -> None:
        super().__init__()
        self.what = "gradient" if math.isfinite(figures["loss"]) else "loss"
        self.figures = figures
        self.rows = rows
        """Row ids of the documents whose own loss is not finite."""


class Stop:
    """Whether somebody asked this process to end, and when: the first signal waits for the step's end."""

    asked = False
    at = 0.0


@contextmanager
def listening() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a wish, so that a checkpoint can be written; a second ends at once."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        # A scheduler's SIGTERM reaches a launcher and its processes, and the launcher passes it on: that is one wish.
        if stop.asked and (number == signal.SIGINT or time.monotonic() - stop.at > ONE_WISH):
            raise KeyboardInterrupt
        stop.asked, stop.at = True, time.monotonic()

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def total_steps(settings: Train, documents: int) -> int:
    """Count the optimizer steps of a run."""
    each = steps_per_epoch(documents, settings.batch_size)
    total = max(1, math.ceil(settings.epochs * each))
    return total if settings.max_steps is None else min(total, settings.max_steps)


def learning_rate(settings: Train, step: int, total: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up, then the schedule down to 0.

    The published recipes' warm-ups may be longer than a short trial of theirs: it is cut to a tenth then.
    """
    warmup = settings.warmup_steps if settings.warmup_steps < total else total // 10
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    gone = (step - warmup) / max(1, total - warmup)
    factor = 1 - gone if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * gone))
    return settings.learning_rate * factor


def make_optimizer(model: torch.nn.Module, settings: Train) -> torch.optim.Optimizer:
    """Make AdamW (Loshchilov and Hutter 2019), fused; biases and norms do not decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def train(
    model: Classifier | MaskedModel,
    data: Encoded,
    objective: Objective,
    settings: Train,
    evaluate: Evaluate,
    metric: str,
    folder: RunFolder,
    accelerator: Any,
    meaning: dict[str, Any],
    lookup: Lookup | None = None,
    on_evaluation: Callable[[], object] = lambda: None,
    pair: Pair | MaskedPair | None = None,
    *,
    any_processes: bool = False,
) -> Trained:
    """Train a model; it holds the weights of its best evaluation afterwards.

    Args:
        model: on any device; Accelerate moves it.
        data: labelled and unlabelled documents, the same on every process.
        objective: the weighted terms.
        settings: the recipe's.
        evaluate: validation figures; it is called on every process.
        metric: which of them selects.
        folder: the run's, for checkpoints and the journal.
        accelerator: Accelerate's, made for ``settings.precision``.
        meaning: what a resume must find equal.
        lookup: the teacher's logits by row id, when the objective reads them.
        on_evaluation: called on the main process after each evaluation, for trackers.
        pair: the model with its teacher beside it, when the objective needs it live.
        any_processes: go on with a checkpoint of another number of processes, too.

    Raises:
        Diverged: the loss, or the gradient, was not finite at more steps than may be left out.
        OutOfMemory: the smallest batch of tokens is too large.
        Interrupted: somebody asked to stop; a checkpoint has been written.
    """
    if settings.gradient_checkpointing:
        models.checkpoint_activations(model.model)
    models.freeze(model.model, settings.freeze_embeddings, settings.freeze_layers)
    learner = model if pair is None else pair
    optimizer = make_optimizer(learner, settings)
    total = total_steps(settings, data.draws)
    every = settings.evaluate_every or steps_per_epoch(data.draws, settings.batch_size)
    lengths = data.tokens
    rank = accelerator.process_index
    saves = accelerator.is_main_process or sharding.is_on(accelerator)
    wrapped, optimizer = accelerator.prepare(learner, optimizer)
    if isinstance(wrapped, DistributedDataParallel):
        # No buffer of these models changes, and a process that runs out of memory in a step's first forward pass
        # would wait for the others to send theirs again.
        wrapped.broadcast_buffers = False
    if pair is not None:
        pair.teacher.to(accelerator.device)

    state, best_weights = TrainState(meaning=meaning), None
    whole = checkpoint.latest(folder.checkpoints)
    if whole is not None:
        state, best_weights = checkpoint.load(
            whole, learner, optimizer.optimizer, meaning, any_processes=any_processes
        )
    if state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    if state.tokens_per_batch:
        settings = settings.model_copy(update={"tokens_per_batch": state.tokens_per_batch})
    began = time.monotonic() - state.seconds
    tidy = memory.Releases()

    def save() -> Path:
        state.seconds = time.monotonic() - began
        if accelerator.scaler is not None:
            state.scaler = accelerator.scaler.state_dict()
        return checkpoint.save(folder.checkpoints, learner, optimizer.optimizer, best_weights, state, whole)

    wrapped.train()
    losses: dict[str, float] = {}
    with track(f"{folder.name}: training", total, "steps") as progress, listening() as stop:
        progress.skip(state.step)
        for documents in steps(len(data), settings.batch_size, settings.seed, state.step, data.weights):
            if state.step >= total or (settings.patience and state.since_best >= settings.patience):
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, state.step, total)
            evaluated = (state.step + 1) % every == 0 or state.step + 1 == total
            logged = evaluated or (state.step + 1) % 10 == 0
            now, norms = objective.at(state.step, total), logged and settings.log_gradient_norms
            tried = settings.tokens_per_batch
            while True:
                # Dropout, and what is masked, is a function of (seed, step, rank): a resumed run repeats it to the bit.
                torch.manual_seed(
                    int(np.random.SeedSequence([settings.seed, state.step, rank]).generate_state(1)[0])
                )
                try:
                    losses = _step(
                        wrapped,
                        learner,
                        data,
                        documents,
                        lengths,
                        now,
                        settings,
                        optimizer,
                        accelerator,
                        lookup,
                        norms,
                    )
                except TooLarge:
                    state.tokens_per_batch = memory.halved(settings.tokens_per_batch)
                    settings = settings.model_copy(update={"tokens_per_batch": state.tokens_per_batch})
                    continue
                except NotFinite as failed:
                    _leave_out(failed, data.row_id[documents], state, settings, folder, accelerator)
                    losses = {}
                break
            if settings.tokens_per_batch < tried and accelerator.is_main_process:
                say(
                    f"{folder.name}: out of memory at step {state.step + 1} with train.tokens_per_batch={tried}: "
                    f"going on with {settings.tokens_per_batch}; the batch size and the result stay the same"
                )
                folder.log(state.step + 1, {"train/tokens_per_batch": settings.tokens_per_batch})
            state.step += 1
            tidy()
            state.tokens += int(lengths[documents].sum())
            progress.advance(1, f"loss {losses['loss']:.3f}" if losses else "left out")
            asked = _any_rank(stop.asked, accelerator)
            figures = {f"train/{name}": value for name, value in (losses | now.scheduled).items()}
            if evaluated:
                state.seconds = time.monotonic() - began
                figures["train/learning_rate"] = learning_rate(settings, state.step - 1, total)
                figures["train/tokens_per_second"] = state.tokens / max(state.seconds, 1e-9)
                release_memory()
                found = evaluate(model)
                release_memory()
                wrapped.train()
                if better(metric, found[metric], state.best):
                    state.best, state.best_step, state.since_best = found[metric], state.step, 0
                    best_weights = sharding.weights(model)
                else:
                    state.since_best += 1
                if accelerator.is_main_process:
                    folder.log(state.step, figures | {f"eval/{name}": value for name, value in found.items()})
                if saves:
                    whole = save()
                if accelerator.is_main_process:
                    on_evaluation()
            elif logged and accelerator.is_main_process:
                folder.log(state.step, figures)
            if asked and state.step < total:
                if saves:
                    save()
                accelerator.wait_for_everyone()
                raise Interrupted(
                    f"{folder.name}: stopped at step {state.step} of {total}; --resume {folder.name} goes on from there"
                )
    if best_weights is None or state.best is None:
        raise Diverged(f"{folder.name}: no evaluation gave a {metric}; the model's outputs are not finite")
    sharding.load(model, best_weights)
    return Trained(state.step, state.seconds, state.tokens, state.best, state.best_step)


def _any_rank(asked: bool, accelerator: Any) -> bool:
    """Say whether any process was asked to stop, so that all stop at the same step."""
    if accelerator.num_processes == 1:
        return asked
    flag = torch.tensor([int(asked)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())


def _leave_out(
    failed: NotFinite, rows: Array, state: TrainState, settings: Train, folder: RunFolder, accelerator: Any
) -> None:
    """Write a step down that is not applied, and go on where the recipe allows another one.

    Raises:
        Diverged: it does not.
    """
    state.skipped += 1
    step, named = state.step + 1, ", ".join(str(row) for row in failed.rows[:3])
    reason = f"{folder.name}: the {failed.what} is not finite at step {step}"
    reason += f" (row id {named}{', …' if len(failed.rows) > 3 else ''})" if failed.rows else ""
    if accelerator.is_main_process:
        folder.log(step, {}, "not_finite", rows=rows.tolist(), not_finite=failed.rows)
    if state.skipped > settings.skip_nonfinite:
        raise Diverged(
            f"{reason}: {failed.figures}; lower train.learning_rate, set train.precision=fp32, or allow a few such "
            "steps by train.skip_nonfinite"
        ) from None
    say(f"{reason}; the step is left out, {state.skipped} of {settings.skip_nonfinite} that may be")


def _step(
    wrapped: Any,
    model: Classifier | Pair | MaskedModel | MaskedPair,
    data: Encoded,
    documents: Array,
    lengths: Array,
    objective: Objective,
    settings: Train,
    optimizer: Any,
    accelerator: Any,
    lookup: Lookup | None,
    norms: bool = False,
) -> dict[str, float]:
    """Make one optimizer step over ``documents``; return the mean of each term, unweighted, and their sum.

    Each term is divided by the number of documents that it applies to in the whole step, so that neither
    the cut into micro-batches nor the number of processes changes it. With ``norms`` the norm of each term's
    gradient is returned as well.

    Raises:
        TooLarge: on every process, where one has no memory for its share. Nothing has been applied.
        NotFinite: on every process: the loss, or the gradient. Nothing has been applied.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = share(documents, lengths, rank, world)
    idle = len(mine) == 0  # the last step of an epoch may have fewer documents than there are processes
    labelled = max(1, int(data.labelled[documents].sum()))
    counts = [labelled if term.needs_label else len(documents) for term in objective.terms]
    parts = micro_batches(data, documents[:1] if idle else mine, settings.tokens_per_batch, model.padding)
    if world > 1 and len(parts) == 1 and len(parts[0]) > 1:
        # The last backward pass waits for all processes, so that none may run out of memory in it: it is never
        # the first to be tried. The longest documents come first.
        middle = len(parts[0]) // 2
        parts = [parts[0][:middle], parts[0][middle:]]
    sums = torch.zeros(len(objective.terms), device=accelerator.device)
    gradients = TermGradients(model, len(objective.terms)) if norms else None
    told: list[tuple[Array, Tensor]] = []  # documents with their losses, unweighted

    def blank() -> None:
        with accelerator.no_sync(wrapped):
            accelerator.backward(wrapped(collate(data, documents[:1]).to(accelerator.device)).sum() * 0.0)

    def work(indices: Array) -> None:
        logits = lookup(data.row_id[indices]) if lookup and objective.needs_logits else None
        batch = collate(data, indices, logits).to(accelerator.device)
        found = wrapped(batch, objective) if isinstance(model, MaskedPair) else wrapped(batch)
        student, live = found if isinstance(model, Pair | MaskedPair) else (found, {})
        loss: Tensor = (student.sum() + sum(values.sum() for values in live.values())) * 0.0
        for number, (term, count) in enumerate(zip(objective.terms, counts, strict=True)):
            each = live[number] if number in live else objective.per_document(term, student, batch)
            value = each.sum() / count
            if not idle:
                told.append((indices, each.detach()))
                sums[number] += value.detach()
                loss = loss + objective.weight(term) * value
                if gradients is not None:
                    gradients.add(number, value)
        # Gradients are averaged over processes; the terms above are shares of one sum.
        accelerator.backward(loss * world)

    def fits(indices: Array) -> bool:
        if sharding.is_on(accelerator):  # each forward pass waits for all: there is no going back alone
            work(indices)
            return True
        return memory.fits(partial(work, indices))

    sharding.even_out(accelerator, len(parts), blank)
    with accelerator.no_sync(wrapped):
        enough = all(fits(indices) for indices in parts[:-1])
    if world == 1:
        enough = enough and fits(parts[-1])
    elif enough := not _any_rank(not enough, accelerator):
        work(parts[-1])
    if not enough:
        optimizer.zero_grad(set_to_none=True)
        raise TooLarge
    if world > 1:
        sums = accelerator.reduce(sums, "sum")
    values, names = sums.tolist(), objective.names
    result = {"loss": sum(objective.weight(t) * v for t, v in zip(objective.terms, values, strict=True))}
    result |= {f"loss_{name}": value for name, value in zip(names, values, strict=True)}
    finite = math.isfinite(result["loss"])
    if finite:
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip_norm or math.inf)
        # In fp16 gradients that are too large are usual: the scaler leaves such a step out and lowers its factor.
        finite = accelerator.scaler is not None or math.isfinite(sharding.whole(norm))
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not finite:
        bad = [data.row_id[indices[~each.isfinite().cpu().numpy()]].tolist() for indices, each in told]
        raise NotFinite(result, sorted(set(gather_object([row for rows in bad for row in rows]))))
    if gradients is not None:
        found = gradients.norms(accelerator)
        result |= {f"gradient_norm_{name}": norm for name, norm in zip(names, found, strict=True)}
    return result
