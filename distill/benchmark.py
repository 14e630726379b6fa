"""What models cost: size, latency, throughput and memory, each model alone in a process of its own.

The workers stay alive and are asked in turn, one round each, so that whatever else the machine does in
the meantime meets all models alike, and no two of them ever compute at once. Times are of everything
from a document's text to its logits, tokenising included. Knows no architecture and no run.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distill.errors import DistillError, OutOfMemory, UsageError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

Row = tuple[str, str | None]
SINGLES = 16
"""Documents that a round reads one by one."""
BATCH = 32
"""Documents that a round then reads at once."""
LIBRARIES = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
    "sklearn.linear_model",
    "sklearn.feature_extraction.text",
    "distill.models",
)
"""Imported by a worker before its idle memory is read: what every model needs is no model's cost."""
_PATIENCE = 5.0
"""Seconds that a worker has to end by itself."""


class Predictor(Protocol):
    """What a loaded model can do."""

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""

    def logits(self, rows: Sequence[Row]) -> Any:
        """Read documents, from text to logits ``(n, classes)``."""


Loader = Callable[[Path], Predictor]


@dataclass(frozen=True)
class Cost:
    """What one model costs."""

    p50_ms: float
    """Milliseconds for one document alone: median over the rounds of each round's median."""
    p95_ms: float
    """The same of each round's 95th percentile."""
    docs_per_second: float
    """Documents a second in batches of 32: median over the rounds."""
    peak_bytes: int
    """Peak resident memory while it loads and computes (batches too), above the idle process."""
    parameters: int
    bytes: int
    """Size of the model folder's files."""


def load(folder: Path) -> Predictor:
    """Load a model folder with distill.models, which is imported only here."""
    from distill.models import load_predictor

    return load_predictor(folder)


def folder_bytes(folder: Path) -> int:
    """Total size of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def peak_memory() -> int:
    """Bytes of this process's peak resident memory.

    Linux carries ``ru_maxrss`` over from the process that started this one, so a large parent would
    hide every model; ``VmHWM`` begins anew with the program.
    """
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def idle_memory() -> int:
    """Bytes resident now; the peak counts from here, where the system can set it back."""
    import psutil

    with suppress(OSError):  # not Linux, or not allowed: the peak of the imports may hide a small model
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(psutil.Process().memory_info().rss)


def _time(predictor: Predictor, singles: Sequence[Row], batch: Sequence[Row]) -> tuple[list[float], float]:
    """Time one round: seconds for each single document, and for the batch."""
    seconds = []
    for row in singles:
        began = time.perf_counter()
        predictor.logits([row])
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    predictor.logits(list(batch))
    return seconds, time.perf_counter() - began


def _work(pipe: Connection, folder: Path, loader: Loader, libraries: Sequence[str]) -> None:
    """Run in the worker: load the model, then answer each question until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the parent ends this one
    try:
        for name in libraries:
            import_module(name)
        idle = idle_memory()
        predictor = loader(folder)
        pipe.send(("answer", int(predictor.parameters)))
        while (question := pipe.recv()) is not None:
            timed = _time(predictor, *question)
            pipe.send(("answer", (*timed, max(0, peak_memory() - idle))))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except DistillError as error:
        pipe.send(("error", str(error)))
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, name: str, folder: Path, loader: Loader, libraries: Sequence[str]) -> None:
        import multiprocessing

        context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's memory and threads
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_work, args=(theirs, folder, loader, tuple(libraries)), daemon=True, name=f"bench {name}"
        )
        self.process.start()
        theirs.close()  # so that the worker's death is the end of the pipe, not a wait for ever

    def answer(self) -> Any:
        """Wait for the worker's answer.

        Raises:
            DistillError: the worker failed; OutOfMemory where the system killed it.
        """
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(_PATIENCE)
            code = self.process.exitcode
            if code == -signal.SIGKILL:
                raise OutOfMemory(
                    f"benchmark of {self.name}: the system killed it, most likely for memory"
                ) from None
            raise DistillError(f"benchmark of {self.name}: its process ended with exit code {code}") from None
        if kind == "error":
            raise DistillError(f"benchmark of {self.name}: {value}")
        return value

    def ask(self, singles: Sequence[Row], batch: Sequence[Row]) -> tuple[list[float], float, int]:
        """Have it read a round of documents: seconds for each single one, for the batch, and peak bytes."""
        with suppress(OSError):  # it died; answer() says of what
            self.pipe.send((list(singles), list(batch)))
        result: tuple[list[float], float, int] = self.answer()
        return result

    def close(self) -> None:
        """End the worker, gently first."""
        with suppress(OSError):
            self.pipe.send(None)
        self.pipe.close()
        self.process.join(_PATIENCE if self.process.exitcode is None else 0)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _part(rows: Sequence[Row], start: int, count: int) -> list[Row]:
    """Take ``count`` rows from ``start`` on, beginning anew at the end."""
    return [rows[(start + i) % len(rows)] for i in range(count)]


def bench(
    folders: Mapping[str, Path],
    rows: Sequence[Row],
    rounds: int = 5,
    *,
    progress: Callable[[str], None] | None = None,
    loader: Loader = load,
    libraries: Sequence[str] = LIBRARIES,
) -> dict[str, Cost]:
    """Measure what models cost, in turn, each in its own process.

    Args:
        folders: model folders by name.
        rows: real documents, as (text, second text or None); every model reads the same ones.
        rounds: how many rounds are counted; one more comes first and is not.
        progress: is told what is being done.
        loader: turns a folder into a model; it must be importable in a new process.
        libraries: modules to import before idle memory is read.

    Raises:
        DistillError: a model cannot be loaded or fails.
        UsageError: no documents or no rounds.
    """
    import numpy as np

    if not rows or rounds < 1:
        raise UsageError("the benchmark needs at least one document and one round")
    say = progress or (lambda _: None)
    timed: dict[str, list[tuple[list[float], float, int]]] = {name: [] for name in folders}
    parameters = {}
    with ExitStack() as stack:
        workers = []
        for name, folder in folders.items():
            say(f"loading {name}")
            worker = _Worker(name, folder, loader, libraries)
            stack.callback(worker.close)
            parameters[name] = worker.answer()  # loaded before the next one starts
            workers.append(worker)
        for number in range(rounds + 1):
            singles, batch = _part(rows, number * SINGLES, SINGLES), _part(rows, number * BATCH, BATCH)
            for worker in workers:
                say(f"{worker.name}: round {number} of {rounds}" if number else f"{worker.name}: warm-up")
                timed[worker.name].append(worker.ask(singles, batch))
    result = {}
    for name, folder in folders.items():
        counted = timed[name][1:]
        result[name] = Cost(
            p50_ms=float(np.median([np.percentile(singles, 50) for singles, _, _ in counted])) * 1000,
            p95_ms=float(np.median([np.percentile(singles, 95) for singles, _, _ in counted])) * 1000,
            docs_per_second=float(np.median([BATCH / seconds for _, seconds, _ in counted])),
            peak_bytes=timed[name][-1][2],
            parameters=parameters[name],
            bytes=folder_bytes(folder),
        )
    return result
