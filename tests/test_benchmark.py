from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from distill import benchmark
from distill.benchmark import BATCH, SINGLES, Row, bench
from distill.errors import DistillError, OutOfMemory, UsageError

ROWS: list[Row] = [(f"document {i}", None) for i in range(40)]


class Fake:
    """Writes down when it is asked what; its folder's file ``behaviour`` says how it goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.behaviour = (folder / "behaviour").read_text()
        self.parameters = 7
        self.weights = (
            np.ones(int(self.behaviour.split()[1]) * 125_000) if "megabytes" in self.behaviour else None
        )
        if self.behaviour == "cannot load":
            raise DistillError("no weights in here")

    def logits(self, rows: Sequence[Row]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        began = time.perf_counter_ns()
        if self.behaviour == "fails":
            raise ValueError("shapes do not match")
        if self.behaviour == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02 if self.behaviour == "slow" else 0.001)
        with (self.folder.parent / "log").open("a") as log:
            first = rows[0][0].split()[1]
            log.write(
                f"{self.folder.name} {len(rows)} {first} {began} {time.perf_counter_ns()} {os.getpid()}\n"
            )
        return np.zeros((len(rows), 2), np.float32)


def folder(tmp_path: Path, name: str, behaviour: str = "well") -> Path:
    path = tmp_path / name
    path.mkdir()
    (path / "behaviour").write_text(behaviour)
    return path


def read_log(tmp_path: Path) -> list[tuple[str, int, int, int, int, int]]:
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    return [(name, int(n), int(first), int(a), int(b), int(pid)) for name, n, first, a, b, pid in lines]


def test_models_are_asked_in_turn_in_their_own_processes_and_never_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    folders = {name: folder(tmp_path, name) for name in ("one", "two")}
    costs = bench(folders, ROWS, rounds=2, progress=said.append, loader=Fake, libraries=())
    log = read_log(tmp_path)
    rounds = [("one", "two") for _ in range(3)]  # the warm-up and two counted ones
    calls = [1] * SINGLES + [BATCH]
    assert [(name, n) for name, n, *_ in log] == [
        (name, n) for pair in rounds for name in pair for n in calls
    ]
    pids = {name: {line[5] for line in log if line[0] == name} for name in folders}
    assert all(len(p) == 1 for p in pids.values())
    assert len({os.getpid(), *pids["one"], *pids["two"]}) == 3
    spans = sorted((began, ended) for *_, began, ended, _ in log)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    documents = {name: [first for who, _, first, *_ in log if who == name] for name in folders}
    assert documents["one"] == documents["two"], "every model must read the same documents"
    assert list(costs) == ["one", "two"]
    assert said[:3] == ["loading one", "loading two", "one: warm-up"]
    assert said[-1] == "two: round 2 of 2"
    assert not multiprocessing.active_children()


def test_figures_are_of_what_was_measured(tmp_path: Path) -> None:
    folders = {"quick": folder(tmp_path, "quick"), "slow": folder(tmp_path, "slow", "slow")}
    (folders["slow"] / "part").mkdir()
    (folders["slow"] / "part" / "weights").write_bytes(b"x" * 1000)
    costs = bench(folders, ROWS[:3], rounds=2, loader=Fake, libraries=())
    for cost in costs.values():
        assert 0 < cost.p50_ms <= cost.p95_ms
        assert cost.docs_per_second > 0
        assert cost.parameters == 7
    assert costs["slow"].p50_ms >= 20  # it sleeps that long
    assert costs["slow"].docs_per_second <= BATCH / 0.02
    assert costs["slow"].bytes == 1000 + len("slow")


def test_the_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = iter([([9.0] * SINGLES, 9.0, 5), ([1.0] * SINGLES, 1.0, 6), ([3.0] * SINGLES, 4.0, 7)])
    monkeypatch.setattr(benchmark._Worker, "ask", lambda self, singles, batch: next(answers))
    cost = bench({"one": folder(tmp_path, "one")}, ROWS, rounds=2, loader=Fake, libraries=())["one"]
    assert (cost.p50_ms, cost.p95_ms) == (2000.0, 2000.0)
    assert cost.docs_per_second == np.median([BATCH / 1, BATCH / 4])
    assert cost.peak_bytes == 7


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="elsewhere the peak is the whole process's"
)
def test_memory_is_the_model_alone_however_large_the_parent_is(tmp_path: Path) -> None:
    parent = np.ones(300 * 125_000)  # 300 MB that a worker must not be charged with
    folders = {"small": folder(tmp_path, "small"), "large": folder(tmp_path, "large", "megabytes 100")}
    costs = bench(folders, ROWS, rounds=1, loader=Fake, libraries=())
    assert psutil.Process().memory_info().rss > parent.nbytes
    assert costs["small"].peak_bytes < 30e6
    assert 100e6 <= costs["large"].peak_bytes < 130e6


@pytest.mark.parametrize(
    ("behaviour", "kind", "message"),
    [
        ("cannot load", DistillError, "benchmark of bad: no weights in here"),
        ("fails", DistillError, "benchmark of bad: ValueError: shapes do not match"),
        ("killed", OutOfMemory, "benchmark of bad: the system killed it"),
    ],
)
def test_a_workers_trouble_is_one_line_and_ends_all_workers(
    tmp_path: Path, behaviour: str, kind: type[DistillError], message: str
) -> None:
    folders = {"good": folder(tmp_path, "good"), "bad": folder(tmp_path, "bad", behaviour)}
    with pytest.raises(kind, match=message) as caught:
        bench(folders, ROWS, rounds=1, loader=Fake, libraries=())
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one document"):
        bench({"one": folder(tmp_path, "one")}, [], loader=Fake)


def test_the_libraries_that_are_imported_beforehand_exist() -> None:
    from importlib.util import find_spec

    assert all(find_spec(name) for name in benchmark.LIBRARIES)


def test_importing_it_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, distill.benchmark, distill.comparison, distill.chart\n"
    code += "assert not {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
