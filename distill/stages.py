"""The stages: train a teacher, cache its logits, train students with their controls, each a run folder.

Joins the other modules; what a stage needs is checked before any training starts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill import (
    catalog,
    data,
    hub,
    inference,
    logits,
    models,
    planning,
    processes,
    runs,
    tracking,
    yaml_strict,
)
from distill import recipe as recipes
from distill.data import Corpus, Rows
from distill.encoding import Encoded, concatenate, encode
from distill.errors import RecipeError, UsageError
from distill.evaluation import Predictions, measure
from distill.inference import Precision
from distill.losses import Objective
from distill.models import Classifier
from distill.progress import say, track
from distill.recipe import Loss, Model, Recipe, Student, Train
from distill.runs import Role, Run, RunFolder
from distill.tasks import Floats, quality
from distill.training import Lookup, total_steps, train


@dataclass(frozen=True)
class TeacherRef:
    """A teacher that was found: a run of ours, or a classifier from elsewhere."""

    name: str
    model: Path | str
    """The folder, or the hub id."""
    run: RunFolder | None


@dataclass(frozen=True)
class Plan:
    """What a dry run shows."""

    title: str
    splits: dict[str, dict[str, Any]]
    """Of each split: rows, label counts, token-length percentiles, share of documents truncated."""
    cost: planning.Cost
    notes: list[str] = field(default_factory=list)


def load_corpus(recipe: Recipe) -> Corpus:
    """Read the data and say what was left out."""
    corpus = data.load(recipe)
    for note in corpus.notes:
        say(note)
    for name, rows in corpus.splits.items():
        say(f"{name}: {len(rows):,} documents")
    return corpus


def _encode(model: Classifier, rows: Rows) -> Encoded:
    with track(f"tokenising {rows.name}", len(rows)) as progress:
        return encode(model.tokenizer, rows, model.config, progress)


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
        return TeacherRef(name, run.model, run)
    return TeacherRef(name, hub.checkpoint(name, key), None)


def _precision(settings: Train) -> Precision:
    return inference.resolve_precision(settings.precision)


def _fits(model: Classifier, settings: Train, documents: Encoded) -> planning.Cost:
    """Estimate what training a model costs."""
    config = model.model.config
    parameters = model.parameters_count
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hidden = int(getattr(config, "hidden_size", 0) or config.dim)
    heads = int(getattr(config, "num_attention_heads", 0) or config.n_heads)
    longest = int(documents.longest_window.max())
    steps = total_steps(settings, len(documents))
    return planning.estimate(
        parameters, trained, hidden, len(models.layers(model.model)), heads, longest, settings, steps
    )


def _plan(
    title: str, corpus: Corpus, model: Classifier, settings: Train, trained: Sequence[str], notes: list[str]
) -> Plan:
    """Describe a training run without running it."""
    splits: dict[str, dict[str, Any]] = {}
    documents = []
    for name, rows in corpus.splits.items():
        encoded = _encode(model, rows)
        splits[name] = {
            **data.describe(rows, corpus.task),
            "tokens": planning.lengths(encoded),
            "truncated": planning.truncated(encoded),
        }
        if name in trained:
            documents.append(encoded)
    return Plan(title, splits, _fits(model, settings, concatenate(documents)), notes)


@contextmanager
def _reporting_memory() -> Iterator[None]:
    """Turn a lack of memory into one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        short = inference.out_of_memory(error)
        if short is None:
            raise
        raise short from error


def _validation(
    encoded: Encoded, corpus: Corpus, tokens: int, precision: Precision, accelerator: Any
) -> Callable[[Classifier], dict[str, float]]:
    """Make the function that measures a model on validation."""

    def evaluate(model: Classifier) -> dict[str, float]:
        found = inference.predict_all(model, encoded, tokens, precision, accelerator)
        return quality(corpus.task.kind, found, encoded.labels)

    return evaluate


