"""Put finished runs side by side: lines of a table over seeds, what distillation gained, plain sentences.

Everything said is computed from what the runs wrote. A difference is called one only when it is larger
than its 95 % interval over seeds, and runs of different data are never put in one table. Knows no model
and no training.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import benchmark, records, runs
from distill.calibration import Calibration
from distill.errors import DataError, UsageError, nearest
from distill.evaluation import Predictions, agreement
from distill.runs import Run, RunFolder
from distill.tasks import LOWER_IS_BETTER, Array, TaskSpec

if TYPE_CHECKING:
    pass

_UNFINISHED = {"running": "is not finished", "interrupted": "was interrupted", "failed": "failed"}
_ROLES = ("teacher", "baseline", "distilled", "control")


@dataclass(frozen=True)
class Figure:
    """A figure over seeds."""

    mean: float
    half: float | None
    """Half the width of the 95 % interval of the mean, by Student's t; None for one seed."""
    n: int


@dataclass
class Row:
    """One line of the table: the runs that differ in their seed alone."""

    label: str
    role: str
    model: str
    group: str
    against: str
    """``model`` of its control's line; its own where nothing else is said."""
    runs: list[str]
    seeds: list[int]
    quality: Figure
    """The task's metric on the test split."""
    nll: Figure | None
    ece: Figure | None
    agreement: Figure | None
    """With the predictions of the teacher; None where its run is not here."""
    buckets: dict[str, Figure]
    """The metric by document length."""
    parameters: int | None
    bytes: int | None
    p50_ms: float | None = None
    p95_ms: float | None = None
    docs_per_second: float | None = None
    peak_bytes: int | None = None
    margin: Figure | None = None
    """Distilled against its control, paired by seed, in units of the metric; above 0 is better."""
    gap_closed: Figure | None = None
    """(distilled − control) / (teacher − control), paired by seed."""
    below: str | None = None
    """The best baseline, where it is better than this line."""
    teacher_temperature: float | None = None
    """What its targets were divided by, where ``student.calibrate`` had it fitted."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """Every figure of the test split by its name; those of a second one with ``other_`` before it."""
    labels: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """Of a multi-label task: each label's own figures."""


@dataclass
class Comparison:
    """A finished comparison."""

    experiment: str
    task: TaskSpec
    test_rows: int
    rows: list[Row]
    """Teachers, then baselines, then each student: distilled, control."""
    buckets: dict[str, int]
    """Length groups in order, and how many test documents are in each."""
    notes: list[str]
    """Plain sentences about the figures, and about what is missing."""

    @property
    def metric(self) -> str:
        """Name of the metric that ``quality`` is."""
        return self.task.metric


@dataclass(frozen=True)
class _Done:
    """A finished run, its test rows in the order of their ids."""

    run: Run
    folder: RunFolder
    metrics: dict[str, Any]
    row_id: Array
    logits: Array

    def value(self, name: str) -> float | None:
        found = self.metrics["test"].get(name)
        return None if found is None else float(found)


