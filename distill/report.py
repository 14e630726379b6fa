"""How a comparison is shown and written: tables, CSV, JSON, a chart. Computes nothing of its own."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import chart
from distill.comparison import Comparison, Figure, Row
from distill.files import write_text
from distill.progress import harmless
from distill.runs import RunFolder, runs_folder
from distill.tasks import LOWER_IS_BETTER, METRICS

if TYPE_CHECKING:
    from rich.table import Table


def _figure(figure: Figure | None, spread: bool = True) -> str:
    """Write ``0.845 ±.004``."""
    if figure is None:
        return ""
    half = f" ±{figure.half:.3f}".replace("±0.", "±.") if spread and figure.half is not None else ""
    return f"{figure.mean:.3f}{half}"


def _gap(row: Row) -> str:
    if row.gap_closed is None:
        return ""
    half = f" ±{100 * row.gap_closed.half:.0f}" if row.gap_closed.half is not None else ""
    return f"{100 * row.gap_closed.mean:.0f}%{half}"


def _short(value: float | None, scale: float = 1.0) -> str:
    """Write three significant digits: ``4.39``, ``43.9``, ``439``."""
    if value is None:
        return ""
    value /= scale
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _name(row: Row) -> Any:
    """A line's label in its role's style; as Text, so that no name is read as markup."""
    from rich.text import Text

    return Text(harmless(row.label), style={"teacher": "bold", "control": "dim"}.get(row.role, ""))


def table(comparison: Comparison, width: int = 120) -> Table:
    """Show the comparison in a terminal.

    Args:
        comparison: what to show.
        width: columns of the terminal; below 110 the less important columns are left to the CSV.
    """
    metric, wide = comparison.metric, width >= 110
    mark = "▼"  # a student below TF-IDF must be seen without reading the notes
    columns: list[tuple[str, bool, Callable[[Row], str]]] = [
        (metric, True, lambda row: _figure(row.quality) + (f" {mark}" if row.below else "")),
        *(
            (name, True, lambda row, name=name: _figure(row.figures.get(name)))
            for name in METRICS["span"]
            if comparison.task.kind == "span" and name != metric
        ),
        (f"other {metric}", True, lambda row: _figure(row.figures.get(f"other_{metric}"))),
        ("gap closed", True, _gap),
        ("agree", wide, lambda row: _figure(row.agreement, spread=False)),
        ("nll", wide, lambda row: _figure(row.nll, spread=False)),
        ("ece", wide, lambda row: _figure(row.ece, spread=False)),
        ("params M", True, lambda row: _short(row.parameters, 1e6)),
        ("MB", True, lambda row: _short(row.bytes, 1e6)),
        ("p50 ms", True, lambda row: _short(row.p50_ms)),
        ("p95 ms", wide, lambda row: _short(row.p95_ms)),
        ("docs/s", True, lambda row: _short(row.docs_per_second)),
        ("peak MB", wide, lambda row: _short(row.peak_bytes, 1e6)),
    ]
    used = [
        (head, cell) for head, fits, cell in columns if fits and any(cell(row) for row in comparison.rows)
    ]
    seeds = sorted({row.quality.n for row in comparison.rows} - {1})
    legend = [f"{comparison.test_rows:,} test documents"]
    over = " or ".join(map(str, seeds))
    legend += [f"± 95 % interval over {over} seeds, where there are several" if seeds else "one seed each"]
    legend += (
        ["gap closed: (distilled − control) / (teacher − control)"] if any(map(_gap, comparison.rows)) else []
    )
    legend += [f"{mark} a baseline is better"] if any(row.below for row in comparison.rows) else []
    result = _empty("; ".join(legend) + ".")
    for number, (head, _) in enumerate(used):
        result.add_column(
            "\n".join(head.split(" ")), justify="left" if number == 0 else "right", no_wrap=True
        )
    for row in comparison.rows:
        result.add_row(_name(row), *(cell(row) for _, cell in used))
    return result


def bucket_table(comparison: Comparison, width: int = 120) -> Table:
    """Show the metric by document length, in words; with intervals where there is room."""
    result = _empty(f"{comparison.metric} by words in the document.")
    names = comparison.buckets
    spread = 26 + 13 * len(names) <= width
    for name, size in names.items():
        result.add_column(f"{name}\nn={size:,}", no_wrap=True)
    for row in comparison.rows:
        result.add_row(_name(row), *(_figure(row.buckets.get(name), spread) for name in names))
    return result


def _empty(caption: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(
        caption=Text(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    result.add_column("model", overflow="fold")
    return result


def _flat(row: Row, comparison: Comparison) -> dict[str, Any]:
    """One line of the CSV: every figure, its interval beside it."""
    result: dict[str, Any] = {"metric": comparison.metric}
    for name, value in vars(row).items():
        if name == "buckets":
            for bucket in comparison.buckets:
                figure = value.get(bucket)
                result[f"words {bucket}"] = figure.mean if figure else None
                result[f"words {bucket} half"] = figure.half if figure else None
        elif name == "figures":
            result |= {f"test {figure}": found.mean for figure, found in value.items()}
        elif name == "labels":
            continue  # the JSON has them
        elif name in ("quality", "nll", "ece", "agreement", "margin", "gap_closed"):
            result[name], result[f"{name}_half"] = (value.mean, value.half) if value else (None, None)
        else:
            result[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return result


def _harmless(value: Any) -> Any:
    """Keep a spreadsheet from running a name as a formula."""
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


def _finite(value: Any) -> Any:
    """Turn NaN and infinity, which JSON does not have, into null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``comparison.csv``, ``comparison.json`` and ``pareto.png``, each complete or not at all.

    The labels that a distilled student's teacher does not believe are put beside them.

    Args:
        comparison: what to write.
        folder: where to; made if need be.

    Returns:
        All paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("comparison.csv", "comparison.json")]
    lines = [_flat(row, comparison) for row in comparison.rows]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in line.items()} for line in lines)
    write_text(paths[0], text.getvalue())
    write_text(
        paths[1],
        json.dumps(_finite(asdict(comparison)), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )
    for row in comparison.rows:
        listed = RunFolder(runs_folder() / row.runs[0]).suspects  # of the teacher: the same for every seed
        if listed.is_file():
            paths.append(folder / f"suspects-{row.runs[0]}.json")
            write_text(paths[-1], listed.read_text(encoding="utf-8"))
    timed = any(row.p50_ms is not None for row in comparison.rows)
    costs = [(row, row.p50_ms if timed else row.parameters) for row in comparison.rows]
    points = [
        chart.Point(harmless(row.label), row.role, float(cost), row.quality.mean, row.quality.half, row.bytes)
        for row, cost in costs
        if cost and math.isfinite(row.quality.mean)
    ]
    if not points:
        return paths
    chart.draw(
        points,
        folder / "pareto.png",
        title=f"{harmless(comparison.experiment)}: {comparison.metric} over {'latency' if timed else 'size'}",
        cost_label="Latency of one document alone, median (ms, log scale)"
        if timed
        else "Parameters (log scale)",
        quality_label=f"{comparison.metric} on {comparison.test_rows:,} test documents",
        lower_is_better=comparison.metric in LOWER_IS_BETTER,
    )
    return [*paths, folder / "pareto.png"]