def _fit(
    folder: RunFolder,
    recipe: Recipe,
    corpus: Corpus,
    model: Classifier,
    encoded: dict[str, Encoded],
    settings: Train,
    objective: Objective,
    lookup: Lookup | None,
) -> None:
    """Train a model inside its run folder, measure it once on test, and write everything down."""
    precision = _precision(settings)
    accelerator = inference.make_accelerator(precision)
    processes.check(accelerator)
    initial = models.weights_hash(model.model)
    meaning = {
        "recipe": folder.recipe.read_text(encoding="utf-8"),
        "data": corpus.fingerprint,
        "initial weights": initial,
        "processes": accelerator.num_processes,
        "precision": precision,
    }
    facts = folder.read().facts | {
        "data": corpus.fingerprint,
        "initial_weights": initial,
        "precision": precision,
        "processes": accelerator.num_processes,
    }
    if accelerator.is_main_process:
        folder.update(facts=facts)
        tracking.sync(folder)
    # The model's own folder says how it reads; training data is what the objective was built for.
    evaluate = _validation(
        encoded["validation"], corpus, recipe.evaluation.tokens_per_batch, precision, accelerator
    )
    with _reporting_memory():
        done = train(
            model, encoded["train"], objective, settings, evaluate, corpus.task.metric, folder, accelerator, meaning,
            lookup, lambda: tracking.sync(folder),
        )  # fmt: skip
        test = inference.predict_all(
            model, encoded["test"], recipe.evaluation.tokens_per_batch, precision, accelerator
        )
        valid = inference.predict_all(
            model, encoded["validation"], recipe.evaluation.tokens_per_batch, precision, accelerator
        )
    if not accelerator.is_main_process:
        return
    model.save(folder.model)
    train_figures = {
        "seconds": done.seconds,
        "steps": done.steps,
        "tokens": done.tokens,
        "best_step": done.best_step,
    }
    _record(folder, recipe, corpus, test, valid, model.parameters_count, train_figures)


def _record(
    folder: RunFolder,
    recipe: Recipe,
    corpus: Corpus,
    test: Floats,
    valid: Floats,
    parameters: int,
    training: dict[str, float],
) -> None:
    """Write a finished model's figures and its predictions."""
    task, edges = corpus.task, recipe.evaluation.length_buckets

    def found(name: Any, values: Floats) -> Predictions:
        rows = corpus.splits[name]
        assert rows.labels is not None
        return Predictions(rows.row_id, values, rows.labels, rows.words)

    predictions = found("test", test)
    predictions.save(folder.predictions)
    size = sum(file.stat().st_size for file in folder.model.rglob("*") if file.is_file())
    figures = {
        "task": {"kind": task.kind, "labels": list(task.labels), "metric": task.metric},
        "test": measure(task.kind, task.metric, predictions, edges),
        "validation": measure(task.kind, task.metric, found("validation", valid), edges),
        "model": {"parameters": parameters, "bytes": size},
        "train": training,
    }
    folder.write_metrics(figures)
    folder.log(
        int(training.get("steps", 0)),
        {f"test/{k}": v for k, v in figures["test"].items() if isinstance(v, float)},
        "finished",
    )


def _new_run(name: str, role: Role, recipe: Recipe, recipe_name: str, **more: Any) -> RunFolder:
    run = Run(
        name=name, role=role, recipe=recipe_name, experiment=recipe.experiment, created=time.time(),
        **{"group": name, "seed": 0, "model": recipe.teacher.architecture, **more},
    )  # fmt: skip
    if processes.is_main():
        runs.create(run, recipe.dump())
    processes.wait()
    return RunFolder(runs.runs_folder() / name)


