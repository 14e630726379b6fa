"""Every recipe that ships, run from teacher to comparison: its columns, labels and splits, on tiny models."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, sentence
from scipy.special import expit

from distill import catalog, stages, tracking, training
from distill import recipe as recipes
from distill.comparison import collect, compare
from distill.evaluation import Predictions
from distill.files import read_json
from distill.models import ABOUT
from distill.runs import find
from distill.schema import Recipe
from distill.stages import StudentJob
from distill.tasks import METRICS

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

TEACHER = {"checkpoint": None, "lengthen": False, "config": TINY, "max_length": 64}
STUDENTS: dict[str, dict[str, Any]] = {
    "bert_miniature": {"checkpoint": None, "config": TINY, "max_windows": 2},
    "teacher_layers": {"layers": [0, 1]},
}
TRAIN = {"max_steps": 2, "batch_size": 8, "tokens_per_batch": 1024, "precision": "fp32"}


def answers(recipe: Recipe, number: int) -> dict[str, Any]:
    """Write a row's labels as the recipe reads them."""
    column, names = recipe.data.label, recipe.task.labels or []
    if isinstance(column, list):
        return {name: number >> at & 1 for at, name in enumerate(column)}
    if recipe.task.kind == "regression":
        return {column: number % 11 / 2}
    if recipe.task.kind == "multi_label":
        numbers = {number % len(names), 3 * number % len(names)}
        return {column: (recipe.data.label_separator or ",").join(map(str, sorted(numbers)))}
    return {column: names[number % len(names)]}


def span(context: str, number: int) -> dict[str, Any]:
    """Write where a row's answer stands: its third word, or nowhere."""
    word = context.split()[2]
    return (
        {"text": [word], "answer_start": [context.index(f" {word} ") + 1]}
        if number % 4
        else {"text": [], "answer_start": []}
    )


def write_source(recipe: Recipe, split: str, folder: Path) -> Path:
    """Write a split of the source with the recipe's columns, five rows and more of each class."""
    data, rng = recipe.data, np.random.default_rng(len(split))
    where = {name: value[0] if isinstance(value, list) else value for name, value in data.where.items()}
    texts = [data.text, *([data.text_pair] if data.text_pair else [])]
    rows: list[dict[str, Any]] = []
    for number in range(max(60, 5 * len(recipe.task.labels or []))):
        written = {column: f"{sentence(rng, number % 2, 20)} {split} {number}" for column in texts}
        found = span(written[texts[1]], number) if recipe.task.kind == "span" else answers(recipe, number)
        rows.append(
            {**written, **where, **({str(data.label): found} if recipe.task.kind == "span" else found)}
        )
    if recipe.task.kind == "span":
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    tabs = data.format == "tsv"
    path = folder / f"{split}.{'tsv' if tabs else 'csv'}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if tabs else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def small(name: str, folder: Path, wordpiece: Path, bpe: Path) -> Recipe:
    """Load a shipped recipe, with generated rows in its source's place and everything made tiny."""
    whole = recipes.load(name)
    splits = {key: split for key, split in whole.data.splits if split is not None}
    sources = {one.source: str(write_source(whole, one.source, folder)) for one in splits.values()}
    room = {"max_length": 24} if whole.task.kind != "span" else {"max_length": 32, "overlap": 8}
    teacher: dict[str, Any] = {**TEACHER, "tokenizer": str(bpe if whole.teacher.architecture in ("roberta", "longformer") else wordpiece)}  # fmt: skip
    student = {**STUDENTS[whole.student.architecture], **room}
    if whole.task.kind == "span":
        teacher["overlap"] = 8
    if student.get("config"):
        student = {**student, "tokenizer": str(wordpiece)}
    changes: dict[str, Any] = {"data.source": sources, "cache.precision": "fp32"}
    changes |= {f"data.splits.{key}.rows": 12 for key, split in splits.items() if split.rows}
    changes |= {f"data.splits.{key}.fraction": 0.35 for key, split in splits.items() if split.fraction}
    for section, keys in (("teacher", teacher), ("student", student)):
        changes |= {f"{section}.{key}": value for key, value in keys.items()}
        changes |= {f"{section}.train.{key}": value for key, value in TRAIN.items()}
    return recipes.load(name, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


@pytest.mark.parametrize("name", sorted(catalog.recipes()))
def test_a_shipped_recipe_runs_to_its_comparison(
    name: str, runs: Path, tmp_path: Path, tokenizer_folder: Path, roberta_tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tracking, "sync", lambda folder: None)
    monkeypatch.setattr(training, "release_memory", lambda: None)  # it takes longer than all else here
    recipe = small(name, tmp_path, tokenizer_folder, roberta_tokenizer_folder)
    stages.train_teacher(recipe, name, "t")
    job = StudentJob(["t"], recipe.dump(), name, recipe.student.architecture, "s", seeds=1, control=True)
    stages.train_students(job)
    found = compare(collect(["s"]))
    baseline = {} if recipe.task.kind == "span" else {"baseline": ["s-tfidf"]}
    assert {row.role: row.runs for row in found.rows} == {
        "teacher": ["t"], **baseline, "distilled": ["s"], "control": ["s-control"]
    }  # fmt: skip
    assert found.metric == (recipe.task.metric or METRICS[recipe.task.kind][0])
    columns = recipe.data.label if isinstance(recipe.data.label, list) else [recipe.data.label]
    assert list(found.task.labels) == (
        ["start", "end"] if recipe.task.kind == "span" else recipe.task.labels or columns
    )
    for row in found.rows:
        assert {name for name in METRICS[recipe.task.kind] if name not in row.figures} == set()
        assert all(math.isfinite(figure.mean) for figure in row.figures.values())
        assert (f"other_{found.metric}" in row.figures) == (recipe.data.splits.test_other is not None)
        assert set(row.labels) == (set(found.task.labels) if recipe.task.kind == "multi_label" else set())
        fitted = recipe.task.thresholds == "fitted"
        assert ("macro_f1_fitted" in row.figures) == fitted
        for run in row.runs:
            assert ("thresholds" in read_json(find(run).model / ABOUT)["task"]) == fitted
    if recipe.task.kind == "multi_label":  # after two steps a head still says how often each label occurs
        told = Predictions.load(find("t").predictions)
        assert expit(told.logits).mean() == pytest.approx(told.labels.mean(), abs=0.1)
