"""A search of each student's recipe keys, by the validation split alone. Trains nothing itself.

What to try is proposed by Optuna's tree-structured Parzen estimators (Bergstra et al. 2011). A trial is a combination
as a sweep's are, with the recipe's seed. What is proposed follows from a trial's number and from the figures of those
before it, and from nothing else: the same command finds the trials that have finished, and goes on. The control has a
search of its own, of as many trials, over the keys that make a difference to it; TF-IDF has none.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distill import processes, runs, sweep
from distill.errors import DistillError, Diverged, UsageError
from distill.progress import say
from distill.runs import Role
from distill.sweep import Combination, Part

if TYPE_CHECKING:
    from distill.data import Corpus
    from distill.fitting import Kept

_RANGE = re.compile(r"(?P<key>[^=]+)=(?P<low>[^,]+?)\.\.(?P<high>[^,:]+)(?P<log>:log)?")


@dataclass(frozen=True)
class Axis:
    """What one key can be."""

    values: list[Any]
    """The choices; of a range both ends."""
    between: bool = False
    """A range: of whole numbers where both ends are."""
    log: bool = False


@dataclass(frozen=True)
class Search:
    """What ``distill sweep --search`` was asked for."""

    recipe: str
    """A name or a file."""
    recipe_name: str
    """For the runs' tags."""
    settings: Sequence[str]
    students: Sequence[str]
    axes: Mapping[str, Axis]
    teachers: Sequence[str]
    group: str
    trials: int
    """Of each student, and of its control."""
    seeds: int
    """Runs of the best trial, the one that it was chosen by among them."""
    control: bool

    def axes_of(self, role: Role) -> dict[str, Axis]:
        """Return the keys that make a difference to a role."""
        return {k: axis for k, axis in self.axes.items() if role == "distilled" or sweep.control_sees(k)}

    def listed(self, students: Sequence[str], values: Mapping[str, Any]) -> list[Combination]:
        """List the combinations of students with one value of each key, TF-IDF and controls too."""
        grid = {key: [value] for key, value in values.items()}
        return sweep.combinations(
            self.recipe, self.settings, students, grid, self.group, control=self.control
        )


@dataclass(frozen=True)
class Best:
    """The trial that the validation split chose."""

    part: Part
    trials: int
    value: float
    """The metric on validation, of the run that was the trial."""