def train_teacher(
    recipe: Recipe, recipe_name: str, name: str | None = None, resume: str | None = None, *, dry: bool = False
) -> RunFolder | Plan:
    """Fine-tune a teacher.

    Args:
        recipe: resolved.
        recipe_name: for the run's tags.
        name: the run's; run1, run2, … where absent.
        resume: a run to go on with, whose recipe ``recipe`` is.
        dry: read the data, show the plan and train nothing.

    Returns:
        The finished run, or the plan.
    """
    if name is not None:
        runs.refuse_taken(name)
    folder = runs.find(resume) if resume else None
    if folder is not None and folder.read().status == "finished":
        raise UsageError(f"{folder.name} has finished already; there is nothing to resume")
    if recipe.teacher.checkpoint is not None:
        hub.checkpoint(
            recipe.teacher.checkpoint, "teacher.checkpoint"
        )  # before the data: it may take long to read
    corpus = load_corpus(recipe)
    for split in ("validation", "test"):
        if split not in corpus.splits:
            raise RecipeError(f"data.splits.{split} is missing")
    settings = recipe.teacher.train
    model = models.build(recipe.teacher, "teacher", corpus.task, settings.seed)
    if dry:
        return _plan(f"teacher {recipe.teacher.architecture}", corpus, model, settings, ["train"], [])
    encoded = {split: _encode(model, corpus.splits[split]) for split in ("train", "validation", "test")}
    planning.require_disk(_fits(model, settings, encoded["train"]).disk)
    if folder is None:
        folder = _new_run(runs.claim(name), "teacher", recipe, recipe_name, seed=settings.seed)
    objective = Objective(corpus.task.kind, [Loss(kind="hard")], settings.label_smoothing)
    with _working(folder):
        _fit(folder, recipe, corpus, model, encoded, settings, objective, None)
    return folder


@contextmanager
def _working(folder: RunFolder) -> Iterator[None]:
    """Work in a run folder; the tracker hears of the end, good or bad, and checkpoints go after a good one."""
    if not processes.is_main():
        yield
        processes.wait()
        return
    try:
        with folder.working():
            yield
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    finally:
        tracking.sync(folder)
    processes.wait()


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
    note = logits.check_labels(model.labels, corpus.task.labels, teacher.name)
    if note:
        say(note)
        model.task = corpus.task
    precision = inference.resolve_precision(recipe.cache.precision)
    accelerator = inference.make_accelerator("fp32")
    model.to(accelerator.device).eval()
    key = logits.key_of(model, precision, recipe.cache.dtype)
    folder = logits.folder_of(key)
    names = [name for name in (splits or recipe.cache.splits) if name in corpus.splits]
    wanted = np.unique(np.concatenate([corpus.splits[name].row_id for name in names]))
    if (folder / "manifest.json").is_file():
        cached = logits.Logits(folder, key)
        if np.isin(wanted, cached._ids).all():
            return cached
    encoded = {name: _encode(model, corpus.splits[name]) for name in names}
    everything = concatenate(list(encoded.values()))
    planning.require_disk(len(everything) * (8 + 4 * corpus.task.classes) * 2)
    began = time.monotonic()
    with _reporting_memory():
        computed = logits.fill(
            folder, key, model, everything, recipe.cache, accelerator, f"caching logits of {teacher.name}"
        )
    if accelerator.is_main_process:
        seconds = time.monotonic() - began
        gate: dict[str, Any] = {"largest_difference": logits.check_invariance(folder, key, model, everything)}
        if "validation" in encoded:
            evaluated = (
                teacher.run.metrics()["validation"][corpus.task.metric]
                if teacher.run and _same_data(teacher.run, corpus)
                else None
            )
            found = logits.Logits(folder, key, verify=False)(encoded["validation"].row_id)
            gate[corpus.task.metric] = logits.check_quality(
                corpus.task.kind,
                found,
                encoded["validation"].labels,
                corpus.task.metric,
                evaluated,
                teacher.name,
            )
        logits.write_manifest(folder, gate)
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


