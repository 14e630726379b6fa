"""The stages: train a teacher; train students with their controls and the baseline. Each model is a run folder.

Joins the other modules; what a stage needs is checked before any training starts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import (
    caching,
    catalog,
    class_weights,
    fitting,
    hub,
    live,
    memory,
    models,
    planning,
    processes,
    runs,
    suspects,
    yaml_strict,
)
from distill import recipe as recipes
from distill.batching import steps_per_epoch
from distill.data import Corpus, Rows
from distill.encoding import Encoded, concatenate
from distill.errors import RecipeError, UsageError
from distill.files import write_json
from distill.losses import Objective
from distill.models import Classifier
from distill.progress import say
from distill.runs import Role, RunFolder
from distill.schema import Loss, Recipe, Student, Train
from distill.targets import Targets, open_targets
from distill.training import Lookup, total_steps


def plan_teacher(recipe: Recipe) -> fitting.Plan:
    """Describe a teacher's training run without running it."""
    corpus, model = _untrained_teacher(recipe)
    return fitting.plan(
        f"teacher {recipe.teacher.architecture}", "teacher", corpus, model, recipe.teacher.train, ["train"],
        recipe.cache,
    )  # fmt: skip


def _untrained_teacher(recipe: Recipe) -> tuple[Corpus, Classifier]:
    """Read the data and build the model."""
    if recipe.teacher.checkpoint is not None:
        # Before the data: it may take long to read.
        hub.checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    corpus = fitting.load_corpus(recipe)
    for split in ("validation", "test"):
        if split not in corpus.splits:
            raise RecipeError(f"data.splits.{split} is missing")
    return corpus, models.build(recipe.teacher, "teacher", corpus.task, recipe.teacher.train.seed)


def train_teacher(
    recipe: Recipe,
    recipe_name: str,
    name: str | None = None,
    resume: str | None = None,
    *,
    any_processes: bool = False,
) -> RunFolder:
    """Fine-tune a teacher.

    Args:
        recipe: resolved.
        recipe_name: for the run's tags.
        name: the run's; run1, run2, … where absent.
        resume: a run to go on with, whose recipe ``recipe`` is.
        any_processes: on another number of processes, too.

    Returns:
        The finished run.
    """
    folder = runs.begin_or_resume(name, resume)
    corpus, model = _untrained_teacher(recipe)
    settings = recipe.teacher.train
    encoded = {
        str(split): fitting.encode_rows(model, rows)
        for split, rows in corpus.splits.items()
        if split != "transfer"
    }
    fitting.check(model, settings, encoded["train"])
    if folder is None:
        folder = fitting.new_run(runs.claim(name), "teacher", recipe, recipe_name, seed=settings.seed)
    weights = _weights(recipe, corpus)
    objective = Objective(corpus.task.kind, [Loss(kind="hard")], settings.label_smoothing, weights)
    with fitting.working(folder):
        fitting.fit(
            folder, recipe, corpus, model, encoded, settings, objective, None, any_processes=any_processes
        )
    return folder


def _weights(recipe: Recipe, corpus: Corpus) -> tuple[float, ...] | None:
    labels = corpus.splits["train"].labels
    assert labels is not None
    return class_weights.compute(recipe.task.class_weights, corpus.task, labels)


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
    only: Role | None = None
    """Train the runs of this role alone, as each job of a sweep does."""
    prefix: str | None = None
    """What the names of its runs begin with; the group's name where absent."""
    against: str = ""
    """What the controls are called that its runs are held against, where ``student`` is another name."""
    any_processes: bool = False
    """Go on with runs of another number of processes."""

    def trains(self, role: Role) -> bool:
        """Say whether runs of this role are asked for."""
        return self.only in (None, role) and (role != "control" or self.control)


def member(group: str, role: Role, number: int) -> str:
    """Name a run of a group: ``run2``, ``run2-control``, ``run2-seed1``, ``run2-control-seed1``."""
    middle = {"control": "-control", "baseline": "-tfidf"}.get(role, "")
    return f"{group}{middle}" + (f"-seed{number}" if number else "")


