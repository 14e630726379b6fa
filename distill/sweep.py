"""A sweep: every combination of students and of values of recipe keys, trained from one cache of logits.

It makes jobs for stages.py and trains nothing itself. A control is trained once for all combinations that it
cannot tell apart, and TF-IDF once for all. Finished runs are kept, so that the same command again goes on. What the
grid holds is trained, and nothing else; a search is in search.py.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distill import catalog, processes, runs, yaml_strict
from distill import recipe as recipes
from distill.errors import UsageError
from distill.progress import duration, say
from distill.runs import Role
from distill.schema import Recipe

if TYPE_CHECKING:
    from distill.data import Corpus
    from distill.fitting import Kept
    from distill.stages import StudentJob

FOR_THE_TEACHER = ("losses", "ensemble", "calibrate")
"""Keys of a student that its control does not see: it has one term, the labels."""
ELSEWHERE = {
    "student.architecture": "students are named by --students",
    "student.train.seed": "seeds are counted by --seeds",
}
LONGEST = 49
"""Characters of a name before ``-control-seed99``, so that the whole is a run's name."""


@dataclass(frozen=True)
class Combination:
    """One student with one value of each key, or the control of several such."""

    student: str
    label: str
    """What its line in the table is called: ``bert_tiny temperature=2``."""
    prefix: str
    role: Role
    recipe: Recipe
    against: str = ""
    """The label of its control."""


@dataclass(frozen=True)
class Part:
    """A combination with its runs, one for each seed."""

    student: str
    label: str
    role: Role
    job: StudentJob
    names: list[str]
    steps: int = 0
    """Of one run; 0 for TF-IDF."""
    parameters: int = 0

    @property
    def finished(self) -> list[str]:
        """Names of the runs that have finished."""
        here = [name for name in self.names if (runs.runs_folder() / name / "run.json").is_file()]
        return [name for name in here if runs.find(name).read().status == "finished"]


def group_name(name: str | None, teacher: str) -> str:
    """Return the name that all runs of a sweep begin with; the teacher's and ``-sweep`` where none is given.

    Raises:
        UsageError: it is no name, or that of a run.
    """
    group = runs.check_name(name or _safe(f"{teacher.rstrip('/').rpartition('/')[2]}-sweep", 32))
    if (runs.runs_folder() / group / "run.json").exists():
        raise UsageError(f"--name {group}: a run has this name; take another for the sweep")
    return group


