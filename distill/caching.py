"""A teacher by any of its names, and its logits for a recipe's rows: opened where they are cached, computed where not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill import (
    fitting,
    gate,
    hub,
    inference,
    logits,
    memory,
    models,
    planning,
    runs,
    tracking,
)
from distill.data import Corpus
from distill.encoding import concatenate
from distill.errors import UsageError
from distill.files import reporting_disk
from distill.progress import say
from distill.runs import RunFolder
from distill.schema import Model, Recipe


@dataclass(frozen=True)
class TeacherRef:
    """A teacher that was found: a run of ours, or a classifier from elsewhere."""

    name: str
    model: Path | str
    """The folder, or the hub id."""
    run: RunFolder | None


def find_teacher(name: str, key: str = "--teacher") -> TeacherRef:
    """Find a teacher by run name, MLflow run id, folder or hub id.

    Raises:
        UsageError: nothing has that name, or the run has not finished.
        HubError: a hub id that is neither here nor reachable.
    """
    if len(name) == 32 and all(c in "0123456789abcdef" for c in name):
        found = tracking.find_run(name)
        if found is not None:
            name = found.name
        else:
            folder = tracking.download(name, runs.runs_folder() / "_downloads")
            if folder is None:
                raise UsageError(
                    f"{key}: neither a run here nor one on the tracking server has the MLflow id {name}"
                )
            return TeacherRef(name, folder, None)
    looks_like_path = "/" in name or name.startswith(("~", "."))
    if not looks_like_path and not name.startswith("package://"):
        run = runs.find(name)
        state = run.read()
        if state.status != "finished":
            raise UsageError(
                f"{key}: {name} has not finished ({state.status}); distill {'teacher' if state.role == 'teacher' else 'student'} --resume {name}"
            )
        if state.role == "baseline":
            raise UsageError(f"{key}: {name} is TF-IDF, whose logits cannot be cached; take another teacher")
        return TeacherRef(name, run.model, run)
    return TeacherRef(name, hub.checkpoint(name, key), None)


def cache_logits(
    teacher: TeacherRef, recipe: Recipe, corpus: Corpus, splits: Sequence[str] | None = None
) -> logits.Logits:
    """Write down a teacher's logits for the recipe's rows, where they are missing, and open the cache.

    Raises:
        LogitsError: the teacher's labels are not the data's, its logits depend on the batch, or its
            quality is not what it was.
    """
    reads = models.read_settings(teacher.model)
    config = None if reads else _reading_of(recipe, teacher)
    model = models.load(teacher.model, config)
    gate.check_kind(model.task.kind, corpus.task.kind, teacher.name)
    note = gate.check_labels(model.labels, corpus.task.labels, teacher.name)
    if note:
        say(note)
        model.task = corpus.task
    precision = inference.resolve_precision(recipe.cache.precision)
    accelerator = inference.make_accelerator("fp32")
    model.to(accelerator.device).eval()
    key = logits.key_of(model, precision, recipe.cache.dtype)
    folder = logits.folder_of(key)
    names = [name for name in (splits or recipe.cache.splits) if name in corpus.splits]
    wanted = np.concatenate([corpus.splits[name].row_id for name in names])
    cached = logits.opened(folder, key, wanted)
    if cached is not None:
        return cached
    del wanted
    everything = concatenate([fitting.encode_rows(model, corpus.splits[name]) for name in names])
    memory.release_memory()
    rows = len(everything) if everything.units is None else int(everything.units.sum())
    planning.require_disk(
        2 * planning.cache_bytes(len(everything), rows, corpus.task.classes, recipe.cache.dtype)
    )
    began = time.monotonic()
    mend = reporting_disk("mend that; distill cache goes on at the rows that are missing")
    with mend, fitting.reporting_memory():
        computed = logits.fill(
            folder, key, model, everything, recipe.cache, accelerator, f"caching logits of {teacher.name}"
        )
    if accelerator.is_main_process:
        seconds = time.monotonic() - began
        passed: dict[str, Any] = {"largest_difference": gate.check_invariance(folder, key, model, everything)}
        del everything  # it may be large, and so may the index of the cache
        if "validation" in names:
            evaluated = (
                teacher.run.metrics()["validation"][corpus.task.metric]
                if teacher.run and _same_data(teacher.run, corpus)
                else None
            )
            held_out = corpus.splits["validation"]
            assert held_out.truth is not None
            found = logits.Logits(folder, key, verify=False)(held_out.row_id)
            passed[corpus.task.metric] = gate.check_quality(
                corpus.task.kind,
                found,
                held_out.truth,
                corpus.task.metric,
                evaluated,
                teacher.name,
            )
        with reporting_disk("mend that; distill cache writes the rest"):
            logits.write_manifest(folder, passed)
        say(
            f"cached logits of {computed:,} documents in {seconds:.0f} s ({computed / max(seconds, 1e-9):.0f}/s): {folder.name}"
        )
    accelerator.wait_for_everyone()
    return logits.Logits(folder, key)


def _same_data(run: RunFolder, corpus: Corpus) -> bool:
    return run.read().facts.get("data") == corpus.fingerprint


def _reading_of(recipe: Recipe, teacher: TeacherRef) -> Model | None:
    """How a teacher from elsewhere reads: as the recipe's teacher does where it is of that architecture."""
    found = models.load(teacher.model).config
    if found.architecture != recipe.teacher.architecture:
        return None
    changes = {
        "checkpoint": str(teacher.model),
        "max_length": min(found.max_length, recipe.teacher.max_length),
    }
    return recipe.teacher.model_copy(update=changes)