@dataclass(frozen=True)
class StudentJob:
    """What ``distill student`` was asked for; it is kept in each of its runs, so that they can be resumed."""

    teachers: list[str]
    recipe: str
    """Resolved, as YAML."""
    recipe_name: str
    student: str
    """The architecture, or the preset's name."""
    group: str
    seeds: int
    control: bool
    logits: str | None = None


def member(group: str, role: Role, number: int) -> str:
    """Name a run of a group: ``run2``, ``run2-control``, ``run2-seed1``, ``run2-control-seed1``."""
    middle = {"distilled": "", "control": "-control", "baseline": "-tfidf", "teacher": ""}[role]
    return f"{group}{middle}" + (f"-seed{number}" if number else "")


def _soft_targets(
    job: StudentJob, recipe: Recipe, corpus: Corpus, teachers: list[TeacherRef]
) -> tuple[Lookup, list[str]]:
    """Open (or fill) the caches of all teachers and make one look-up of them."""
    opened: list[logits.Logits]
    if job.logits is not None:
        cache = logits.Logits(logits.find(job.logits))
        logits.refuse_difference(
            cache.key, {"kind": corpus.task.kind, "labels": list(corpus.task.labels)}, cache.folder.name
        )
        for teacher in teachers:
            if teacher.run is not None:
                model = models.load(teacher.model)
                logits.refuse_difference(
                    cache.key,
                    logits.key_of(model, cache.key["precision"], cache.key["dtype"]),
                    cache.folder.name,
                )
        opened = [cache]
    else:
        opened = [cache_logits(teacher, recipe, corpus) for teacher in teachers]
    for cache in opened:
        for name in ("train", "transfer"):
            if name in corpus.splits:
                cache.require(corpus.splits[name].row_id)

    def lookup(row_ids: Any) -> Floats:
        return logits.mean(corpus.task.kind, [cache(row_ids) for cache in opened], recipe.student.ensemble)

    return lookup, [str(cache.folder) for cache in opened]


def plan_students(recipe: Recipe, teachers: Sequence[str]) -> Plan:
    """Describe a student's training run without running it."""
    found = [find_teacher(name) for name in teachers]
    corpus = load_corpus(recipe)
    if recipe.student.architecture == "tfidf":
        raise UsageError("--dry-run: tfidf has no tokens and trains in seconds; run it")
    model = models.build(recipe.student, "student", corpus.task, recipe.student.train.seed, _folder(found))
    trained = ["train", "transfer"] if _is_distilled(recipe.student) else ["train"]
    return _plan(f"student {recipe.student.architecture}", corpus, model, recipe.student.train, trained, [])


def _folder(teachers: Sequence[TeacherRef]) -> Path | None:
    return Path(teachers[0].model) if teachers else None


def _is_distilled(student: Student) -> bool:
    return any(term.kind != "hard" for term in student.losses)


def train_students(job: StudentJob) -> list[RunFolder]:
    """Train a student for each seed, each with its control, and the TF-IDF baseline of the same rows.

    Runs of the group that have finished are left as they are, so that calling this again goes on.

    Returns:
        All runs of the group.
    """
    recipe = recipes.build(yaml_strict.parse(job.recipe, job.recipe_name), job.recipe_name)
    teachers = [find_teacher(name) for name in job.teachers]
    if not teachers and job.logits is None:
        raise UsageError("--teacher is missing (a run, a folder or a hub id), or --logits")
    if recipe.student.checkpoint is not None:
        hub.checkpoint(recipe.student.checkpoint, "student.checkpoint")
    corpus = load_corpus(recipe)
    result = []
    if recipe.student.architecture != "tfidf":
        # The model is built first: a checkpoint that is missing should not cost a caching pass.
        probe = models.build(
            recipe.student, "student", corpus.task, recipe.student.train.seed, _folder(teachers)
        )
        encoded = {name: _encode(probe, rows) for name, rows in corpus.splits.items()}
        del probe
        result += _train_group(job, recipe, corpus, teachers, {str(k): v for k, v in encoded.items()})
    result.append(_baseline(job, recipe, corpus))
    return result


