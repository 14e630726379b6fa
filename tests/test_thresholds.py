"""Thresholds of a multi-label task: fitted on validation, kept with the model, used by predict; weights of classes."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import documents, write_csv
from scipy import special
from sklearn import metrics

from distill import class_weights, data, fitting, models, prediction, recipe, runs, thresholds
from distill.data import Corpus
from distill.errors import DataError
from distill.files import read_json
from distill.runs import RunFolder
from distill.schema import Recipe
from distill.tasks import TaskSpec

tfidf = importlib.import_module("distill.students.tfidf")
RNG = np.random.default_rng(0)


def f1(labels: Any, p: Any, threshold: float) -> float:
    return float(metrics.f1_score(labels, p > threshold, zero_division=0.0))


def one(p: list[float], labels: list[int]) -> float:
    (found,) = thresholds.fit(special.logit(np.array(p))[:, None], np.array(labels)[:, None])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_gives_a_label_a_better_f1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random((60, 3)) < [0.5, 0.1, 0.9]).astype(np.float32)
    logits = np.round(rng.normal(size=(60, 3)) + labels, 1) - 1  # rounded: some are equal
    p, found = special.expit(logits), thresholds.fit(logits, labels)
    for at, threshold in enumerate(found):
        every = [0.0, 0.5, *np.unique(p[:, at]), *(np.unique(p[:, at]) - 1e-9)]
        assert f1(labels[:, at], p[:, at], threshold) == max(f1(labels[:, at], p[:, at], t) for t in every)


def test_one_half_stays_where_nothing_is_better() -> None:
    assert one([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]) == 0.5
    assert one([0.9, 0.8, 0.2, 0.1], [0, 0, 0, 0]) == 0.5, "a label that never occurs"
    assert one([0.9, 0.8, 0.6, 0.1], [1, 1, 0, 0]) == pytest.approx(0.7)
    assert one([0.4, 0.3, 0.1], [1, 1, 0]) == pytest.approx(0.2)
    # Of two that are equally good (one hit of one, two of three) the one nearer to one half.
    assert one([0.5, 0.4, 0.2, 0.1], [1, 0, 0, 1]) == pytest.approx(0.45)


def test_saturated_probabilities_have_a_threshold_that_can_be_passed() -> None:
    logits, labels = np.array([[900.0], [800.0], [-800.0], [-900.0]]), np.array([[1], [1], [1], [0]])
    (found,) = thresholds.fit(logits, labels)
    assert found == 0.5
    assert thresholds.given(logits, [found]).ravel().tolist() == [1, 1, 0, 0]
    assert thresholds.fit(np.full((2, 1), -900.0), np.array([[1], [0]])) == [0.5]


def test_figures_by_label_are_scikit_learns_and_leave_out_what_cannot_be_ranked() -> None:
    logits, labels = RNG.normal(size=(50, 3)), RNG.integers(0, 2, (50, 3))
    labels[:, 2] = 0
    found = thresholds.by_label(("a", "b", "c"), logits, labels, [0.3, 0.6, 0.5])
    for at, name in enumerate("ab"):
        p, truth = special.expit(logits[:, at]), labels[:, at]
        assert found[name] == pytest.approx(
            {
                "rows": truth.sum(),
                "f1": f1(truth, p, 0.5),
                "f1_fitted": f1(truth, p, (0.3, 0.6)[at]),
                "threshold": (0.3, 0.6)[at],
                "roc_auc": metrics.roc_auc_score(truth, p),
                "average_precision": metrics.average_precision_score(truth, p),
            }
        )
    assert found["c"] == {"rows": 0, "f1": 0.0, "f1_fitted": 0.0, "threshold": 0.5}
    assert set(thresholds.by_label(("a", "b", "c"), logits, labels, None)["a"]) == {
        "rows", "f1", "roc_auc", "average_precision"
    }  # fmt: skip


# In a run


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, Corpus]:
    """A multi-label recipe over 160 documents, of which every eighth has the rare label."""
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    rows = [(text, label, int(n % 8 == 0)) for n, (text, label) in enumerate(documents(160))]
    source = write_csv(tmp_path / "rows.csv", rows, ("text", "good", "rare"))
    raw = {
        "description": "x",
        "task": {"kind": "multi_label", "thresholds": "fitted"},
        "data": {
            "source": str(source),
            "label": ["good", "rare"],
            "splits": {"validation": {"rows": 40}, "test": {"from": "train", "rows": 40}},
        },
        "teacher": {"architecture": "bert"},
        "student": {"architecture": "tfidf"},
    }
    found = recipe.build(raw, "r.yaml")
    return found, data.load(found)


def recorded(name: str, setting: tuple[Recipe, Corpus], shift: float = 0.0) -> RunFolder:
    """Record a run whose logits are made up: ``shift`` moves those of the test split."""
    found, corpus = setting
    run = runs.Run(
        name=name, role="baseline", group=name, recipe="r", experiment="e", model="tfidf", seed=0,
        created=time.time(), status="finished",
    )  # fmt: skip
    folder, train, rng = runs.create(run, ""), corpus.splits["train"], np.random.default_rng(0)
    assert train.labels is not None
    config = tfidf.Config(architecture="tfidf")
    tfidf.fit(config, corpus.task, train.texts(), train.labels).save(folder.model)
    logits: dict[Any, Any] = {}
    for split, move in (("validation", 0.0), ("test", shift)):
        labels = corpus.splits[split].labels  # type: ignore[index]
        assert labels is not None
        logits[split] = (rng.normal(size=labels.shape) + 2 * labels - 3 + move).astype(np.float32)
    fitting.record(folder, found, corpus, logits, 1, {"seconds": 1.0, "steps": 1})
    return folder


def test_thresholds_are_fitted_on_validation_and_measured_on_test(setting: tuple[Recipe, Corpus]) -> None:
    folder, moved = recorded("a", setting), recorded("b", setting, shift=2.0)
    kept = read_json(folder.model / models.ABOUT)["task"]["thresholds"]
    assert list(kept) == ["good", "rare"]
    assert kept == read_json(moved.model / models.ABOUT)["task"]["thresholds"], "test has no say in them"
    test = folder.metrics()["test"]
    assert {n: found["threshold"] for n, found in test["labels"].items()} == kept
    assert test["macro_f1_fitted"] == pytest.approx(
        np.mean([v["f1_fitted"] for v in test["labels"].values()])
    )
    assert test["macro_f1"] == pytest.approx(np.mean([v["f1"] for v in test["labels"].values()]))
    assert test["macro_f1_fitted"] > test["macro_f1"]
    assert test["macro_f1_fitted"] != moved.metrics()["test"]["macro_f1_fitted"]
    assert "macro_f1_fitted" not in folder.metrics()["validation"], "they were fitted to these rows"


def test_predict_gives_the_labels_above_the_fitted_thresholds(
    setting: tuple[Recipe, Corpus], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = recorded("a", setting), tmp_path / "lines.txt"
    file.write_text("\n".join(text for text, _ in documents(40, seed=4)))
    kept = read_json(folder.model / models.ABOUT)["task"]["thresholds"]
    prediction.predict(folder, file, "text", None, None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    chosen = [[n for n, p in line["probabilities"].items() if p > kept[n]] for line in lines]
    assert [line["labels"] for line in lines] == chosen
    assert chosen != [[n for n, p in line["probabilities"].items() if p > 0.5] for line in lines]


# Weights of classes


def test_balanced_weights_give_every_class_the_same_weight_altogether() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [3])
    found = class_weights.compute("balanced", TaskSpec("single_label", tuple("abcd"), "f1"), labels)
    assert found is not None
    sums = [found[number] * (labels == number).sum() for number in (0, 1, 3)]
    assert sums == pytest.approx([10 / 3] * 3)
    assert found[2] == 1, "a class without rows"


def test_balanced_weights_of_many_labels_make_up_for_their_negative_rows() -> None:
    labels = np.array([[1, 0, 1, 0]] * 2 + [[0, 0, 1, 1]] * 6, dtype=np.float32)
    found = class_weights.compute("balanced", TaskSpec("multi_label", tuple("abcd"), "nll"), labels)
    assert found == pytest.approx((3, 1, 1, 1 / 3))


def test_weights_by_label_stand_in_the_order_of_the_logits() -> None:
    task = TaskSpec("single_label", ("a", "b", "c"), "f1")
    assert class_weights.compute({"c": 3.0, "a": 2}, task, np.zeros(3, int)) == (2.0, 1.0, 3.0)
    assert class_weights.compute("none", task, np.zeros(3, int)) is None
    with pytest.raises(DataError, match=r"task\.class_weights: no label 'toxc'; did you mean 'toxic'\?"):
        class_weights.check({"toxc": 2.0}, ["toxic", "mild"])