def read_axes(texts: Sequence[str]) -> dict[str, Axis]:
    """Read what ``--search`` holds: ``key=1e-4..1e-3:log``, ``key=1..8`` or ``key=head,tail`` each.

    Raises:
        UsageError: Optuna is not installed, a range is none, or what :func:`distill.sweep.read_grid` refuses.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError(
            "--search needs Optuna, which is not installed: pip install optuna, or -e '.[search]' in a checkout"
        )
    ranges = [_RANGE.fullmatch(text.strip()) for text in texts]
    flat = [f"{r['key']}={r['low']},{r['high']}" if r else t for r, t in zip(ranges, texts, strict=True)]
    axes = {}
    for found, (key, values) in zip(ranges, sweep.read_grid(flat, "--search").items(), strict=True):
        axes[key] = axis = Axis(values, found is not None, bool(found and found["log"]))
        if not axis.between:
            continue
        low, high = values
        if not (type(low) in (int, float) and type(high) in (int, float) and low < high):
            raise UsageError(f"--search {key}: a range is two numbers, the lower one first, as 1e-4..1e-3 is")
        if axis.log and low <= 0:
            raise UsageError(f"--search {key}: a range with :log begins above 0, not at {low}")
    return axes


def check(asked: Search) -> tuple[Corpus, list[Part]]:
    """Read the data, and build each student with every choice and both ends of every range, one key at a time.

    Returns:
        The data, and TF-IDF with what was built, of which nothing need be trained.

    Raises:
        UsageError: a choice changes which rows a student reads, and so the steps of its control.
        DistillError: a value does not fit a student, or a model cannot be built.
    """
    first = {key: axis.values[0] for key, axis in asked.axes.items()}
    tried = [first | {key: value} for key, axis in asked.axes.items() for value in axis.values]
    if asked.control:
        tried.append({key: first[key] for key in asked.axes_of("control")})
    found: dict[tuple[str, str], Combination] = {}
    reads: dict[str, bool] = {}
    for values in tried:
        for one in asked.listed(asked.students, values):
            found.setdefault((one.role, one.label), one)
            same = reads.setdefault(one.student, one.recipe.student.reads_unlabelled)
            if asked.control and one.recipe.student.reads_unlabelled != same:
                raise UsageError(
                    f"--search: with {one.label} it reads other rows than without, and a control makes as many steps as its "
                    "student; take --grid, where each has its own, or --no-control"
                )
    return sweep.plan(list(found.values()), asked.recipe_name, asked.teachers, asked.group, 1)


def run(asked: Search, corpus: Corpus, parts: Sequence[Part]) -> list[Best]:
    """Train TF-IDF, where it is among what :func:`check` found, the trials that have not finished, and the best of each with the other seeds.

    Raises:
        DistillError: every trial of a student diverged.
    """
    sweep.run([part for part in parts if part.role == "baseline"], corpus)
    found: list[Best] = []
    kept: Kept = {}
    for student in asked.students:
        against = ""
        if asked.control:
            found.append(_best(asked, corpus, student, "control", "", kept))
            against = found[-1].part.label
        found.append(_best(asked, corpus, student, "distilled", against, kept))
    return found


def _best(asked: Search, corpus: Corpus, student: str, role: Role, against: str, kept: Kept) -> Best:
    """Find the best trial of a student, or of its control, and train it with every seed."""
    import optuna

    from distill.tasks import LOWER_IS_BETTER, better

    def part(one: Combination, seeds: int) -> Part:
        return sweep.part(one, asked.recipe_name, asked.teachers, asked.group, seeds)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    metric, axes = corpus.task.metric, asked.axes_of(role)
    study = optuna.create_study(direction="minimize" if metric in LOWER_IS_BETTER else "maximize")
    trials = asked.trials if axes else 1
    chosen: tuple[Combination, float] | None = None
    for number in range(trials):
        study.sampler = optuna.samplers.TPESampler(seed=number)
        trial = study.ask({key: _distribution(axis) for key, axis in axes.items()})
        values = {key: _value(axis, trial.params[key]) for key, axis in axes.items()}
        found = next(one for one in asked.listed([student], values) if one.role == role)
        found = replace(found, against=against)
        say(f"trial {number + 1}/{trials} {found.label} {role}")
        value = _figure(part(found, 1), corpus, kept)
        study.tell(trial, value, state=optuna.trial.TrialState.FAIL if value is None else None)
        if value is not None and better(metric, value, chosen and chosen[1]):
            chosen = found, value
    if chosen is None:
        raise DistillError(f"{student} {role}: every trial diverged; search lower learning rates")
    best = part(chosen[0], asked.seeds)
    sweep.run([best], corpus, kept)
    for name in best.names if processes.is_main() else []:
        runs.find(name).update(against=against)  # a longer search may have found another control
    return Best(best, trials, chosen[1])


def _distribution(axis: Axis) -> Any:
    from optuna import distributions

    if not axis.between:  # by number: a choice may be a list
        return distributions.CategoricalDistribution(range(len(axis.values)))
    whole = all(isinstance(end, int) for end in axis.values)
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    return kind(*axis.values, log=axis.log)


def _value(axis: Axis, proposed: Any) -> Any:
    """Turn what was proposed into a recipe's value; of a number three digits are kept, inside its range."""
    if not axis.between:
        return axis.values[proposed]
    if isinstance(proposed, int):
        return proposed
    low, high = axis.values
    return min(max(float(f"{proposed:.3g}"), low), high)


def _figure(part: Part, corpus: Corpus, kept: Kept) -> float | None:
    """Train a trial, unless it has finished, and return the metric on validation; None where it diverged."""
    from distill import stages

    (name,) = part.names
    if not processes.agree(part.finished == part.names):
        known = (runs.runs_folder() / name / "run.json").is_file()
        if processes.agree(known and (runs.find(name).read().error or "").startswith(Diverged.__name__)):
            return None
        try:
            stages.train_students(part.job, corpus, kept)
        except Diverged as error:
            say(str(error))
            return None
    return float(runs.find(name).metrics()["validation"][corpus.task.metric])
