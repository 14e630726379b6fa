"""What a person sees of results: tables and closing words. Knows no training."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from distill import logits, processes, records, runs
from distill.errors import UsageError
from distill.planning import size
from distill.processes import is_main
from distill.progress import duration, harmless, out, say
from distill.runs import RunFolder

if TYPE_CHECKING:
    from distill.fitting import Plan
    from distill.search import Best, Search
    from distill.sweep import Part

BENCH_ROWS = 256
"""Test documents on which latency, throughput and memory are measured."""


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _text(content: str) -> Text:
    """Show what a file says as it stands: no markup, no control characters."""
    return Text(harmless(content))


def finished(folders: list[RunFolder]) -> None:
    """Show the figures of runs that have just finished, once for all processes."""
    if not is_main():
        return
    table = _table(
        "run", "model", "role", "metric", "validation", "test", "time", right=("validation", "test", "time")
    )
    for folder in folders:
        run, found = folder.read(), folder.metrics()
        metric = found["task"]["metric"]
        table.add_row(
            run.name, _text(run.model), run.role, _text(metric), f"{found['validation'][metric]:.3f}", _test(found),
            duration(found["train"]["seconds"]),
        )  # fmt: skip
    out.print(table)


def pretrained(folder: RunFolder) -> None:
    """Show the figures of a pre-training run that has just finished, and how a student takes it."""
    finished([folder])
    where = os.path.relpath(folder.model)
    say(f"next: distill student --teacher RUN --set student.checkpoint={where}")


def _test(found: dict[str, Any]) -> str:
    """Write the metric's value on test; nothing where a run is not measured there, as pre-training is not."""
    return f"{found['test'][found['task']['metric']]:.3f}" if "test" in found else ""


def plan(found: Plan) -> None:
    """Show what a run would do and cost."""
    if not is_main():
        return
    table = _table(
        "split", "rows", "labels", "tokens 5/50/95/100 %", "truncated", right=("rows", "truncated")
    )
    for name, split in found.splits.items():
        labels = ", ".join(
            f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.3g}" for k, v in split["labels"].items()
        )
        tokens = " / ".join(f"{v:,}" for v in split["tokens"].values())
        table.add_row(
            name,
            f"{split['rows']:,}",
            _text(labels or "not read"),
            tokens,
            f"{split['truncated']:.1%}",
        )
    out.print(table)
    cost = found.cost
    out.print(
        f"{found.title}: {cost.parameters:,} parameters, {cost.steps:,} steps, {cost.tokens:,} tokens, {cost.flops:.2g} FLOPs, "
        f"about {size(cost.memory)} of memory and {size(cost.disk)} of disk",
        markup=False,
    )
    for note in found.notes:
        out.print(harmless(note), markup=False)


def sweep(parts: list[Part]) -> None:
    """Show what a sweep will train."""
    from distill.sweep import time_left

    if not is_main():
        return
    table = _table(
        "model", "role", "run", "runs", "finished", "steps", "params M", right=("runs", "finished", "steps", "params M")
    )  # fmt: skip
    count = done = steps = 0
    for part in parts:
        finished = len(part.finished)
        count, done = count + len(part.names), done + finished
        steps += part.steps * (len(part.names) - finished)
        size = [f"{part.steps:,}", f"{part.parameters / 1e6:.1f}"] if part.steps else ["", ""]
        table.add_row(_text(part.label), part.role, part.names[0], str(len(part.names)), str(finished), *size)
    out.print(table)
    out.print(
        f"{count} runs, {done} of them finished; {steps:,} steps to make; {time_left(parts)}", markup=False
    )


def search(asked: Search, parts: list[Part]) -> None:
    """Show what a search will train."""
    if not is_main():
        return
    alone = (
        f"{asked.trials if asked.axes_of('control') else 1} of its control" if asked.control else "no control"
    )
    most = max(part.steps for part in parts)
    out.print(
        f"{len(asked.students)} student{'s' * (len(asked.students) > 1)}, {asked.trials} trials each, {alone}, of at most "
        f"{most:,} steps; validation chooses, and the best has {asked.seeds} seed{'s' * (asked.seeds > 1)}",
        markup=False,
    )


def best(found: list[Best], metric: str) -> None:
    """Name the trials that a search chose, each with the figure that chose it."""
    for one in found if is_main() else []:
        out.print(
            f"{one.part.label} {one.part.role}: best of {one.trials} by validation: {metric} {one.value:.3f} "
            f"({one.part.names[0]})",
            markup=False,
        )


