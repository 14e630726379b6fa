"""Kill runs at random instants, go on with each, and compare its weights with those of a run that nobody stopped.

    python tests/soak.py --kills 20 --seed 0

Each of teacher training, student training (with its control), caching and pre-training is killed that often by
``kill -9``, half of it on one rank and half on two, with dropout and gradient accumulation; and short runs once at
each write of a file. Runs are gone on with by ``--resume NAME`` alone, caches by the command that began them, and a
run that was killed before it had a folder is begun again. Exit code 1 where a single bit differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import conftest
import numpy as np
from forked import job
from safetensors.numpy import load_file

KINDS = ("teacher", "pretrain", "student", "cache")
"""The longest first."""
TRAIN = {"epochs": 2.0, "evaluate_every": 4, "tokens_per_batch": 256}
CHANGES = {
    **{f"{section}.train.{key}": value for section in ("teacher", "student") for key, value in TRAIN.items()},
    **{f"pretraining.train.{key}": value for key, value in {**TRAIN, "precision": "fp32"}.items()},
    "cache.rows_per_shard": 8,
    "cache.precision": "fp32",
}
SHORT = [
    f"--set={section}.train.{key}"
    for section in ("teacher", "pretraining")
    for key in ("max_steps=2", "evaluate_every=1")
]
"""Options of a run that is killed at each of its writes."""
RUNS = {"teacher": ("x",), "student": ("x", "x-control"), "pretrain": ("x",)}
"""The runs that a command makes."""


class Bench:
    """Where runs are begun, killed and gone on with."""

    def __init__(self, root: Path) -> None:
        tokenizer = conftest.write_tokenizer(root / "tokenizer")
        self.recipe = conftest.write_recipe(root / "recipe.yaml", tokenizer, CHANGES)
        self.root = root
        self.begun: dict[str, Path] = {}
        """By kind: the runs folder in which its command begins."""

    def command(self, kind: str, runs: Path, *more: str) -> list[str]:
        """Say what begins, with ``more`` options, or goes on, as a user would."""
        if kind == "cache":
            return ["cache", "--teacher", "t"]
        if (runs / "x" / "run.json").is_file():
            return [kind, "--resume", "x"]
        if kind == "student":
            return ["student", "--teacher", "t", "--name", "x"]
        return [kind, "--recipe", str(self.recipe), "--name", "x", *more]

    def start(
        self, ranks: int, arguments: Sequence[str], runs: Path, **environment: str
    ) -> list[BaseProcess]:
        return job(ranks, *arguments, output=_log(runs), DISTILL_RUNS=str(runs), **environment)

    def finish(self, ranks: int, arguments: Sequence[str], runs: Path) -> None:
        """Run a command to its end.

        Raises:
            RuntimeError: it failed; what it said is told.
        """
        _log(runs).unlink(missing_ok=True)
        if codes := [code for code in _wait(self.start(ranks, arguments, runs)) if code]:
            raise RuntimeError(f"distill {' '.join(arguments)}: {codes}\n{_log(runs).read_text()}")

    def prepare(self) -> None:
        """Make the teacher and the logits that other kinds begin with."""
        first = self.root / "teacher"
        first.mkdir()
        _store(first / "mlflow.db")
        self.begun = {"teacher": first, "pretrain": first}
        taught = self.begun["cache"] = shutil.copytree(first, self.root / "taught")
        self.finish(1, ["teacher", "--recipe", str(self.recipe), "--name", "t"], taught)
        cached = self.begun["student"] = shutil.copytree(taught, self.root / "cached")
        self.finish(1, ["cache", "--teacher", "t"], cached)

    def fresh(self, kind: str) -> Path:
        """Make a runs folder in which a kind's command can begin."""
        runs = self.root / f"runs-{kind}"
        shutil.rmtree(runs, ignore_errors=True)
        return shutil.copytree(self.begun[kind], runs)


def _log(runs: Path) -> Path:
    return runs.with_suffix(".txt")


def _store(file: Path) -> None:
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=f"sqlite:///{file}")


def _wait(ranks: Sequence[BaseProcess]) -> list[int | None]:
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def _finished(kind: str, runs: Path) -> bool:
    """Say whether a killed command had nothing left to do but to tell MLflow: there is no going on with it."""
    about = runs / "x" / "run.json"
    return kind in ("teacher", "pretrain") and about.is_file() and _status(about) == "finished"


def _status(about: Path) -> str:
    return str(json.loads(about.read_text())["status"])