def plan_students(recipe: Recipe, teachers: Sequence[str]) -> fitting.Plan:
    """Describe a student's training run without running it."""
    found = [caching.find_teacher(name) for name in teachers]
    beside = _live_teacher(recipe, found)
    corpus = fitting.load_corpus(recipe)
    if recipe.student.architecture == "tfidf":
        raise UsageError("--dry-run: tfidf has no tokens and trains in seconds; run it")
    model = models.build(
        recipe.student, "student", corpus.task, recipe.student.train.seed, teacher_folder(found)
    )
    _check_live(recipe, corpus, model, beside)
    trained = ["train", "transfer"] if recipe.student.reads_unlabelled else ["train"]
    return fitting.plan(
        f"student {recipe.student.architecture}", "distilled", corpus, model, recipe.student.train, trained
    )


def teacher_folder(teachers: Sequence[caching.TeacherRef]) -> Path | None:
    """Return the folder of the first teacher's model, for students that take something from it."""
    return Path(teachers[0].model) if teachers else None


def steps_of(student: Student, rows: Mapping[str, Rows] | Mapping[str, Encoded]) -> int:
    """Count the optimizer steps of a student, and of its control, from the rows of each split."""
    unlabelled = rows["transfer"].draws if "transfer" in rows and student.reads_unlabelled else 0
    return total_steps(student.train, rows["train"].draws + unlabelled)


def train_students(
    job: StudentJob, corpus: Corpus | None = None, kept: fitting.Kept | None = None
) -> list[RunFolder]:
    """Train a student for each seed, each with its control, and the TF-IDF baseline of the same rows, where the task has one.

    Runs of the group that have finished are left as they are, so that calling this again goes on.

    Args:
        job: what is asked for.
        corpus: the recipe's data, where it has been read already.
        kept: of this corpus, what an earlier job tokenised; gets what this one does.

    Returns:
        All runs of the job.
    """
    recipe = recipes.build(yaml_strict.parse(job.recipe, job.recipe_name), job.recipe_name)
    teachers = [caching.find_teacher(name) for name in job.teachers]
    if not teachers and job.logits is None:
        raise UsageError("--teacher is missing (a run, a folder or a hub id), or --logits")
    beside = _live_teacher(recipe, teachers) if job.trains("distilled") else None
    if recipe.student.checkpoint is not None and job.only != "baseline":
        hub.checkpoint(recipe.student.checkpoint, "student.checkpoint")
    corpus = corpus or fitting.load_corpus(recipe)
    result = []
    if recipe.student.architecture != "tfidf" and job.only != "baseline":
        # The model is built first: a checkpoint that is missing should not cost a caching pass.
        probe = models.build(
            recipe.student, "student", corpus.task, recipe.student.train.seed, teacher_folder(teachers)
        )
        _check_live(recipe, corpus, probe, beside)
        found = fitting.encode_splits(probe, corpus, {} if kept is None else kept)
        encoded = {str(name): part for name, part in found.items()}
        del found
        fitting.check(probe, recipe.student.train, encoded["train"])
        del probe
        result += _train_group(job, recipe, corpus, teachers, encoded, beside)
    if job.trains("baseline") and corpus.task.kind != "span":
        result.append(_baseline(job, recipe, corpus))
    return result


def _live_teacher(recipe: Recipe, teachers: Sequence[caching.TeacherRef]) -> Classifier | None:
    """Load the teacher that the losses need beside the student, if any."""
    return live.load_teacher(recipe.student.losses, [one.model for one in teachers])


def _check_live(recipe: Recipe, corpus: Corpus, student: Classifier, teacher: Classifier | None) -> None:
    """Refuse a teacher that cannot stand beside the student."""
    if teacher is not None:
        live.check_reading(student, teacher, corpus.splits["train"].texts(slice(0, live.SAMPLE)))
        live.Pair(student, teacher, recipe.student.losses, seed=0)