def _train_group(
    job: StudentJob, recipe: Recipe, corpus: Corpus, teachers: list[TeacherRef], encoded: dict[str, Encoded]
) -> list[RunFolder]:
    student = recipe.student
    labelled = encoded["train"]
    both = concatenate([labelled, encoded["transfer"]]) if "transfer" in encoded else labelled
    lookup, caches = _soft_targets(job, recipe, corpus, teachers)
    steps = total_steps(student.train, len(both))
    every = student.train.evaluate_every or max(1, -(-len(both) // student.train.batch_size))
    result = []
    for number in range(job.seeds):
        seed = student.train.seed + number
        settings = student.train.model_copy(update={"seed": seed, "evaluate_every": every})
        # The control makes as many steps, over its labelled rows alone, and is evaluated as often.
        passes = steps * settings.batch_size / len(labelled) + 1
        alone = settings.model_copy(update={"epochs": float(passes), "max_steps": steps})
        jobs: list[tuple[Role, Train, Sequence[Loss], Encoded, Lookup | None]] = [
            ("distilled", settings, student.losses, both, lookup)
        ]
        if job.control:
            jobs.append(("control", alone, [Loss(kind="hard")], labelled, None))
        for role, chosen, terms, rows, target in jobs:
            folder = _open_member(
                job, recipe, role, number, seed, {"logits": caches if role == "distilled" else []}
            )
            result.append(folder)
            if folder.read().status == "finished":
                continue
            model = models.build(student, "student", corpus.task, seed, _folder(teachers))
            planning.require_disk(_fits(model, chosen, rows).disk)
            objective = Objective(corpus.task.kind, terms, chosen.label_smoothing)
            with _working(folder):
                _fit(folder, recipe, corpus, model, {**encoded, "train": rows}, chosen, objective, target)
            tested = folder.metrics()["test"][corpus.task.metric]
            say(f"{folder.name}: test {corpus.task.metric} {tested:.3f}")
    return result


def _open_member(
    job: StudentJob, recipe: Recipe, role: Role, number: int, seed: int, facts: dict[str, Any]
) -> RunFolder:
    """Open a run of the group, or make it."""
    name = member(job.group, role, number)
    if (runs.runs_folder() / name / "run.json").is_file():
        return runs.find(name)
    return _new_run(
        name, role, recipe, job.recipe_name, group=job.group, seed=seed, model="tfidf" if role == "baseline" else job.student,
        teachers=list(job.teachers), command=dict(vars(job)), facts=facts, status="interrupted",
    )  # fmt: skip


def _baseline(job: StudentJob, recipe: Recipe, corpus: Corpus) -> RunFolder:
    """Fit TF-IDF on the labelled rows."""
    module = catalog.load("student", "tfidf")
    shared = {
        k: v
        for k, v in recipe.student.model_dump().items()
        if k in Student.model_fields and k not in ("checkpoint", "tokenizer", "config")
    }
    config = (
        recipe.student
        if recipe.student.architecture == "tfidf"
        else module.Config.model_validate({**shared, "architecture": "tfidf"})
    )
    folder = _open_member(job, recipe, "baseline", 0, 0, {"data": corpus.fingerprint})
    if folder.read().status == "finished" or not processes.is_main():
        return folder
    with _working(folder):
        rows = corpus.splits["train"]
        began = time.monotonic()
        fitted = module.fit(config, corpus.task, rows.texts(), rows.labels)
        seconds = time.monotonic() - began
        fitted.save(folder.model)
        test, valid = (fitted.logits(corpus.splits[name].texts()) for name in ("test", "validation"))
        _record(folder, recipe, corpus, test, valid, fitted.parameters, {"seconds": seconds, "steps": 0})
    return folder