def read_grid(texts: Sequence[str], option: str = "--grid") -> dict[str, list[Any]]:
    """Read what ``--grid`` holds: ``student.losses.0.temperature=1,2,4`` each.

    Args:
        texts: what was given.
        option: how it was given, for messages.

    Raises:
        UsageError: no values, a key or a value twice, or a key that a sweep cannot change.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not values or not key:
            raise UsageError(
                f"{option} {text}: no values; must be as student.losses.0.temperature=1,2,4 is: a key and its values"
            )
        if key in grid:
            raise UsageError(f"{option} {key}: stands twice; give all its values at once, with commas")
        if key == "data" or key.startswith("data."):
            raise UsageError(
                f"{option} {key}: the rows must be the same for every run that is compared; change them for all with --set"
            )
        if key in ELSEWHERE:
            raise UsageError(f"{option} {key}: {ELSEWHERE[key]}")
        if not key.startswith("student."):
            raise UsageError(
                f"{option} {key}: must be a key under student., as student.train.learning_rate is"
            )
        grid[key] = yaml_strict.parse(f"[{values}]", f"{option} {key}")
        twice = [value for at, value in enumerate(grid[key]) if value in grid[key][:at]]
        if twice:
            raise UsageError(f"{option} {key}: holds {_written(twice[0])} twice")
    return grid


def combinations(
    recipe: str,
    settings: Sequence[str],
    students: Sequence[str],
    grid: Mapping[str, Sequence[Any]],
    group: str,
    *,
    control: bool,
) -> list[Combination]:
    """List what is to be trained, TF-IDF first, where the task has it, then each combination before its control.

    Args:
        recipe: a name or a file.
        settings: of ``--set``; the grid's values are laid over them.
        students: names from students/ or of presets.
        grid: values by recipe key.
        group: what the runs' names begin with.
        control: whether controls are trained.

    Raises:
        UsageError: a student is unknown, stands twice, or is the baseline, which comes by itself.
        RecipeError: a key that a student does not have, or a value that does not fit it.
    """
    for at, student in enumerate(students):
        if student in students[:at]:
            raise UsageError(f"--students: {student} stands twice")
        if catalog.preset(student)["architecture"] == "tfidf":
            raise UsageError("--students: tfidf is trained beside every sweep; leave it out")
    short = _short(grid)

    def one(role: Role, student: str, values: Mapping[str, Any], against: str = "") -> Combination:
        pairs = [(short[key], _written(value)) for key, value in values.items()]
        name = "-".join([group, student, *(f"{key}-{value}" for key, value in pairs)])
        label = " ".join([student, *(f"{key}={value}" for key, value in pairs)])
        laid = [*settings, *(f"{key}={json.dumps(value)}" for key, value in values.items())]
        found = recipes.load(recipe, laid, student)
        return Combination(student, label, _safe(name, LONGEST), role, found, against)

    plain = recipes.load(recipe, settings, students[0])
    result = [Combination("tfidf", "tfidf", group, "baseline", plain)] if plain.task.kind != "span" else []
    known: set[str] = set()
    for student in students:
        for chosen in itertools.product(*grid.values()):
            values = dict(zip(grid, chosen, strict=True))
            mine = one("distilled", student, values)
            if not control:
                result.append(mine)
                continue
            seen = {key: value for key, value in values.items() if control_sees(key)}
            alone = one("control", student, seen)
            if alone.recipe.student.reads_unlabelled != mine.recipe.student.reads_unlabelled:
                # A control makes as many steps as its student, which reads more rows, or fewer, than others.
                alone = one("control", student, values)
            result.append(one("distilled", student, values, alone.label))
            if alone.label not in known:
                known.add(alone.label)
                result.append(alone)
    return result


def control_sees(key: str) -> bool:
    """Say whether a key under ``student.`` makes a difference to a control."""
    return key.split(".")[1] not in FOR_THE_TEACHER


def _short(grid: Mapping[str, Any]) -> dict[str, str]:
    """Name each key by its last part, or by all of it where another key ends alike."""
    last = [key.rpartition(".")[2] for key in grid]
    return {
        key: name if last.count(name) == 1 else key.removeprefix("student.")
        for key, name in zip(grid, last, strict=True)
    }


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _safe(name: str, longest: int) -> str:
    """Make a run's name of any text; one that had to be changed ends in a hash of what it was."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")
    if safe == name and len(name) <= longest:
        return name
    return f"{safe[: longest - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def plan(
    found: Sequence[Combination], recipe_name: str, teachers: Sequence[str], group: str, seeds: int
) -> tuple[Corpus, list[Part]]:
    """Read the data and build each model once, so that nothing is trained before all of it can be.

    Args:
        found: what :func:`combinations` listed.
        recipe_name: for the runs' tags.
        teachers: whose logits.
        group: the runs'.
        seeds: how many runs of each.

    Raises:
        UsageError: a run of one of these names was asked for with another recipe or other teachers.
        DistillError: a model cannot be built.
    """
    from distill import caching, fitting, hub, models, stages

    refs = [caching.find_teacher(name) for name in teachers]
    # Those that read alike follow each other: they are tokenised once, and only the last tokens are kept.
    order = list(dict.fromkeys(map(_reading, found)))
    found = sorted(found, key=lambda one: order.index(_reading(one)))
    parts = [part(one, recipe_name, teachers, group, seeds) for one in found]
    for one in found:
        if one.role != "baseline" and one.recipe.student.checkpoint is not None:
            hub.checkpoint(one.recipe.student.checkpoint, "student.checkpoint")
    corpus = fitting.load_corpus(found[0].recipe)
    rows = {str(name): split for name, split in corpus.splits.items()}
    sizes: dict[str, int] = {}

    def parameters(recipe: Recipe) -> int:
        kept = recipe.student.model_dump(mode="json", exclude={*FOR_THE_TEACHER, "train"})
        key = json.dumps(kept, sort_keys=True)
        if key not in sizes:
            folder = stages.teacher_folder(refs)
            sizes[key] = models.build(recipe.student, "student", corpus.task, 0, folder).parameters_count
        return sizes[key]

    for at, one in enumerate(found):
        if one.role != "baseline":
            steps = stages.steps_of(one.recipe.student, rows)
            parts[at] = replace(parts[at], steps=steps, parameters=parameters(one.recipe))
    return corpus, parts


