"""Run folders: their names, their state, their journal, and who may write in them. Knows no training.

runs/<name>/
run.json          what it is and how far it got (class Run)
recipe.yaml       resolved
journal.jsonl     every figure in the order in which it came
metrics.json      the finished run's figures
predictions.safetensors   test rows: row_id, logits, labels, words
suspects.json     of a distilled student: training labels that its teacher does not believe
model/            what from_pretrained reads
checkpoints/      gone once the run is finished
runs/_logits/<key>/ cached logits, found by content and shared by all runs
runs/_augmented/<key>-<hash>.jsonl   copies of documents that students learn from (see augmentation.py)
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from distill import processes, records
from distill.errors import DataError, Interrupted, UsageError, nearest
from distill.files import write_json, write_text

Role = Literal["teacher", "distilled", "control", "baseline", "pretrained"]
Status = Literal["running", "finished", "interrupted", "failed"]
Time = Annotated[float, Field(ge=0, lt=1e11)]
"""Seconds since 1970."""
MAX_LINE = 1 << 16
"""Bytes of the journal's last line that are read to see when it was written."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass
class Run:
    """One run, as ``run.json`` holds it."""

    name: str
    role: Role
    group: str
    """The name shared by the seeds and controls that one command trained."""
    recipe: str
    """The recipe's name."""
    experiment: str
    model: str
    """The architecture, or the student's preset name."""
    seed: int
    created: Time
    status: Status = "running"
    finished: Time | None = None
    error: str | None = None
    against: str = ""
    """``model`` of the controls that it is held against, where that is not its own: a sweep's share theirs."""
    teachers: list[str] = field(default_factory=list)
    command: dict[str, Any] = field(default_factory=dict)
    """What the command line asked for, so that ``--resume`` alone is enough."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Hashes and sizes that a later step relies on: data, initial weights, precision, world size."""


class _Task(TypedDict):
    kind: str
    labels: list[str]
    metric: str