def interval(values: Sequence[float | None]) -> Figure | None:
    """Mean and 95 % interval of what seeds gave; None where nothing did."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len(known) == 1:
        return Figure(known[0], None, 1)
    from scipy import stats

    error = float(np.std(known, ddof=1)) / math.sqrt(len(known))
    return Figure(float(np.mean(known)), float(stats.t.ppf(0.975, len(known) - 1)) * error, len(known))


def collect(names: Sequence[str] = ()) -> list[RunFolder]:
    """Find the runs to compare; those that are not finished are among them, for :func:`compare` to name.

    Args:
        names: runs or groups (a name that is both is the group). Their teachers, controls and baselines
            come along, where they are of the same data. Without names: the runs of the newest finished
            run's experiment that are of its data.

    Raises:
        UsageError: there is no such run or group, or no finished run at all.
    """
    known = {folder.name: folder.read() for folder in runs.every()}
    if not names:
        # A pre-trained model is no classifier yet.
        known = {name: run for name, run in known.items() if run.role != "pretrained"}
        finished = [run for run in known.values() if run.status == "finished"]
        if not finished:
            raise UsageError(f"no finished run in {runs.runs_folder().name}/ to compare")
        new = max(finished, key=lambda run: run.finished or run.created)
        same = [
            run for run in known.values() if run.experiment == new.experiment and _data(run) == _data(new)
        ]
        return [runs.find(run.name) for run in same]
    groups = {run.group for run in known.values()}
    chosen: dict[str, Run] = {}
    for name in names:
        if name not in groups and name not in known:
            raise UsageError(f"no run or group called {name[:80]!a}{nearest(name, groups | set(known))}")
        chosen |= {
            n: run for n, run in known.items() if run.group == name or (n == name and name not in groups)
        }
    for run in list(chosen.values()):
        for other in known.values():
            pair = (run.role, other.role) == ("distilled", "control") and run.seed == other.seed
            control = pair and (run.group, run.against or run.model) == (other.group, other.model)
            if _data(run) == _data(other) and (other.name in run.teachers or control):
                chosen.setdefault(other.name, other)
    for run in list(chosen.values()):
        for other in known.values():
            if other.role == "baseline" and other.group == run.group and _data(run) == _data(other):
                chosen.setdefault(other.name, other)
    return [runs.find(name) for name in chosen]


def _data(run: Run) -> Any:
    return run.facts.get("data")


def _load(folders: Sequence[RunFolder], notes: list[str]) -> list[_Done]:
    """Read the finished runs, note the others, and refuse what cannot stand in one table."""
    from safetensors import SafetensorError

    done: list[_Done] = []
    for folder in folders:
        run, metrics = folder.read(), folder.metrics()
        if run.status != "finished" or "test" not in metrics or not folder.predictions.exists():
            why = _UNFINISHED.get(run.status, "has no figures of the test split")
            notes.append(f"{run.name} ({_label(run)}, seed {run.seed}) {why}: left out.")
            continue
        try:
            found = Predictions.load(folder.predictions)
        except (SafetensorError, TypeError, ValueError) as error:
            raise DataError(f"{run.name}/{folder.predictions.name}: damaged: {error}") from None
        order = np.argsort(found.row_id, kind="stable")
        done.append(_Done(run, folder, metrics, found.row_id[order], found.logits[order]))
    if not done:
        raise UsageError(f"nothing to compare: {' '.join(notes) or 'no runs'}")
    first = done[0]
    for other in done[1:]:
        both = f"{first.run.name} and {other.run.name}"
        tasks = [(one.metrics["task"]["kind"], list(one.metrics["task"]["labels"])) for one in (first, other)]
        if tasks[0] != tasks[1]:
            raise UsageError(f"{both} are of different tasks; compare them apart")
        if _data(first.run) != _data(other.run) or not np.array_equal(first.row_id, other.row_id):
            raise UsageError(f"{both} are of different data; compare them apart")
    return done


def _label(run: Run) -> str:
    return {"teacher": f"teacher {run.model}", "baseline": run.model}.get(run.role, f"{run.model} {run.role}")


def _lines(done: Sequence[_Done]) -> list[list[_Done]]:
    """Group the runs over seeds; the same baseline, fitted again for another group, stands once."""
    lines: dict[tuple[str, str, str], list[_Done]] = {}
    baselines: list[_Done] = []
    for one in done:
        if one.run.role == "baseline":
            known = (b for b in baselines if (b.run.model, b.run.seed) == (one.run.model, one.run.seed))
            if any(np.array_equal(b.logits, one.logits) for b in known):
                continue
            baselines.append(one)
        lines.setdefault((one.run.group, one.run.role, one.run.model), []).append(one)
    return [sorted(line, key=lambda one: one.run.seed) for line in lines.values()]


def _teacher(one: _Done, done: Sequence[_Done]) -> _Done | None:
    """Find the teacher that a run is measured against: its own, else its group's, else the only one."""
    by_name = {other.run.name: other for other in done}
    if one.run.teachers:
        return by_name.get(one.run.teachers[0])
    group = [
        other.run.teachers[0] for other in done if other.run.group == one.run.group and other.run.teachers
    ]
    if group:
        return by_name.get(group[0])
    teachers = [other for other in done if other.run.role == "teacher"]
    return teachers[0] if len(teachers) == 1 else None


def _row(line: Sequence[_Done], label: str, done: Sequence[_Done], task: TaskSpec) -> Row:
    run, model = line[0].run, line[0].metrics.get("model", {})
    quality = interval([one.value(task.metric) for one in line])
    if quality is None:
        raise DataError(f"{run.name}: has no {task.metric} on the test split")
    agreements = []
    for one in line if run.role != "teacher" else ():
        teacher = _teacher(one, done)
        agreements.append(agreement(task.kind, one.logits, teacher.logits) if teacher else None)
    buckets: dict[str, list[float | None]] = {}
    for one in line:
        for bucket in one.metrics["test"].get("buckets", []):
            if task.metric in bucket:
                buckets.setdefault(bucket["words"], []).append(bucket[task.metric])
    return Row(
        label=label,
        role=run.role,
        model=run.model,
        group=run.group,
        against=run.against or run.model,
        runs=[one.run.name for one in line],
        seeds=[one.run.seed for one in line],
        quality=quality,
        nll=interval([one.value("nll") for one in line]),
        ece=interval([one.value("ece") for one in line]),
        agreement=interval(agreements),
        buckets={name: figure for name, values in buckets.items() if (figure := interval(values))},
        parameters=model.get("parameters"),
        bytes=model.get("bytes"),
        figures=_over_seeds([one.metrics["test"] for one in line])
        | {
            f"other_{name}": figure
            for name, figure in _over_seeds([one.metrics.get("test_other", {}) for one in line]).items()
        },
        labels={
            name: _over_seeds([one.metrics["test"]["labels"][name] for one in line])
            for name in line[0].metrics["test"].get("labels", {})
        },
    )


