"""Labels that the teacher does not believe: which are listed, in which order, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import datasets
import numpy as np
import pytest

from distill import suspects
from distill.data import Rows
from distill.tasks import TaskSpec

SINGLE = TaskSpec("single_label", ("bad", "good", "odd"), "accuracy")
MULTI = TaskSpec("multi_label", ("rude", "loud"), "micro_f1")


def rows_of(
    labels: np.ndarray, texts: Sequence[str] | None = None, pairs: Sequence[str] | None = None
) -> Rows:
    count = len(labels)
    columns = {"text": list(texts or [f"text {n}" for n in range(count)])}
    if pairs:
        columns["text_pair"] = list(pairs)
    ids = np.arange(count, dtype=np.int64) + (1 << 60)
    return Rows("train", datasets.Dataset.from_dict(columns), ids, labels, np.full(count, 2, np.int32))


def test_labels_that_the_teacher_contradicts_are_listed_least_probable_first() -> None:
    p = np.array([[0.05, 0.9, 0.05], [0.7, 0.2, 0.1], [0.01, 0.01, 0.98], [0.3, 0.4, 0.3]])
    found = suspects.find(SINGLE, np.log(p), rows_of(np.array([0, 0, 1, 2]), ["a" * 300, "b", "c", "d"]))
    assert {key: value for key, value in found.items() if key != "suspects"} == {
        "split": "train", "labels": 4, "contradicted": 3, "doubted": 2, "below": 0.1,
    }  # fmt: skip
    listed = found["suspects"]
    assert [one["row_id"] - (1 << 60) for one in listed] == [2, 0, 3]
    assert [(one["label"], one["teacher"]) for one in listed] == [
        ("good", "odd"),
        ("bad", "good"),
        ("odd", "good"),
    ]
    assert [one["p_label"] for one in listed] == pytest.approx([0.01, 0.05, 0.3])
    assert [one["p_teacher"] for one in listed] == pytest.approx([0.98, 0.9, 0.4])
    assert listed[1]["text"] == "a" * 200


def test_of_many_labels_each_is_judged_for_itself() -> None:
    p = np.array([[0.97, 0.5001], [0.02, 0.6], [0.2, 0.85]])
    labels = np.array([[0, 1], [1, 1], [0, 0]], np.float32)
    found = suspects.find(MULTI, np.log(p / (1 - p)), rows_of(labels))
    assert (found["labels"], found["doubted"]) == (6, 2)
    assert [(one["row_id"] - (1 << 60), one["name"], one["label"], one["teacher"]) for one in found["suspects"]] == [
        (1, "rude", True, False), (0, "rude", False, True), (2, "loud", False, True),
    ]  # fmt: skip
    assert [one["p_label"] for one in found["suspects"]] == pytest.approx([0.02, 0.03, 0.15])
    assert [one["p_teacher"] for one in found["suspects"]] == pytest.approx([0.98, 0.97, 0.85])


def test_twenty_are_listed_and_all_are_counted() -> None:
    logits = np.stack([np.zeros(50), np.linspace(3, 6, 50), np.zeros(50)], axis=1)
    found = suspects.find(SINGLE, logits, rows_of(np.zeros(50, np.int64)))
    assert [one["row_id"] - (1 << 60) for one in found["suspects"]] == list(range(49, 29, -1))
    assert found["doubted"] == 50


def test_a_teacher_that_believes_every_label_lists_none() -> None:
    found = suspects.find(SINGLE, 4 * np.eye(3), rows_of(np.arange(3)))
    assert (found["doubted"], found["suspects"]) == (0, [])


def test_of_many_classes_the_most_probable_one_is_not_doubted_however_small() -> None:
    task = TaskSpec("single_label", tuple("abcdefghijklmno"), "accuracy")
    found = suspects.find(task, 0.1 * np.eye(15)[:1], rows_of(np.array([0])))
    assert (found["doubted"], found["suspects"]) == (0, [])


def test_both_texts_of_a_pair_are_listed_and_json_takes_what_a_terminal_should_not() -> None:
    rows = rows_of(np.array([0]), ["\x1b[2Jboo"], ["b" * 300])
    found = suspects.find(SINGLE, np.array([[0.0, 9.0, 0.0]]), rows)
    assert found["suspects"][0]["text_pair"] == "b" * 200
    assert "\x1b" not in json.dumps(found, ensure_ascii=False)
    assert json.loads(json.dumps(found)) == found
    assert suspects.sentence(found, "runs/s/suspects.json") == (
        "1 of 1 training labels look wrong to the teacher (p < 0.1; it contradicts 1): runs/s/suspects.json"
    )