def digest(kind: str, runs: Path) -> str:
    """Hash what a command has made: weights, or cached logits by row id."""
    whole = hashlib.sha256()
    if kind != "cache":
        for name in RUNS[kind]:
            assert _status(runs / name / "run.json") == "finished"
            whole.update((runs / name / "model" / "model.safetensors").read_bytes())
        return whole.hexdigest()
    (manifest,) = runs.glob("_logits/*/manifest.json")
    shards = json.loads(manifest.read_text())["shards"]
    parts = [load_file(manifest.with_name(shard["file"])) for shard in shards]
    ids = np.concatenate([part["row_id"] for part in parts])
    logits = np.concatenate([part["logits"] for part in parts])
    assert len(np.unique(ids)) == len(ids)
    whole.update(logits[np.argsort(ids)].tobytes())
    return whole.hexdigest()


@dataclass
class Tally:
    """What has been tried, and what came of it."""

    kills: int = 0
    resumed: int = 0
    equal: int = 0

    def count(
        self, bench: Bench, kind: str, ranks: int, runs: Path, expected: str, where: str, *more: str
    ) -> None:
        """Go on with a killed run and compare."""
        self.kills += 1
        try:
            if not _finished(kind, runs):
                bench.finish(ranks, bench.command(kind, runs, *more), runs)
            self.resumed += 1
            found = digest(kind, runs)
        except (RuntimeError, AssertionError, OSError, ValueError) as error:
            print(f"{kind}, {ranks} rank(s), killed {where}: {error}", flush=True)
            return
        self.equal += found == expected
        if found != expected:
            print(f"{kind}, {ranks} rank(s), killed {where}: other bits", flush=True)


def at_instants(bench: Bench, kind: str, ranks: int, kills: int, rng: random.Random, tally: Tally) -> None:
    """Kill a command at random instants of its time."""
    runs = bench.fresh(kind)
    began = time.monotonic()
    bench.finish(ranks, bench.command(kind, runs), runs)
    seconds, expected, done = time.monotonic() - began, digest(kind, runs), 0
    while done < kills:
        runs, instant = bench.fresh(kind), rng.uniform(0, seconds)
        alive = bench.start(ranks, bench.command(kind, runs), runs)
        time.sleep(instant)
        for rank in rng.sample(alive, len(alive)):
            rank.kill()
        if -signal.SIGKILL in _wait(alive):  # else it had finished
            done += 1
            tally.count(bench, kind, ranks, runs, expected, f"after {instant:.2f} of {seconds:.2f} s")
    print(f"{kind}, {ranks} rank(s): {kills} kills in its {seconds:.1f} s", flush=True)


def at_writes(bench: Bench, kind: str, tally: Tally) -> None:
    """Kill a command at each of its writes."""
    runs = bench.fresh(kind)
    bench.finish(1, bench.command(kind, runs, *SHORT), runs)
    expected, write = digest(kind, runs), 1
    while True:
        runs = bench.fresh(kind)
        alive = bench.start(1, bench.command(kind, runs, *SHORT), runs, DISTILL_DIE_AT_WRITE=str(write))
        if _wait(alive) != [-signal.SIGKILL]:
            break
        tally.count(bench, kind, 1, runs, expected, f"at write {write}", *SHORT)
        write += 1
    print(f"{kind}: killed at each of its {write - 1} writes", flush=True)


def soak(bench: Bench, kind: str, asked: argparse.Namespace) -> Tally:
    """Kill a kind's command as often as was asked for."""
    rng, tally = random.Random(f"{kind} {asked.seed}"), Tally()
    for ranks in (1, 2):
        share = asked.kills - asked.kills // 2 if ranks == 1 else asked.kills // 2
        if share:
            at_instants(bench, kind, ranks, share, rng, tally)
    if kind != "student" and not asked.no_writes:  # whose writes are a teacher's
        at_writes(bench, kind, tally)
    return tally


def main() -> int:
    """Run it all."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--kills", type=int, default=20, help="of each kind, on one and two ranks by turns")
    options.add_argument("--seed", type=int, default=0, help="of the instants")
    options.add_argument("--no-writes", action="store_true", help="leave the kills at each write out")
    asked = options.parse_args()
    began = time.monotonic()
    # Killed children leave semaphores behind, which is no news.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    with tempfile.TemporaryDirectory(prefix="distill-soak-") as root:
        bench = Bench(Path(root))
        bench.prepare()
        with ThreadPoolExecutor(2) as lanes:  # most of a command's time is one core's
            done = list(lanes.map(lambda kind: soak(bench, kind, asked), KINDS))
    tally = Tally(*(sum(getattr(one, name) for one in done) for name in ("kills", "resumed", "equal")))
    print(f"{tally.kills} kills, {tally.resumed} resumed, {tally.equal} bit-equal")
    print(f"in {time.monotonic() - began:.0f} s, seed {asked.seed}")
    return 0 if tally.kills == tally.equal else 1


if __name__ == "__main__":
    sys.exit(main())