def runs_table() -> None:
    """List all runs."""
    table = _table("run", "role", "model", "recipe", "status", "test", "began", right=("test",))
    for folder in runs.every():
        run, found = folder.read(), folder.metrics()
        metric = found["task"]["metric"] if found else ""
        split = "test" if "test" in found else "validation"
        test = f"{metric} {found[split][metric]:.3f}" if split in found else ""
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created))
        table.add_row(run.name, run.role, _text(run.model), _text(run.recipe), run.status, _text(test), began)
    if table.row_count:
        out.print(table)
    else:
        out.print("no runs yet; distill teacher --recipe quickstart", markup=False)


def caches() -> None:
    """List the caches of logits."""
    table = _table("cache", "rows", "labels", "window", "precision", "state", right=("rows", "window"))
    for folder in logits.every():
        key = records.read(folder / "key.json", logits.Key)
        whole = (folder / "manifest.json").is_file()
        rows = f"{logits.manifest_of(folder)['rows']:,}" if whole else ""
        window = f"{key['reading']['max_length']:,} {key['reading']['view']}"
        table.add_row(
            folder.name, rows, _text(", ".join(key["labels"])[:40]), _text(window), _text(key["precision"]),
            "whole" if whole else "unfinished",
        )  # fmt: skip
    if table.row_count:
        out.print(table)
    else:
        out.print("no cached logits yet; distill cache --teacher RUN", markup=False)


def comparison(names: list[str], *, bench: bool, report: Path | None) -> None:
    """Compare runs, once for all processes: tables on the terminal, a report on disk."""
    if not is_main():
        return
    from distill import comparison as comparing
    from distill import report as reports

    if report is not None and report.exists() and not report.is_dir():
        raise UsageError(f"--report: {report} is a file; give a folder")
    folders = comparing.collect(names)
    rows = bench_rows(folders) if bench else None
    found = comparing.compare(folders, bench_rows=rows, progress=say)
    out.print(reports.table(found, out.width))
    if found.buckets:
        out.print(reports.bucket_table(found, out.width))
    for note in found.notes:
        out.print(harmless(note), markup=False)
    newest = max((folder.read() for folder in folders), key=lambda run: run.created)
    target = report or runs.runs_folder() / newest.group / "report"  # of the run that leads the group
    for path in reports.write(found, target):
        say(f"wrote {path}")


def bench_rows(folders: list[RunFolder]) -> list[tuple[str, str | None]]:
    """Draw the test documents on which speed is measured; the same for every model."""
    import numpy as np

    from distill import data, recipe

    rows = data.load(recipe.load(str(folders[0].recipe))).splits["test"]
    order = np.random.default_rng(0).permutation(len(rows))[:BENCH_ROWS]
    return rows.texts(order)


def demo(name: str, seeds: int) -> None:
    """Train a teacher and its students by a recipe, compare them, and say where everything is.

    Runs of an earlier demo are kept where they have finished, and gone on with where they have not.
    """
    from distill import recipe as recipes
    from distill import stages

    began = time.monotonic()
    found = recipes.load(name)
    lead, group = f"{name}-teacher", f"{name}-student"
    exists = processes.agree((runs.runs_folder() / lead / "run.json").is_file())
    if exists and runs.find(lead).recipe.read_text(encoding="utf-8") != found.dump():
        raise UsageError(f"{lead} was run by another version of the recipe; move {runs.find(lead).path} away")
    say(f"1/3 teacher: {lead}")
    if not exists or processes.agree(runs.find(lead).read().status) != "finished":
        finished([stages.train_teacher(found, name, None if exists else lead, lead if exists else None)])
    say(f"2/3 its logits, then {seeds} students, each beside its control: {group}")
    job = stages.StudentJob(
        [lead], found.dump(), name, found.student.architecture, group, seeds, control=True
    )
    stages.train_students(job)
    say("3/3 comparison; latency, throughput and memory are measured now")
    comparison([lead, group], bench=True, report=None)
    say(
        f"done in {duration(time.monotonic() - began)}; distill runs lists the runs, distill ui shows their curves"
    )


def ui(port: int) -> None:
    """Start MLflow on loopback, print the address, and wait."""
    from distill import tracking
    from distill import ui as pages

    for folder in runs.every():
        tracking.sync(folder, patient=True)
    newest = runs.every()
    experiment = newest[-1].read().experiment if newest else "distill"
    server, port = pages.start(port)
    out.print(pages.deep_link(port, experiment), markup=False, soft_wrap=True)
    if server is None:
        return
    say("Ctrl-C ends the server")
    try:
        server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()


def doctor() -> None:
    """Show what is well and what is not, and how to mend it."""
    from distill.doctor import checks

    found = checks()
    table = _table("", "check", "found")
    for check in found:
        table.add_row("ok" if check.ok else "!!", check.name, check.found)
    out.print(table)
    for check in found:
        if not check.ok:
            out.print(f"{check.name}: {check.fix}", markup=False)