def _over_seeds(found: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Take the figures that are numbers over the runs that have them."""
    names = [name for name, value in found[0].items() if isinstance(value, float)]
    return {name: figure for name in names if (figure := interval([one.get(name) for one in found]))}


def _against_control(row: Row, done: Sequence[_Done], metric: str, notes: list[str]) -> None:
    """Fill a distilled line's margin and gap, or note why there is none."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    controls = {
        one.run.seed: one
        for one in done
        if (one.run.role, one.run.group, one.run.model) == ("control", row.group, row.against)
    }
    mine = [one for one in done if one.run.name in row.runs]
    pairs = [(one, controls[one.run.seed]) for one in mine if one.run.seed in controls]
    alone = sorted(one.run.seed for one in mine if one.run.seed not in controls)
    if not pairs:
        notes.append(f"{row.label} has no control of the same seed: what distillation gave it is not known.")
        return
    if alone:
        notes.append(f"{row.label}: no control for seed {', '.join(map(str, alone))}, so not in its margin.")
    margins, gaps, lost = [], [], 0
    for one, control in pairs:
        d, c = one.metrics["test"][metric], control.metrics["test"][metric]
        margins.append(sign * (d - c))
        teacher = _teacher(one, done)
        if teacher is None:
            continue
        t = teacher.metrics["test"][metric]
        if sign * (t - c) <= 0:
            lost += 1
        else:
            gaps.append((d - c) / (t - c))
    row.margin = interval(margins)
    if row.margin is not None:
        notes.append(_verdict(row.label, row.margin))
    if lost:
        seeds = f" in {lost} of {len(pairs)} seeds" if len(pairs) > 1 else ""
        notes.append(
            f"{row.label}: its teacher is no better than the control{seeds}, so there is no gap to close."
        )
    elif len(gaps) < len(pairs):
        missing = sorted(
            {one.run.teachers[0] for one in mine if one.run.teachers and _teacher(one, done) is None}
        )
        name = f" ({', '.join(missing)})" if missing else ""
        notes.append(f"{row.label}: its teacher{name} has no run of this data here, so the gap is not known.")
    else:
        row.gap_closed = interval(gaps)
    several = max(len(one.run.teachers) for one in mine)
    if several > 1:
        notes.append(
            f"{row.label} learned from {several} teachers; agreement and gap are those with the first."
        )


def _calibrated(row: Row, done: Sequence[_Done], notes: list[str]) -> None:
    """Fill in the temperature that a distilled line's teacher was given, and note what it did."""
    found = next(one.metrics.get("calibration") for one in done if one.run.name == row.runs[0])
    if found is not None:
        fitted = records.check(found, Calibration, f"{row.runs[0]}/metrics.json: calibration")
        row.teacher_temperature = fitted.temperature
        notes.append(f"{row.label}: its teacher's logits were divided by {fitted}.")


def _verdict(label: str, margin: Figure) -> str:
    """Say what the margin over the control shows, and no more."""
    size = f"{abs(margin.mean):.3f}"
    if margin.half is None:
        word = "better" if margin.mean > 0 else "worse"
        difference = f"{size} {word} than its control" if margin.mean else "exactly as good as its control"
        return f"{label} is {difference} with one seed: how far seeds differ is not known."
    if abs(margin.mean) <= margin.half:
        return (
            f"{label} and its control differ by {margin.mean:+.3f} ± {margin.half:.3f} "
            f"over {margin.n} seeds: within the spread, so no difference is shown."
        )
    word = "beats its control" if margin.mean > 0 else "is worse than its control"
    return f"{label} {word} by {size} ± {margin.half:.3f} over {margin.n} seeds."