class _Split(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    buckets: NotRequired[list[_Bucket]]
    labels: NotRequired[dict[str, dict[str, int | float]]]


class _Bucket(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    words: Annotated[str, Field(pattern=r"^[0-9]{1,18}(-[0-9]{1,18}|\+)$")]
    rows: int


class _Train(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    seconds: Annotated[float, Field(ge=0, lt=1e11)]
    steps: int


class _Metrics(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    task: _Task
    model: NotRequired[dict[str, int]]
    train: _Train
    validation: _Split
    test: NotRequired[_Split]
    test_other: NotRequired[_Split]


class _Entry(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    time: Time
    step: Annotated[int, Field(ge=0)]
    metrics: dict[str, Any]


@functools.cache
def _entry_of() -> TypeAdapter[_Entry]:
    """Return what reads a line of the journal; made once, for each step may write one."""
    return TypeAdapter(_Entry)


def runs_folder() -> Path:
    """Return the folder of all runs: ``$DISTILL_RUNS`` or ``./runs``."""
    return Path(os.environ.get("DISTILL_RUNS", "runs")).absolute()


def check_name(name: str) -> str:
    """Refuse a name that could leave the runs folder or disturb a terminal.

    Raises:
        UsageError: not 1 to 64 letters, digits, dots, dashes or underscores, beginning with one of the
            first two.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"run name {name[:80]!a}: must be 1 to 64 letters, digits, '.', '-' or '_', and begin with a letter or digit"
        )
    return name


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.journal = path / "journal.jsonl"
        self.recipe = path / "recipe.yaml"
        self.predictions = path / "predictions.safetensors"
        self.suspects = path / "suspects.json"

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    def refuse_links(self) -> None:
        """Refuse links that lead out of the folder: what is written or sent from here must be the run's own.

        Raises:
            DataError: there is one.
        """
        inside = self.path.resolve()  # the folder itself may be a link, to another disk
        for path in self.path.rglob("*"):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise DataError(
                    f"{self.name}/{path.relative_to(self.path)}: a link out of the run's folder; put the file there itself"
                )

    def read(self) -> Run:
        """Read what the run is and how far it got.

        Raises:
            DataError: ``run.json`` is damaged, or names what is no name.
        """
        run = records.read(self.path / "run.json", Run)
        if not _NAME.fullmatch(run.group):
            raise DataError(f"{self.name}/run.json: damaged: group: {run.group[:80]!a} is no run's name")
        return replace(run, name=self.name)  # a folder may have been renamed

    def write(self, run: Run) -> None:
        """Write what the run is and how far it got."""
        write_json(self.path / "run.json", asdict(run))

    def update(self, **changes: Any) -> Run:
        """Change fields of ``run.json``."""
        run = self.read()
        for key, value in changes.items():
            setattr(run, key, value)
        self.write(run)
        return run

    def metrics(self) -> dict[str, Any]:
        """Read the finished run's figures (empty before it has finished).

        Raises:
            DataError: the file is damaged, or a split lacks the task's metric.
        """
        path = self.path / "metrics.json"
        if not path.exists():
            return {}
        found: dict[str, Any] = {**records.read(path, _Metrics)}
        metric = found["task"]["metric"]
        for split in [name for name in ("validation", "test", "test_other") if name in found]:
            if not isinstance(found[split].get(metric), int | float):
                raise DataError(f"{self.name}/{path.name}: damaged: {split} has no {metric:.80}")
        return found

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write the finished run's figures."""
        write_json(self.path / "metrics.json", metrics)

    def log(self, step: int, metrics: dict[str, float], event: str = "metrics") -> None:
        """Append a line to the journal: the truth from which every tracker is fed.

        Args:
            step: optimizer steps done.
            metrics: figures by name; the part before the slash is train, eval, test, bench or model.
            event: what happened.
        """
        now = max(time.time(), self._last_time())  # a clock that is set back must not turn the figures' order
        line = json.dumps({"time": round(now, 3), "event": event, "step": step, "metrics": metrics})
        with self.journal.open("a+b") as file:
            # A crash may have cut the last line short: the new one must not be lost with it.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _last_time(self) -> float:
        """Return when the journal's last line was written; 0 where there is none, or it was cut short."""
        if not self.journal.exists():
            return 0.0
        with self.journal.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LINE))
            last = file.read().splitlines()[-1:]
        try:
            return float(_entry_of().validate_json(last[0] if last else b"")["time"])
        except ValidationError:
            return 0.0

    def entries(self) -> Iterator[dict[str, Any]]:
        """Read the journal; a line that a crash cut short, or that holds something else, is left out."""
        if not self.journal.exists():
            return
        adapter = _entry_of()
        with self.journal.open("rb") as file:
            for line in file:
                try:
                    yield {**adapter.validate_json(line, strict=True)}
                except ValidationError:
                    continue

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process alone.

        Raises:
            UsageError: another process is writing in it.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{self.name}: another process is working in this run; wait, or take another --name"
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the folder, and write down how the work in it ended."""
        with self.locked():
            self.update(status="running", error=None)
            try:
                yield
            except (KeyboardInterrupt, Interrupted):
                self.update(status="interrupted", error="stopped from outside")
                raise
            except BaseException as error:
                reason = f"{type(error).__name__}: {error}"[:500]
                # A file's name may hold bytes that are no text.
                self.update(status="failed", error=reason.encode("utf-8", "backslashreplace").decode())
                raise
            self.update(status="finished", finished=max(time.time(), self.read().created))

    def abandon(self) -> None:
        """Write down, in place of a main process that may be lost, that the run can be gone on with."""
        if self.read().status == "running":
            self.update(status="interrupted", error="a process of the job was lost")


def now() -> float:
    """Return the time, later than that of every run here: a clock that is set back must not turn their order."""
    try:
        latest = max((folder.read().created for folder in every()), default=0.0)
    except DataError:  # a damaged folder is told to who asks for it; it holds up no new run
        latest = 0.0
    return max(time.time(), latest + 0.001)


def create(run: Run, recipe: str) -> RunFolder:
    """Make a new run's folder, complete or not at all.

    Args:
        run: what it is; its name must be free.
        recipe: the resolved recipe, as YAML.

    Raises:
        UsageError: the name is taken or not a name.
    """
    path = runs_folder() / check_name(run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        raise _taken(run.name) from None
    folder = RunFolder(path)
    write_text(folder.recipe, recipe)
    folder.write(run)
    return folder


def next_name() -> str:
    """Return the first free name of run1, run2, … and hold it until a folder of that name is made."""
    root = runs_folder()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        counter = root / ".next"
        taken = [
            int(p.name[3:].split("-")[0])
            for p in root.glob("run[0-9]*")
            if p.name[3:].split("-")[0].isdigit()
        ]
        last = int(counter.read_text()) if counter.exists() else 0
        number = max([last, *taken], default=0) + 1
        write_text(counter, str(number))
    return f"run{number}"


def claim(name: str | None) -> str:
    """Return the given name, or the next free one; the same on every process of the job."""
    return name or processes.agree(next_name() if processes.is_main() else "")


def _taken(name: str) -> UsageError:
    return UsageError(f"run {name} exists already; take another --name, or --resume {name}")


def begin_or_resume(name: str | None, resume: str | None) -> RunFolder | None:
    """Return the run that is to be gone on with; None where a new one begins.

    Raises:
        UsageError: the new one's name is taken, or the old one has finished.
    """
    if name is not None:
        refuse_taken(name)
    folder = find(resume) if resume else None
    if folder is not None and folder.read().status == "finished":
        raise UsageError(f"{folder.name} has finished already; there is nothing to resume")
    return folder


def refuse_taken(name: str) -> None:
    """Raise UsageError when a name is no name for a run, or another run has it.

    Of several processes the main one looks: it may have made the run already when another comes by.
    """
    if (runs_folder() / check_name(name)).exists() and processes.is_main():
        raise _taken(name)


def find(name: str) -> RunFolder:
    """Find a run by its name.

    Raises:
        UsageError: there is none; the nearest name is told.
    """
    path = runs_folder() / check_name(name)
    if not (path / "run.json").is_file():
        known = [folder.name for folder in every()]
        hint = nearest(name, known) if known else "; begin with distill teacher --recipe quickstart"
        raise UsageError(f"no run called {name!r} in {runs_folder().name}/{hint}")
    folder = RunFolder(path)
    folder.refuse_links()
    return folder


def every() -> list[RunFolder]:
    """List all runs, oldest first."""
    folders = [
        RunFolder(p.parent) for p in runs_folder().glob("*/run.json") if _NAME.fullmatch(p.parent.name)
    ]
    return sorted(folders, key=lambda folder: folder.read().created)


def recipe_of(teachers: Sequence[str], recipe: str | None) -> tuple[str, str]:
    """Return a recipe, that of the first teacher that is a run here where none is given, and the recipe's name.

    Raises:
        UsageError: there is none, or a teacher stands twice or has not finished.
    """
    for at, name in enumerate(teachers):
        if name in teachers[:at]:
            raise UsageError(f"--teacher: {name} stands twice")
        refuse_unfinished(name)
    if recipe is not None:
        return recipe, recipe
    for name in teachers:
        if _NAME.fullmatch(name) and (runs_folder() / name / "recipe.yaml").is_file():
            run = find(name)
            return str(run.recipe), run.read().recipe
    raise UsageError("--recipe is missing: the teacher is no run here, so it has no recipe of its own")


def refuse_unfinished(name: str) -> None:
    """Raise UsageError when a name can only be a run's, and that run is absent or has not finished."""
    if "/" in name or name.startswith(("~", ".")) or re.fullmatch(r"[0-9a-f]{32}", name):
        return
    run = find(name).read()
    if run.status != "finished":
        verb = {"teacher": "teacher", "pretrained": "pretrain"}.get(run.role, "student")
        raise UsageError(
            f"{name} has not finished ({run.status}); go on with it: distill {verb} --resume {name}"
        )
