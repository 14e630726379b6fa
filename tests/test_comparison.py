from __future__ import annotations

import csv
import io
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from scipy import stats

from distill import chart, runs
from distill.benchmark import Cost
from distill.comparison import (
    Comparison,
    Figure,
    Row,
    collect,
    compare,
    interval,
)
from distill.errors import DataError, UsageError
from distill.evaluation import Predictions, agreement, measure
from distill.report import bucket_table, table, write
from distill.runs import Run, RunFolder
from distill.tasks import Kind

N = 400
LABELS = np.random.default_rng(1).integers(0, 2, N)
ROW_IDS = np.random.default_rng(2).permutation(N).astype(np.int64) + 10_000
WORDS = np.random.default_rng(3).integers(20, 900, N).astype(np.int32)

Make = Callable[..., RunFolder]


def logits_with(right: int, seed: int, kind: Kind = "single_label") -> np.ndarray[Any, Any]:
    """Random logits of which exactly ``right`` rows are classified correctly."""
    generator = np.random.default_rng(seed)
    if kind == "regression":
        return (LABELS[:, None] + generator.normal(scale=1 - right / N, size=(N, 1))).astype(np.float32)
    size = generator.uniform(0.1, 3, N)
    correct = generator.permutation(N) < right
    sign = np.where(correct, 1, -1) * (2 * LABELS - 1)
    return np.stack([-sign * size, sign * size], axis=1).astype(np.float32)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make a finished run from how many of the 400 test rows it gets right."""
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    clock = iter(range(1, 1000))

    def make(
        name: str,
        role: Any,
        right: int,
        *,
        seed: int = 0,
        model: str = "bert_tiny",
        group: str = "study",
        teachers: Sequence[str] = (),
        data: str = "imdb",
        experiment: str = "films",
        shuffled: bool = False,
        status: Any = "finished",
        metric: str = "accuracy",
        kind: Kind = "single_label",
        labels: Sequence[str] = ("bad", "good"),
        noise: int | None = None,
    ) -> RunFolder:
        now = float(next(clock))
        folder = runs.create(
            Run(
                name,
                role,
                group,
                "r",
                experiment,
                model,
                seed,
                now,
                teachers=list(teachers),
                facts={"data": data},
            ),
            "recipe: text\n",
        )
        order = np.random.default_rng(9).permutation(N) if shuffled else np.arange(N)
        logits = logits_with(right, len(name) + seed if noise is None else noise, kind)
        truth = LABELS if kind == "single_label" else LABELS.astype(np.float32)
        found = Predictions(ROW_IDS[order], logits[order], truth[order], WORDS[order])
        found.save(folder.predictions)
        folder.write_metrics(
            {
                "test": measure(kind, metric, found, [100, 400]),
                "validation": {metric: 0.5},
                "model": {"parameters": 4_400_000, "bytes": 17_600_000},
                "task": {"kind": kind, "labels": list(labels), "metric": metric},
                "train": {"seconds": 1.0, "steps": 10},
            }
        )
        folder.model.mkdir()
        folder.update(status=status, finished=now if status == "finished" else None)
        return folder

    return make


TEACHER, DISTILLED, CONTROL, TFIDF = 352, (340, 336, 341), (332, 330, 327), 337


@pytest.fixture
def study(make: Make) -> Make:
    make("t1", "teacher", TEACHER, model="bigbird", group="t1")
    for seed, (d, c) in enumerate(zip(DISTILLED, CONTROL, strict=True)):
        make(f"s-{seed}", "distilled", d, seed=seed, teachers=["t1"])
        make(f"s-control-{seed}", "control", c, seed=seed)
    make("s-tfidf", "baseline", TFIDF, model="tfidf")
    return make


def test_every_figure_of_both_test_splits_and_of_each_label_is_taken_over_seeds(
    make: Make, tmp_path: Path
) -> None:
    folders = [make("a", "teacher", 300, model="m", group="g"), make("b", "teacher", 320, model="m", group="g", seed=1)]  # fmt: skip
    for folder, other, f1 in zip(folders, (0.5, 0.7), (0.2, 0.4), strict=True):
        metrics = folder.metrics()
        metrics["test"]["labels"] = {"bad": {"rows": 3, "f1": f1}, "good": {"rows": 4, "f1": 1.0}}
        metrics["test_other"] = {"rows": 9, "accuracy": other, "buckets": []}
        folder.write_metrics(metrics)
    (row,) = (found := compare(folders)).rows
    assert row.figures["f1"].mean == pytest.approx(np.mean([f.metrics()["test"]["f1"] for f in folders]))
    assert row.figures["other_accuracy"] == interval([0.5, 0.7])
    assert row.labels["bad"] == {"f1": interval([0.2, 0.4])}
    assert "other accuracy" in " ".join(str(column.header) for column in table(found).columns).replace(
        "\n", " "
    )
    paths = write(found, tmp_path)
    (line,) = csv.DictReader(io.StringIO(paths[0].read_text()))
    assert float(line["test other_accuracy"]) == pytest.approx(0.6)
    (told,) = json.loads(paths[1].read_text())["rows"]
    assert told["labels"]["bad"]["f1"]["mean"] == pytest.approx(0.3)


def by_label(comparison: Comparison) -> dict[str, Row]:
    return {row.label: row for row in comparison.rows}


def of_one_seed(figure: Figure | None) -> float:
    assert figure is not None
    assert (figure.half, figure.n) == (None, 1)
    return figure.mean


def shown(what: Table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), color_system=None)
    console.print(what)
    return console.export_text()


def test_gap_and_margin_are_paired_by_seed_and_follow_the_formula(study: Make) -> None:
    comparison = compare(collect(["study"]))
    row = by_label(comparison)["bert_tiny distilled"]
    d, c, t = np.array(DISTILLED) / N, np.array(CONTROL) / N, TEACHER / N
    gaps, margins = (d - c) / (t - c), d - c
    factor = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert row.gap_closed is not None
    assert row.margin is not None
    assert row.gap_closed.mean == pytest.approx(gaps.mean())
    assert row.gap_closed.half == pytest.approx(factor * gaps.std(ddof=1))
    assert row.margin.mean == pytest.approx(margins.mean())
    assert row.margin.half == pytest.approx(factor * margins.std(ddof=1))
    assert row.quality.mean == pytest.approx(d.mean())
    assert row.quality.half == pytest.approx(factor * d.std(ddof=1))
    assert (row.seeds, row.quality.n) == ([0, 1, 2], 3)


def test_pairs_are_found_by_seed_whatever_the_order_and_a_seed_without_control_is_named(make: Make) -> None:
    make("t1", "teacher", 360, model="bigbird", group="t1")
    for seed, right in ((2, 350), (0, 340), (7, 300)):
        make(f"s-{seed}", "distilled", right, seed=seed, teachers=["t1"])
    for seed, right in ((0, 330), (2, 320)):
        make(f"c-{seed}", "control", right, seed=seed)
    comparison = compare(collect(["study"]))
    row = by_label(comparison)["bert_tiny distilled"]
    wanted = interval([10 / N, 30 / N])
    assert row.margin is not None
    assert wanted is not None
    assert row.margin.mean == pytest.approx(wanted.mean)
    assert row.margin.half == pytest.approx(wanted.half)
    assert row.gap_closed is not None
    assert row.gap_closed.mean == pytest.approx((10 / 30 + 30 / 40) / 2)
    assert "bert_tiny distilled: no control for seed 7, so not in its margin." in comparison.notes


@pytest.mark.parametrize("values", [[0.8, 0.9], [0.81, 0.84, 0.79, 0.9, 0.88]])
def test_interval_is_students(values: list[float]) -> None:
    figure = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert figure is not None
    assert figure.half is not None
    assert figure.mean - figure.half == pytest.approx(low)
    assert figure.mean + figure.half == pytest.approx(high)


def test_one_seed_has_no_interval_and_no_value_no_figure() -> None:
    assert interval([0.8]) == Figure(0.8, None, 1)
    assert interval([None, None]) is None
    assert interval([]) is None


def test_agreement_is_joined_by_row_id(make: Make) -> None:
    make("t1", "teacher", 352, model="bigbird", group="t1")
    make("a", "distilled", 340, teachers=["t1"], group="a", noise=5)
    make("b", "distilled", 340, teachers=["t1"], group="b", noise=5, shuffled=True)
    rows = by_label(compare(collect(["a", "b"])))
    wanted = agreement("single_label", logits_with(340, 5), logits_with(352, 2))
    assert rows["bert_tiny distilled (a)"].agreement == Figure(wanted, None, 1)
    assert rows["bert_tiny distilled (b)"].agreement == Figure(wanted, None, 1)
    assert wanted < 1
    assert rows["teacher bigbird"].agreement is None


def test_controls_and_baselines_are_compared_with_the_same_teacher(study: Make) -> None:
    rows = by_label(compare(collect(["study"])))
    wanted = agreement("single_label", logits_with(TFIDF, 7), logits_with(TEACHER, 2))
    assert rows["tfidf"].agreement == Figure(wanted, None, 1)
    assert rows["bert_tiny control"].agreement is not None


def test_no_gap_is_printed_when_the_teacher_loses(make: Make) -> None:
    make("t1", "teacher", 320, model="bigbird", group="t1")
    make("s", "distilled", 340, teachers=["t1"])
    make("c", "control", 330)
    comparison = compare(collect(["s"]))
    row = by_label(comparison)["bert_tiny distilled"]
    assert row.gap_closed is None
    assert of_one_seed(row.margin) == pytest.approx(10 / N)
    assert any("no better than the control, so there is no gap to close" in note for note in comparison.notes)
    assert "bert_tiny distilled (0.850) is better than teacher bigbird (0.800)." in comparison.notes
    assert "gap" not in shown(table(comparison), 120)


def test_lower_is_better_turns_signs(make: Make) -> None:
    common: dict[str, Any] = {"kind": "regression", "metric": "mse", "labels": ["stars"], "noise": 3}
    make("t1", "teacher", 350, model="bigbird", group="t1", **common)
    make("s", "distilled", 340, teachers=["t1"], **common)
    make("c", "control", 320, **common)
    make("b", "baseline", 330, model="tfidf", **common)
    comparison = compare(collect(["study"]))
    rows = by_label(comparison)
    t, d, c = (rows[n].quality.mean for n in ("teacher bigbird", "bert_tiny distilled", "bert_tiny control"))
    assert t < d < c
    assert of_one_seed(rows["bert_tiny distilled"].margin) == pytest.approx(c - d)
    assert of_one_seed(rows["bert_tiny distilled"].gap_closed) == pytest.approx((c - d) / (c - t))
    assert rows["bert_tiny control"].below == "tfidf"
    assert rows["bert_tiny distilled"].below is None
    assert rows["bert_tiny distilled"].ece is None


def test_a_student_that_loses_to_tfidf_is_told_so(study: Make) -> None:
    study("best", "baseline", 346, model="tfidf_large")
    comparison = compare(collect(["study"]))
    rows = by_label(comparison)
    assert rows["bert_tiny distilled"].below == "tfidf_large"
    assert rows["bert_tiny control"].below == "tfidf_large"
    assert rows["teacher bigbird"].below is None
    assert "tfidf_large (0.865) is better than bert_tiny distilled (0.848)." in comparison.notes
    text = shown(table(comparison), 120)
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert "▼" in lines["bert_tiny distilled"]
    assert "▼" in lines["bert_tiny control"]
    assert "▼" not in lines["teacher bigbird"]
    assert "▼ a baseline is better" in " ".join(text.split())


def test_a_student_that_beats_tfidf_is_not_marked(study: Make) -> None:
    comparison = compare(collect(["study"]))
    assert by_label(comparison)["bert_tiny distilled"].below is None
    assert not any("better than bert_tiny distilled" in note for note in comparison.notes)


@pytest.mark.parametrize(
    ("distilled", "note"),
    [
        ((340, 339, 341), "bert_tiny distilled beats its control by 0.025 ± 0.006 over 3 seeds."),
        ((320, 319, 321), "bert_tiny distilled is worse than its control by 0.025 ± 0.006 over 3 seeds."),
        (
            (340, 330, 323),
            "bert_tiny distilled and its control differ by +0.003 ± 0.053 over 3 seeds: "
            "within the spread, so no difference is shown.",
        ),
    ],
)
def test_the_verdict_says_what_the_figures_show(make: Make, distilled: tuple[int, ...], note: str) -> None:
    for seed, right in enumerate(distilled):
        make(f"s-{seed}", "distilled", right, seed=seed, teachers=["hub/elsewhere"])
        make(f"c-{seed}", "control", 330, seed=seed)
    notes = compare(collect(["study"])).notes
    assert note in notes
    assert any("its teacher (hub/elsewhere) has no run of this data here" in n for n in notes)


def test_one_seed_is_not_called_a_win(make: Make) -> None:
    make("s", "distilled", 350)
    make("c", "control", 330)
    note = "is 0.050 better than its control with one seed: how far seeds differ is not known."
    assert f"bert_tiny distilled {note}" in compare(collect(["s"])).notes


def test_no_control_is_noted(make: Make) -> None:
    make("s", "distilled", 350)
    comparison = compare(collect(["s"]))
    assert comparison.rows[0].margin is None
    assert any("has no control of the same seed" in note for note in comparison.notes)


def test_different_data_or_tasks_are_refused(make: Make) -> None:
    make("a", "distilled", 350)
    make("b", "distilled", 350, data="toxic", group="other")
    make("c", "distilled", 350, labels=("no", "yes"), group="third")
    with pytest.raises(UsageError, match="a and b are of different data"):
        compare(collect(["a", "b"]))
    with pytest.raises(UsageError, match="a and c are of different tasks"):
        compare(collect(["a", "c"]))


def test_other_test_rows_are_refused_even_under_one_fingerprint(make: Make) -> None:
    make("a", "distilled", 350)
    other = make("b", "control", 350)
    found = Predictions.load(other.predictions)
    Predictions(found.row_id + 1, found.logits, found.labels, found.words).save(other.predictions)
    with pytest.raises(UsageError, match="a and b are of different data"):
        compare(collect(["a", "b"]))


def test_unknown_names_are_refused_with_the_nearest(study: Make) -> None:
    with pytest.raises(UsageError, match="no run or group called 'stud'; did you mean 'study'"):
        collect(["stud"])


def test_a_run_brings_its_teacher_control_and_baselines(study: Make) -> None:
    assert [f.name for f in collect(["s-1"])] == ["s-1", "t1", "s-control-1", "s-tfidf"]
    assert [f.name for f in collect(["t1"])] == ["t1"]


def test_a_teacher_of_other_data_stays_out(make: Make) -> None:
    make("t1", "teacher", 352, model="bigbird", group="t1", data="more")
    make("s", "distilled", 340, teachers=["t1"])
    make("c", "control", 330)
    comparison = compare(collect(["s"]))
    assert [row.role for row in comparison.rows] == ["distilled", "control"]
    assert any("its teacher (t1) has no run of this data here" in note for note in comparison.notes)


def test_without_names_it_is_the_newest_runs_experiment_and_data(study: Make) -> None:
    study("old", "distilled", 340, data="other data", group="g")
    study("else", "distilled", 340, experiment="other", group="h")
    study("new", "distilled", 340, model="fnet", group="i")
    assert {f.name for f in collect()} == {*(f.name for f in collect(["study"])), "new"}


def test_no_runs_at_all(make: Make) -> None:
    with pytest.raises(UsageError, match="no finished run in runs/"):
        collect()


def test_unfinished_runs_are_left_out_and_named(study: Make) -> None:
    study("s-3", "distilled", 300, seed=3, teachers=["t1"], status="interrupted")
    comparison = compare(collect(["study"]))
    assert by_label(comparison)["bert_tiny distilled"].seeds == [0, 1, 2]
    assert "s-3 (bert_tiny distilled, seed 3) was interrupted: left out." in comparison.notes
    with pytest.raises(UsageError, match="nothing to compare: s-3"):
        compare([runs.find("s-3")])


def test_damaged_predictions_are_named(study: Make) -> None:
    runs.find("s-1").predictions.write_bytes(b"torn")
    with pytest.raises(DataError, match=r"s-1/predictions.safetensors: damaged"):
        compare(collect(["study"]))


def test_lines_stand_in_order_and_the_same_baseline_once(study: Make) -> None:
    study("w", "distilled", 345, model="fnet", group="second", teachers=["t1"])
    study("wc", "control", 344, model="fnet", group="second")
    study("w-tfidf", "baseline", TFIDF, model="tfidf", group="second")
    labels = [row.label for row in compare(collect()).rows]
    students = ["fnet distilled", "fnet control", "bert_tiny distilled", "bert_tiny control"]
    assert labels == ["teacher bigbird", "tfidf", *students]


def fake_bench(
    folders: Mapping[str, Path], rows: Sequence[Any], rounds: int, progress: Any = None
) -> dict[str, Cost]:
    assert all(folder.name == "model" and folder.is_dir() for folder in folders.values())
    big = {"teacher bigbird": Cost(480.4, 1022.3, 2.9, 1_420_000_000, 127_000_000, 512_000_000)}
    small = {name: Cost(12.3, 18.4, 141.5, 61_000_000, 4_400_000, 17_600_000) for name in folders}
    return small | big


@pytest.fixture
def benched(study: Make) -> Comparison:
    return compare(collect(["study"]), [("text", None)], bench=fake_bench)


def test_costs_are_those_of_the_line(benched: Comparison) -> None:
    rows = by_label(benched)
    assert rows["teacher bigbird"].p95_ms == 1022.3
    assert rows["bert_tiny control"].docs_per_second == 141.5
    assert rows["teacher bigbird"].bytes == 512_000_000


def test_a_missing_model_folder_is_noted(study: Make) -> None:
    runs.find("t1").model.rmdir()
    comparison = compare(collect(["study"]), [("text", None)], bench=lambda f, r, n, progress: {})
    assert "teacher bigbird: no model folder, so its cost is not measured." in comparison.notes


@pytest.mark.parametrize("width", [80, 110, 120])
def test_tables_fit_the_terminal(benched: Comparison, width: int) -> None:
    for what in (table(benched, width), bucket_table(benched, width)):
        lines = shown(what, width).splitlines()
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines)
        assert sum(line.startswith("bert_tiny distilled ") for line in lines) == 1
    text = shown(table(benched, width), width)
    assert "0.848 ±.016" in text
    assert ("1,022" in text) == (width >= 110)


def test_buckets_are_those_of_the_runs_by_length(benched: Comparison) -> None:
    assert list(benched.buckets) == ["0-99", "100-399", "400+"]
    assert sum(benched.buckets.values()) == N
    row = by_label(benched)["tfidf"]
    short = (WORDS < 100) & (logits_with(TFIDF, 7).argmax(1) == LABELS)
    assert row.buckets["0-99"].mean == pytest.approx(short.sum() / (WORDS < 100).sum())


def test_csv_and_json_hold_the_rows(benched: Comparison, tmp_path: Path) -> None:
    paths = write(benched, tmp_path / "report")
    assert [p.name for p in paths] == ["comparison.csv", "comparison.json", "pareto.png"]
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == sorted(p.name for p in paths)
    with paths[0].open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, benched.rows, strict=True):
        assert line["label"] == row.label
        assert line["runs"].split() == row.runs
        assert line["metric"] == "accuracy"
        for name in ("quality", "nll", "ece", "agreement", "margin", "gap_closed"):
            figure = getattr(row, name)
            assert line[name] == ("" if figure is None else str(figure.mean))
            assert line[f"{name}_half"] == ("" if figure is None or figure.half is None else str(figure.half))
        for name in ("parameters", "bytes", "p50_ms", "p95_ms", "docs_per_second", "peak_bytes"):
            assert float(line[name]) == getattr(row, name)
        assert float(line["words 100-399"]) == row.buckets["100-399"].mean

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(paths[1].read_text(), parse_constant=refuse)
    assert read["rows"] == [asdict(row) for row in benched.rows]
    assert read["task"] == {"kind": "single_label", "labels": ["bad", "good"], "metric": "accuracy"}
    assert read["notes"] == benched.notes


def test_nan_is_null_and_formulas_are_text(benched: Comparison, tmp_path: Path) -> None:
    benched.rows[0].nll = Figure(math.nan, math.inf, 2)
    benched.rows[0].label = "=HYPERLINK(1)"
    benched.rows[0].group = "-1+2"
    paths = write(benched, tmp_path)
    assert json.loads(paths[1].read_text())["rows"][0]["nll"] == {"mean": None, "half": None, "n": 2}
    with paths[0].open(newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["label"], first["group"]) == ("'=HYPERLINK(1)", "'-1+2")


def test_a_fitted_temperature_is_noted_and_written_and_suspects_are_copied(
    study: Make, tmp_path: Path
) -> None:
    fitted = {
        "temperature": 1.8349, "rows": 200, "nll_before": 0.5, "nll_after": 0.41, "ece_before": 0.1, "ece_after": 0.02,
    }  # fmt: skip
    for seed in range(3):
        folder = runs.find(f"s-{seed}")
        folder.write_metrics(folder.metrics() | {"calibration": fitted})
        folder.suspects.write_text(json.dumps({"doubted": seed}))
    comparison = compare(collect(["study"]))
    assert (
        "bert_tiny distilled: its teacher's logits were divided by T = 1.83, fitted on 200 validation rows: "
        "NLL 0.500 → 0.410, ECE 0.100 → 0.020."
    ) in comparison.notes
    paths = {path.name: path for path in write(comparison, tmp_path / "report")}
    written = json.loads(paths["comparison.json"].read_text())
    assert {row["label"]: row["teacher_temperature"] for row in written["rows"]} == {
        "teacher bigbird": None, "tfidf": None, "bert_tiny distilled": 1.8349, "bert_tiny control": None,
    }  # fmt: skip
    assert written["notes"] == comparison.notes
    assert json.loads(paths["suspects-s-0.json"].read_text()) == {"doubted": 0}
    assert list(paths) == ["comparison.csv", "comparison.json", "suspects-s-0.json", "pareto.png"]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_the_chart_is_a_picture_of_the_asked_size(benched: Comparison, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = write(benched, tmp_path)[2]
    assert png_size(path) == (chart.WIDTH, chart.HEIGHT) == (1600, 1000)
    assert np.ptp(imread(path)[:, :, :3]) > 0.5, "not an empty page"


def test_without_latencies_the_chart_is_over_parameters(
    study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(chart, "draw", lambda points, path, **words: drawn.update(words, points=points))
    write(compare(collect(["study"])), tmp_path)
    assert "Parameters" in drawn["cost_label"]
    assert {p.cost for p in drawn["points"]} == {4_400_000.0}


def test_the_pareto_front_keeps_what_nothing_beats() -> None:
    def points(*pairs: tuple[float, float]) -> list[chart.Point]:
        return [chart.Point("x", "control", cost, quality, None, 1) for cost, quality in pairs]

    many = points((3, 0.9), (1, 0.5), (2, 0.4), (2.5, 0.7), (2.5, 0.6), (4, 0.9))
    assert [(p.cost, p.quality) for p in chart.front(many)] == [(1, 0.5), (2.5, 0.7), (3, 0.9)]
    assert [p.quality for p in chart.front(many, lower_is_better=True)] == [0.5, 0.4]


def test_one_point_and_equal_points_can_be_drawn(tmp_path: Path) -> None:
    point = chart.Point("a", "teacher", 5.0, 0.5, 0.0, None)
    for points in ([point], [point] * 9):
        chart.draw(
            points, tmp_path / "p.png", title="t", cost_label="x", quality_label="y", lower_is_better=True
        )
        assert png_size(tmp_path / "p.png") == (1600, 1000)