def _reading(one: Combination) -> tuple[Any, ...]:
    student = one.recipe.student
    names = student.checkpoint, student.tokenizer
    return *names, student.max_length, student.view, student.max_windows, student.overlap


def part(one: Combination, recipe_name: str, teachers: Sequence[str], group: str, seeds: int) -> Part:
    """Name a combination's runs; its steps and parameters are not counted.

    Raises:
        UsageError: a run of one of these names was asked for with another recipe or other teachers.
    """
    from distill import stages

    job = stages.StudentJob(
        list(teachers), one.recipe.dump(), recipe_name, one.label, group, 1 if one.role == "baseline" else seeds,
        control=True, only=one.role, prefix=one.prefix, against=one.against,
    )  # fmt: skip
    names = [stages.member(one.prefix, one.role, number) for number in range(job.seeds)]
    for name in names:
        _refuse_another(name, job)
    return Part(one.student, one.label, one.role, job, names)


def _refuse_another(name: str, job: StudentJob) -> None:
    """Refuse to take a run for one of the sweep's that was asked for otherwise."""
    if not (runs.runs_folder() / name / "run.json").is_file():
        return
    folder = runs.find(name)
    was, now = (
        yaml_strict.parse(text, name) for text in (folder.recipe.read_text(encoding="utf-8"), job.recipe)
    )
    if job.only == "baseline":  # it reads nothing of a student's
        was["student"] = now["student"]
    if was != now or folder.read().teachers != job.teachers:
        raise UsageError(
            f"{name} exists already, with another recipe or teacher; take another --name for this sweep"
        )


def run(parts: Sequence[Part], corpus: Corpus, kept: Kept | None = None) -> None:
    """Train what is not finished yet; after each part the time left is told. ``kept`` is as in stages.py."""
    from distill import stages

    kept = {} if kept is None else kept

    for number, part in enumerate(parts, start=1):
        if processes.agree(len(part.finished) == len(part.names)):
            continue
        say(f"{number}/{len(parts)} {part.label} {part.role}")
        stages.train_students(part.job, corpus, kept)
        say(f"{number}/{len(parts)} done; {time_left(parts)}")


def time_left(parts: Sequence[Part]) -> str:
    """Estimate the time of the runs that have not finished, by the seconds a step of those that have.

    A student of which no run has finished is not guessed at. Caching logits and the last table are not counted.
    """
    seconds: dict[str, float] = {}
    steps: dict[str, int] = {}
    left: dict[str, int] = {}
    for part in parts:
        finished = part.finished
        for name in part.names:
            if name in finished:
                figures = runs.find(name).metrics()["train"]
                seconds[part.student] = seconds.get(part.student, 0.0) + figures["seconds"]
                steps[part.student] = steps.get(part.student, 0) + figures["steps"]
            elif part.steps:
                left[part.student] = left.get(part.student, 0) + part.steps
    timed = sum(count * seconds[one] / max(1, steps[one]) for one, count in left.items() if one in seconds)
    unknown = [one for one in left if one not in seconds]
    told = [f"about {duration(timed)} of training left"] if len(unknown) < len(left) else []
    if unknown:
        told.append(f"time of {', '.join(unknown)} known after its first run")
    return ", ".join(told) or "nothing left to train"
