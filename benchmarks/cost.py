"""What `--dry-run` says a run costs, held against the run: tokens, seconds, memory and disk.

    pip install --no-deps -r requirements-demo.txt
    python benchmarks/cost.py

The teacher of quickstart, two short runs. The first gives the rate of this machine in FLOPs a second, validation
included; the second is predicted by it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _shared import here, say

STEPS = (10, 40)
LIBRARIES = "import torch, transformers, accelerate, datasets, sklearn, mlflow, mlflow.tracking"


def peak_of(process: subprocess.Popen[bytes]) -> int:
    """Return the bytes of memory that a process has used at most; 0 once it has gone."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    marks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(marks[0]) if marks else 0


def watched(command: list[str], folder: Path) -> dict[str, int]:
    """Run a command; return its peak of ``memory`` and the largest size of ``folder`` meanwhile, in bytes."""
    found = {"memory": 0, "disk": 0}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        found["memory"] = max(found["memory"], peak_of(process))
        sizes = 0
        for file in list(folder.rglob("*")):
            try:
                sizes += file.stat().st_size if file.is_file() else 0
            except FileNotFoundError:  # a checkpoint that has just been renamed
                continue
        found["disk"] = max(found["disk"], sizes)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return found


def predicted(settings: list[str]) -> tuple[Any, float]:
    """Return what a dry run finds, and the FLOPs of its evaluation."""
    from distill import data, fitting, models, planning, recipe

    wish = recipe.load("quickstart", settings)
    corpus = data.load(wish)
    model = models.build(wish.teacher, "teacher", corpus.task, 0)
    train, validation = (fitting.encode_rows(model, corpus.splits[name]) for name in ("train", "validation"))
    read = planning.amount(validation, model.keys)
    reading = fitting.reading_of(model, wish.teacher.train)
    return fitting.cost_of(model, wish.teacher.train, train), reading.forward(*read)


def main() -> None:
    """Measure, and print the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"DISTILL_RUNS": place, "HF_HUB_OFFLINE": "1"}
        idle = watched(["-c", f"{LIBRARIES}; import time; time.sleep(1)"], Path(place))["memory"]
        rate = 0.0
        for steps in STEPS:
            settings = [f"teacher.train.max_steps={steps}", "teacher.train.evaluate_every=1000"]
            cost, evaluation = predicted(settings)
            run = Path(place) / f"t{steps}"
            asked = [part for setting in settings for part in ("--set", setting)]
            found = watched(
                ["-m", "distill", "teacher", "--recipe", "quickstart", "--name", run.name, *asked], run
            )
            trained = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["train"]
            if rate == 0.0:
                rate = (cost.flops + evaluation) / trained["seconds"]
        say(f"{here()}; {rate / 1e9:.1f} GFLOP/s in the run of {STEPS[0]} steps")
        say()
        say(f"| {STEPS[1]} steps | predicted | measured |")
        say("|---|---|---|")
        say(f"| tokens | {cost.tokens:,} | {trained['tokens']:,} |")
        say(f"| seconds | {(cost.flops + evaluation) / rate:.0f} | {trained['seconds']:.0f} |")
        say(
            f"| memory above {idle / 1e6:.0f} MB of libraries | {cost.memory / 1e6:.0f} MB | {(found['memory'] - idle) / 1e6:.0f} MB |"
        )
        say(f"| disk while it trains | {cost.disk / 1e6:.0f} MB | {found['disk'] / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
