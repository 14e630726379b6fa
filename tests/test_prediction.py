"""Prediction and the TF-IDF baseline: any finished run reads lines, csv, jsonl or standard input."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import documents, write_csv

from distill import prediction, runs
from distill.errors import DataError, UsageError
from distill.runs import RunFolder
from distill.tasks import TaskSpec, predictions, probabilities

tfidf = importlib.import_module("distill.students.tfidf")
TEXTS = ["good great fine lovely film", "bad poor dull awful film"]


def config(**more: Any) -> Any:
    return tfidf.Config(architecture="tfidf", **more)


def fit(kind: Any, names: tuple[str, ...], labels: Any, weights: Any = None) -> Any:
    rows = [(text, None) for text, _ in documents(120)]
    return tfidf.fit(config(), TaskSpec(kind, names, "any"), rows, labels, weights)


CLASSES = np.array([label for _, label in documents(120)])
FITS: dict[str, tuple[Any, tuple[str, ...], Any]] = {
    "two classes": ("single_label", ("bad", "good"), CLASSES),
    "three classes": ("single_label", ("bad", "good", "odd"), np.where(np.arange(120) % 5 == 0, 2, CLASSES)),
    "a class without rows": ("single_label", ("bad", "never", "good"), CLASSES * 2),
    "multi label": ("multi_label", ("good", "all", "none"), np.stack([CLASSES, CLASSES * 0 + 1, CLASSES * 0], axis=1).astype(np.float32)),
    "regression": ("regression", ("stars",), CLASSES.astype(np.float32) * 4 + 1),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A finished run, run1, of a baseline."""
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    return finished("run1", "two classes")


def finished(name: str, which: str) -> RunFolder:
    run = runs.Run(
        name=name, role="baseline", group=name, recipe="r", experiment="e", model="tfidf", seed=0,
        created=time.time(), status="finished",
    )  # fmt: skip
    made = runs.create(run, "")
    fit(*FITS[which]).save(made.model)
    return made


def answers(
    folder: RunFolder, file: Path | str, capsys: pytest.CaptureFixture[str], text: str = "text"
) -> list[dict[str, Any]]:
    prediction.predict(folder, Path(file), text, None, None)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# The baseline


@pytest.mark.parametrize("which", sorted(FITS))
def test_a_baseline_reads_back_to_the_same_logits(which: str, tmp_path: Path) -> None:
    kind, names, labels = FITS[which]
    made = fit(kind, names, labels)
    made.save(tmp_path / "model")
    again = tfidf.load_predictor(tmp_path / "model")
    new = [(text, None) for text, _ in documents(40, seed=5)] + [("", None), ("words never seen", None)]
    assert made.logits(new).shape == (42, len(names))
    assert np.isfinite(made.logits(new)).all()
    np.testing.assert_allclose(again.logits(new), made.logits(new), rtol=0, atol=1e-6)
    assert again.labels == list(names)
    assert again.parameters == made.parameters


def test_a_baseline_learns_what_it_is_shown() -> None:
    new = documents(200, seed=5)
    rows, wanted = [(text, None) for text, _ in new], np.array([label for _, label in new])
    two = fit(*FITS["two classes"]).logits(rows)
    assert (predictions("single_label", two) == wanted).mean() > 0.9
    gap = fit(*FITS["a class without rows"]).logits(rows)
    assert (predictions("single_label", gap) == wanted * 2).mean() > 0.9
    several = predictions("multi_label", fit(*FITS["multi label"]).logits(rows))
    assert (several[:, 0] == wanted).mean() > 0.9
    assert several[:, 1:].tolist() == [[1, 0]] * 200, "labels that always or never occurred"
    number = predictions("regression", fit(*FITS["regression"]).logits(rows))
    assert np.corrcoef(number, wanted)[0, 1] > 0.7