def _train_group(
    job: StudentJob,
    recipe: Recipe,
    corpus: Corpus,
    teachers: list[caching.TeacherRef],
    encoded: dict[str, Encoded],
    live_teacher: Classifier | None,
) -> list[RunFolder]:
    student = recipe.student
    labelled = both = encoded["train"]
    targets: Targets | None = None
    if any(term.needs_logits for term in student.losses) and job.trains("distilled"):
        targets = open_targets(recipe, corpus, teachers, job.logits)
    steps = steps_of(student, encoded)
    transfer = encoded.pop("transfer", None)
    if transfer is not None and student.reads_unlabelled:
        both = concatenate([labelled, transfer])
    elif transfer is not None:
        say("transfer: not used, for every term of student.losses needs a label")
    del transfer  # it may be large, and stands in both
    memory.release_memory()
    every = student.train.evaluate_every or steps_per_epoch(both.draws, student.train.batch_size)
    result = []
    for number in range(job.seeds):
        seed = student.train.seed + number
        settings = student.train.model_copy(update={"seed": seed, "evaluate_every": every})
        # The control makes as many steps, over its labelled rows alone, and is evaluated as often.
        passes = steps * settings.batch_size / len(labelled) + 1
        alone = settings.model_copy(update={"epochs": float(passes), "max_steps": steps})
        jobs: list[tuple[Role, Train, Sequence[Loss], Encoded, Lookup | None]] = []
        if job.trains("distilled"):
            jobs.append(("distilled", settings, student.losses, both, targets.lookup if targets else None))
        if job.trains("control"):
            jobs.append(("control", alone, [Loss(kind="hard")], labelled, None))
        for role, chosen, terms, rows, target in jobs:
            model = models.build(student, "student", corpus.task, seed, teacher_folder(teachers))
            planning.require_disk(fitting.cost_of(model, chosen, rows).disk)
            own = targets if role == "distilled" else None
            folder = _open_member(job, recipe, role, number, seed, own.facts if own else {"logits": []})
            result.append(folder)
            if processes.agree(folder.read().status) == "finished":
                continue
            weights = _weights(recipe, corpus)
            objective = Objective(corpus.task.kind, terms, chosen.label_smoothing, weights)
            pair = None
            if live_teacher is not None and role == "distilled":
                pair = live.Pair(model, live_teacher, terms, seed)
            with fitting.working(folder):
                fitting.fit(
                    folder, recipe, corpus, model, {**encoded, "train": rows}, chosen, objective, target, pair,
                    any_processes=job.any_processes,
                )  # fmt: skip
                if own is not None:
                    _list_suspects(folder, corpus, own, tell=number == 0)
            metric, found = corpus.task.metric, folder.metrics()
            say(
                f"{folder.name}: {metric} {found['validation'][metric]:.3f} on validation, {found['test'][metric]:.3f} on test"
            )
    return result


def _list_suspects(folder: RunFolder, corpus: Corpus, targets: Targets, *, tell: bool) -> None:
    """Write down the training labels that the teacher contradicts: those that are classes, which it may doubt."""
    if corpus.task.kind in ("regression", "span") or not processes.is_main():
        return
    rows = corpus.splits["train"]
    found = suspects.find(corpus.task, targets.lookup(rows.row_id), rows)
    write_json(folder.suspects, found)
    if tell:
        say(suspects.sentence(found, folder.suspects))


def _open_member(
    job: StudentJob, recipe: Recipe, role: Role, number: int, seed: int, facts: dict[str, Any]
) -> RunFolder:
    """Open a run of the group, or make it."""
    name = member(job.prefix or job.group, role, number)
    if processes.agree((runs.runs_folder() / name / "run.json").is_file()):
        return runs.find(name)
    return fitting.new_run(
        name, role, recipe, job.recipe_name, group=job.group, seed=seed, model="tfidf" if role == "baseline" else job.student,
        against=job.against, teachers=list(job.teachers), command=dict(vars(job)), facts=facts, status="interrupted",
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
    if processes.agree(folder.read().status) == "finished":
        return folder
    with fitting.working(folder):
        if not processes.is_main():
            return folder
        rows = corpus.splits["train"]
        began = time.monotonic()
        fitted = module.fit(config, corpus.task, rows.texts(), rows.labels, _weights(recipe, corpus))
        seconds = time.monotonic() - began
        fitted.save(folder.model)
        found = {
            name: fitted.logits(corpus.splits[name].texts())
            for name in fitting.MEASURED
            if name in corpus.splits
        }
        fitting.record(folder, recipe, corpus, found, fitted.parameters, {"seconds": seconds, "steps": 0})
    return folder