def _rivals(rows: Sequence[Row], metric: str, notes: list[str]) -> None:
    """Note every line that a baseline beats, and every student that beats its teacher."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0

    def note(better: Row, worse: Row) -> None:
        halves = [row.quality.half for row in (better, worse) if row.quality.half is not None]
        within = halves and abs(better.quality.mean - worse.quality.mean) <= math.hypot(*halves)
        means = [f"{row.label} ({row.quality.mean:.3f})" for row in (better, worse)]
        notes.append(f"{means[0]} is better than {means[1]}{', but within the spread' if within else ''}.")

    baselines = sorted((r for r in rows if r.role == "baseline"), key=lambda r: -sign * r.quality.mean)
    teachers = [row for row in rows if row.role == "teacher"]
    for row in rows:
        if row.role == "baseline":
            continue
        if baselines and sign * (baselines[0].quality.mean - row.quality.mean) > 0:
            row.below = baselines[0].label
            note(baselines[0], row)
        if (
            row.role != "teacher"
            and len(teachers) == 1
            and sign * (row.quality.mean - teachers[0].quality.mean) > 0
        ):
            note(row, teachers[0])


def _ordered(rows: Sequence[Row], metric: str) -> list[Row]:
    """Teachers, baselines, then the students, the best family first and each beside its control."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.role in ("distilled", "control"):
            key = (row.group, row.against)
            best[key] = max(best.get(key, -math.inf), sign * row.quality.mean)

    def place(row: Row) -> tuple[int, float, str, int, float]:
        own = -sign * row.quality.mean
        family = best.get((row.group, row.against), 0.0) if row.role in ("distilled", "control") else None
        first = own if family is None else -family
        return min(_ROLES.index(row.role), 2), first, row.group + row.against, _ROLES.index(row.role), own

    return sorted(rows, key=place)


def compare(
    folders: Sequence[RunFolder],
    bench_rows: Sequence[benchmark.Row] | None = None,
    *,
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
    bench: Callable[..., Mapping[str, benchmark.Cost]] = benchmark.bench,
) -> Comparison:
    """Compare runs.

    Args:
        folders: what :func:`collect` found.
        bench_rows: real documents to measure latency and memory on; None leaves these figures out.
        rounds: of the benchmark.
        progress: is told what is being measured.
        bench: measures model folders by label, as :func:`distill.benchmark.bench` does.

    Raises:
        UsageError: no run is finished, or two are of different data or tasks.
        DataError: a run's files are damaged.
        DistillError: a model cannot be benchmarked.
    """
    notes: list[str] = []
    done = _load(folders, notes)
    spec = done[0].metrics["task"]
    task = TaskSpec(spec["kind"], tuple(spec["labels"]), spec["metric"])
    other = sorted({m for one in done if (m := one.metrics["task"]["metric"]) != task.metric})
    if other:
        notes.append(f"Compared by {task.metric}, though some runs were selected by {', '.join(other)}.")
    lines = _lines(done)
    count = Counter(_label(line[0].run) for line in lines)
    rows, models = [], {}
    for line in lines:
        label = _label(line[0].run)
        label = label if count[label] == 1 else f"{label} ({line[0].run.group})"
        rows.append(_row(line, label, done, task))
        models[label] = line[0].folder.model
    rows = _ordered(rows, task.metric)
    for row in rows:
        if row.role == "distilled":
            _against_control(row, done, task.metric, notes)
            _calibrated(row, done, notes)
    _rivals(rows, task.metric, notes)
    if task.kind == "span":
        notes.append("There is no baseline for spans: TF-IDF finds none.")
    tests = len(done[0].row_id)
    if task.metric == "accuracy":
        p = rows[0].quality.mean
        notes.append(
            f"The test split has {tests:,} rows: which ones they happen to be moves an accuracy of {p:.3f} "
            f"by ± {1.96 * math.sqrt(p * (1 - p) / tests):.3f}, beside the spread over seeds."
        )
    if bench_rows is not None:
        present = {row.label: models[row.label] for row in rows if models[row.label].is_dir()}
        notes += [
            f"{row.label}: no model folder, so its cost is not measured."
            for row in rows
            if row.label not in present
        ]
        costs = bench(present, bench_rows, rounds, progress=progress)
        for row in rows:
            if cost := costs.get(row.label):
                for name, value in asdict(cost).items():
                    setattr(row, name, value)
    sizes = {b["words"]: b["rows"] for one in reversed(done) for b in one.metrics["test"].get("buckets", [])}
    sizes = dict(sorted(sizes.items(), key=lambda item: int(item[0].rstrip("+").split("-")[0])))
    return Comparison(done[0].run.experiment, task, tests, rows, sizes, notes)