@pytest.mark.parametrize("which", ["two classes", "three classes", "a class without rows", "multi label"])
def test_a_baseline_weighs_rows_by_their_class(which: str) -> None:
    """Where the fit ends, its biases, which are not penalised, leave no weighed residual."""
    kind, names, labels = FITS[which]
    weights = np.array([3.0, 0.5, 2.0][: len(names)])
    rows = [(text, None) for text, _ in documents(120)]
    several = kind == "multi_label"
    truth = labels if several else np.eye(len(names))[labels]
    each = np.where(truth == 1, weights, 1.0) if several else weights[labels][:, None]
    fitted = (truth.min(axis=0) == 0) & (truth.max(axis=0) == 1)
    for given, least in ((tuple(weights), True), (None, False)):
        residual = probabilities(kind, fit(kind, names, labels, given).logits(rows)) - truth
        assert (abs((each * residual).sum(axis=0))[fitted] < 0.02).all() == least


def test_a_baseline_reads_both_texts_of_a_pair() -> None:
    rows = [("which film", text) for text, _ in documents(120)]
    made = tfidf.fit(config(), TaskSpec("single_label", ("bad", "good"), "any"), rows, CLASSES)
    answer = predictions("single_label", made.logits([("which film", text) for text in TEXTS]))
    assert answer.tolist() == [1, 0]


def test_a_baseline_without_a_shared_word_says_what_to_set() -> None:
    rows = [(f"word{n}", None) for n in range(4)]
    with pytest.raises(DataError, match=r"set student\.min_documents=1"):
        tfidf.fit(config(), TaskSpec("single_label", ("a", "b"), "any"), rows, np.array([0, 1, 0, 1]))


def test_a_saved_baseline_holds_no_pickle(tmp_path: Path) -> None:
    fit(*FITS["two classes"]).save(tmp_path / "model")
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}


# What is read


def test_every_kind_of_file_gives_the_same_answers(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "windows.txt").write_bytes("\r\n".join(TEXTS).encode())
    write_csv(tmp_path / "rows.csv", [(n, text) for n, text in enumerate(TEXTS)], ("id", "text"))
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbftext\r\n" + "\r\n".join(TEXTS).encode())
    (tmp_path / "rows.tsv").write_text("id\ttext\n" + "".join(f"1\t{text}\n" for text in TEXTS))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS))
    wanted = answers(folder, tmp_path / "lines.txt", capsys)
    assert [answer["label"] for answer in wanted] == ["good", "bad"]
    for answer in wanted:
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert max(answer["probabilities"], key=answer["probabilities"].__getitem__) == answer["label"]
    for name in ("windows.txt", "rows.csv", "bom.csv", "rows.tsv", "rows.jsonl"):
        assert list(prediction.read(tmp_path / name, "text", None)) == [(text, None) for text in TEXTS], name
        assert answers(folder, tmp_path / name, capsys) == wanted, name
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "lines.txt").read_bytes()), "latin-1")
    )
    assert answers(folder, "-", capsys) == wanted


def test_every_line_has_an_answer_blank_ones_too(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\n" * 200)
    assert len(answers(folder, tmp_path / "lines.txt", capsys)) == 600


@pytest.mark.parametrize(
    ("which", "keys"),
    [("three classes", {"label", "probabilities"}), ("multi label", {"labels", "probabilities"}), ("regression", {"value"})],
)  # fmt: skip
def test_an_answer_has_the_shape_of_its_task(
    which: str, keys: set[str], folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    found = answers(finished("run2", which), tmp_path / "lines.txt", capsys)
    assert [set(answer) for answer in found] == [keys, keys]
    if which == "multi label":
        assert [answer["labels"] for answer in found] == [["good", "all"], ["all"]]
    if which == "regression":
        assert found[0]["value"] > 3 > found[1]["value"]


def test_a_column_of_another_name(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_csv(tmp_path / "rows.csv", [(text,) for text in TEXTS], ("review",))
    assert [a["label"] for a in answers(folder, path, capsys, "review")] == ["good", "bad"]
    with pytest.raises(
        DataError, match=r"rows.csv, line 2: no text in column 'reviw'; did you mean 'review'\?"
    ):
        prediction.predict(folder, path, "reviw", None, None)


def test_literal_quotes_in_a_tsv_are_kept_or_refused_and_swallow_no_rows(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text('text\tid\n"Odd," he said\t1\ngood\t2\n"Even" is not\t3\n')
    assert [text for text, _ in prediction.read(file, "text", None, quotes=False)] == [
        '"Odd," he said', "good", '"Even" is not'
    ]  # fmt: skip
    with pytest.raises(
        DataError, match=r"rows\.tsv: cannot be read: .*; where quotes are literal add --no-quotes"
    ):
        answers(folder, file, capsys)


def test_a_document_of_a_megabyte_in_a_csv_cell(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_csv(tmp_path / "rows.csv", [("great fine " * 100_000,)], ("text",))
    assert answers(folder, path, capsys)[0]["label"] == "good"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "rows.jsonl, line 2: not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n["b"]\n', "rows.jsonl, line 2: must be an object"),
        ("rows.jsonl", b'{"text": 3}\n', "rows.jsonl, line 1: no text in column 'text'"),
        ("rows.csv", b"id,text\n1,good\n2\n", "rows.csv, line 3: no text in column 'text'"),
        ("rows.txt", b"fine\ncaf\xe9\n", "rows.txt, line 2: not UTF-8"),
        ("rows.csv", b"text\nfine\ncaf\xe9\n", "rows.csv, line 3: not UTF-8"),
        ("rows.jsonl", b'{"text": "caf\xe9"}\n', "rows.jsonl, line 1: not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_line(
    folder: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    words: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        prediction.predict(folder, tmp_path / name, "text", None, None)
    assert words in str(caught.value)
    assert capsys.readouterr().out == "", "no answer comes before the file is known to be whole"


def test_a_file_that_is_not_there_or_a_folder_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.txt", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            prediction.predict(folder, path, "text", None, None)


def test_what_is_no_text_is_not_taken_for_lines(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("PAR1")
    (tmp_path / "rows.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": 1.5}))
    for name, words in (
        ("rows.parquet", "no parquet is read here; write a csv or a jsonl of it"),
        ("rows.json", "line 1: must be an object"),
        ("rows.jsonl", r"line 1: no text in column 'text'$"),
    ):
        with pytest.raises(DataError, match=words):
            prediction.predict(folder, tmp_path / name, "text", None, None)


@pytest.mark.parametrize(("trained", "given"), [("null", "b"), ("b", None)])
def test_pairs_are_read_by_a_run_of_pairs_alone(
    folder: RunFolder, tmp_path: Path, trained: str, given: str | None
) -> None:
    folder.recipe.write_text(f"data: {{text: a, text_pair: {trained}}}")
    rows = write_csv(tmp_path / "rows.csv", [(text, text) for text in TEXTS], ("text", "b"))
    said = r"single texts; leave out --text-pair"
    if given is None:
        said = r"pairs of texts; add --text and --text-pair \(there the columns a and b\)"
    with pytest.raises(UsageError, match=rf"run1 was trained on {said}"):
        prediction.predict(folder, rows, "text", given, None)
    prediction.predict(folder, rows, "text", None if trained == "null" else trained, tmp_path / "out.jsonl")


# Where answers go


def test_output_is_written_whole_to_a_file(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    prediction.predict(folder, tmp_path / "lines.txt", "text", None, tmp_path / "out.jsonl")
    assert capsys.readouterr().out == ""
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["good", "bad"]


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    folder: RunFolder, tmp_path: Path
) -> None:
    for output in (tmp_path / "no" / "out.jsonl", tmp_path):
        with pytest.raises(UsageError, match="--output"):
            prediction.predict(folder, tmp_path / "nothing.txt", "text", None, output)


def test_the_command_line_reads_a_pipe(folder: RunFolder) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill", "predict", "--run", "run1", "-"],
        input="\n".join([*TEXTS, "café"]).encode(), capture_output=True, timeout=100,
        env=os.environ | {"PYTHONIOENCODING": "ascii:surrogateescape"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()][:2] == ["good", "bad"]


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_a_run_that_has_not_finished_is_refused(folder: RunFolder, status: Any, tmp_path: Path) -> None:
    folder.update(status=status)
    with pytest.raises(UsageError, match=rf"run1 has not finished \({status}\).* --resume run1"):
        runs.refuse_unfinished("run1")
