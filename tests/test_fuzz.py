"""Random and randomly damaged files through every reader: an answer, or an error of ours, within a bound of memory.

``--hypothesis-profile soak`` tries fifty times as many, and others each time.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from distill import catalog, checkpoint, data, logits, prediction, recipe, runs, yaml_strict
from distill.checkpoint import TrainState
from distill.errors import DistillError
from distill.files import sha256_file, write_json
from distill.runs import Run, RunFolder

SLOW = settings(max_examples=max(8, settings().max_examples // 4))
"""For readers that take a tenth of a second."""
MEMORY = 2 << 30


@pytest.fixture(autouse=True)
def _bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process have 2 GiB of addresses more than it has: what asks for more fails with a MemoryError."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def answered(read: Callable[[], object]) -> None:
    """Call a reader; an error of ours is an answer, and any other fails the test."""
    with contextlib.suppress(DistillError):
        read()


# What is tried

ODD_LETTERS = [*'\0\n\r",\t\ud800\udfff\u202e\ufeff{}[]:&*!#-01a']
TEXT = st.text(st.characters(exclude_categories=()), max_size=12) | st.lists(
    st.sampled_from(ODD_LETTERS), max_size=12
).map("".join)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from([10**400, -1, 2**63, "", "../.."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its parts replaced, left out or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        fate = draw(st.sampled_from(["inside", "inside", "inside", "without", "beside"]))
        rest = {k: v for k, v in value.items() if k != key}
        if fate == "without":
            return rest
        if fate == "beside":
            return value | {draw(TEXT): draw(JSON)}
        return rest | {key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(changed(value[at])), *value[at + 1 :]]
    return draw(JSON)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with up to four pieces replaced by others, of another length as well."""
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 40)))
        content = content[:start] + draw(st.binary(max_size=12)) + content[end:]
    return content if draw(st.booleans()) else content[: draw(st.integers(0, len(content)))]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# Recipes

QUICKSTART = catalog.recipes()["quickstart"]
WHOLE = yaml_strict.read(QUICKSTART)


@given(
    damaged(QUICKSTART.read_bytes())
    | st.binary(max_size=60)
    | TEXT.map(lambda t: t.encode("utf-8", "surrogatepass"))
)
def test_no_bytes_of_a_recipe_end_in_anything_but_an_answer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    answered(lambda: recipe.load(str(path)).dump())


@given(changed(WHOLE))
def test_no_values_of_a_recipe_end_in_anything_but_an_answer(tmp_path: Path, value: Any) -> None:
    answered(lambda: recipe.build(value, "r.yaml").dump() if isinstance(value, dict) else None)
    path = tmp_path / "r.yaml"
    path.write_bytes(as_json(value))  # JSON is YAML
    answered(lambda: recipe.load(str(path)))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["teacher", "teacher.train.seed", "data.splits.test", "student.losses.0", "a.b"])
            | TEXT,
            TEXT,
        ),
        max_size=3,
    )
)
def test_no_setting_ends_in_anything_but_an_answer(parts: list[tuple[str, str]]) -> None:
    answered(lambda: recipe.load("quickstart", [f"{key}={value}" for key, value in parts]))


# Run folders

RUN = {
    "name": "r", "role": "teacher", "group": "g", "recipe": "r", "experiment": "e", "model": "m", "seed": 0, "created": 1.0,
    "status": "finished", "finished": 2.0, "error": None, "against": "", "teachers": ["t"], "command": {}, "facts": {"data": "d"},
}  # fmt: skip
SPLIT = {
    "rows": 4,
    "accuracy": 0.5,
    "buckets": [{"words": "0-9", "rows": 4, "accuracy": 0.5}],
    "labels": {"a": {"rows": 1, "f1": 0.5}},
}
METRICS = {
    "task": {"kind": "single_label", "labels": ["a", "b"], "metric": "accuracy"}, "model": {"parameters": 3, "bytes": 4},
    "train": {"seconds": 1.0, "steps": 1}, "validation": SPLIT, "test": SPLIT,
}  # fmt: skip
ENTRY = {"time": 1.0, "event": "metrics", "step": 1, "metrics": {"train/loss": 0.5}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = Run("r", "teacher", "g", "r", "e", "m", 0, 1.0, "finished")
    return runs.create(run, QUICKSTART.read_text())


@given(
    run=damaged(as_json(RUN)) | changed(RUN).map(as_json),
    metrics=damaged(as_json(METRICS)) | changed(METRICS).map(as_json),
)
def test_no_run_folder_ends_in_anything_but_an_answer(folder: RunFolder, run: bytes, metrics: bytes) -> None:
    from distill import show

    (folder.path / "run.json").write_bytes(run)
    (folder.path / "metrics.json").write_bytes(metrics)
    answered(folder.metrics)
    answered(lambda: runs.find("r").read())
    answered(show.runs_table)
    answered(lambda: show.finished([folder]))


@given(st.lists(damaged(as_json(ENTRY)) | changed(ENTRY).map(as_json), max_size=4))
def test_no_journal_ends_in_anything_but_figures(folder: RunFolder, lines: list[bytes]) -> None:
    folder.journal.write_bytes(b"\n".join(lines))
    before = list(folder.entries())
    assert all(isinstance(entry["metrics"], dict) for entry in before)
    folder.log(9, {"a": 1.0})
    assert [entry["step"] for entry in folder.entries()] == [*(entry["step"] for entry in before), 9]


# Caches and checkpoints

KEY = {
    "format": 1, "weights": "w", "config": "c", "tokenizer": "t", "reading": {"max_length": 8, "view": "head"}, "precision": "fp32",
    "dtype": "float32", "kind": "single_label", "labels": ["a", "b"],
}  # fmt: skip
SHARD = save({"row_id": np.arange(4), "logits": np.ones((4, 2), np.float32)})
HEADER = json.loads(SHARD[8 : 8 + int.from_bytes(SHARD[:8], "little")])


def with_header(header: Any, lie: int = 0) -> bytes:
    """A safetensors file with this header, whose length lies by so much."""
    text = as_json(header)
    return (
        max(0, len(text) + lie).to_bytes(8, "little")
        + text
        + SHARD[8 + int.from_bytes(SHARD[:8], "little") :]
    )


SHARDS = st.one_of(
    damaged(SHARD),
    changed(HEADER).map(with_header),
    st.sampled_from([1, -1, 8, 2**40, 2**60]).map(lambda lie: with_header(HEADER, lie)),
)


@given(content=SHARDS, rows=st.integers(0, 9))
def test_no_shard_ends_in_anything_but_an_answer(tmp_path: Path, content: bytes, rows: int) -> None:
    """Under a true name and hash, so that nothing but the reader is between it and the loss."""
    folder = tmp_path / "cache"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "x").write_bytes(content)
    sha = sha256_file(folder / "x")
    (folder / "x").rename(folder / f"{sha[:32]}.safetensors")
    write_json(folder / "key.json", KEY)
    shards = [{"file": f"{sha[:32]}.safetensors", "rows": rows, "sha256": sha}]
    write_json(folder / "manifest.json", {"format": 1, "rows": rows, "shards": shards, "gate": {}})
    answered(lambda: logits.missing(folder, np.arange(5)))
    answered(lambda: logits.verify(folder))
    answered(lambda: logits.Logits(folder, verify=False)(np.arange(4)))


@given(
    key=damaged(as_json(KEY)) | changed(KEY).map(as_json),
    manifest=st.sampled_from(
        [{"format": 1, "rows": 1, "shards": [{"file": "a", "rows": 1, "sha256": "b"}], "gate": {}}]
    ).flatmap(lambda valid: damaged(as_json(valid)) | changed(valid).map(as_json)),
)
def test_no_manifest_ends_in_anything_but_an_answer(key: bytes, manifest: bytes) -> None:
    from distill import show

    folder = runs.runs_folder() / "_logits" / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key.json").write_bytes(key)
    (folder / "manifest.json").write_bytes(manifest)
    answered(lambda: logits.Logits(folder))
    answered(lambda: logits.opened(folder, dict(KEY), np.arange(2)))
    answered(show.caches)


@given(
    file=st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json", checkpoint.MANIFEST]),
    content=SHARDS | damaged(as_json({"step": 1, "meaning": {"a": 1}})) | JSON.map(as_json),
    true=st.booleans(),
)
def test_no_checkpoint_ends_in_anything_but_an_answer(
    tmp_path: Path, file: str, content: bytes, true: bool
) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path / "checkpoints", model, optimizer, None, TrainState(step=1))
    (path / file).write_bytes(content)
    if true and file != checkpoint.MANIFEST:
        hashes = {one.name: sha256_file(one) for one in path.iterdir() if one.name != checkpoint.MANIFEST}
        write_json(path / checkpoint.MANIFEST, hashes)

    def resume() -> None:
        whole = checkpoint.latest(path.parent)
        assert whole is not None
        checkpoint.load(whole, model, optimizer, {})
        optimizer.step()

    answered(resume)


# Data


def table(rows: list[list[str]], separator: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def lines(rows: list[Any]) -> bytes:
    return b"\n".join(map(as_json, rows))


ROWS = [[f"word{n} film", str(n % 2)] for n in range(9)]
OBJECTS = [{"text": text, "label": label} for text, label in ROWS]
ODD = st.lists(st.tuples(TEXT, st.sampled_from("01") | TEXT).map(list), max_size=4)
ODD_OBJECTS = st.lists(
    st.fixed_dictionaries({"text": TEXT | JSON, "label": st.sampled_from("01")}) | JSON, max_size=3
)


def tables(separator: str) -> st.SearchStrategy[bytes]:
    head = ["text", "label"]
    odd = ODD.map(lambda rows: table([head, *ROWS, *rows], separator))
    return odd | damaged(table([head, *ROWS], separator)) | st.binary(max_size=40)


OBJECT_LINES = ODD_OBJECTS.map(lambda odd: lines([*OBJECTS, *odd])) | damaged(lines(OBJECTS))
FILES = st.one_of(
    st.tuples(st.just(".csv"), tables(",")),
    st.tuples(st.just(".tsv"), tables("\t")),
    st.tuples(st.sampled_from([".jsonl", ".json"]), OBJECT_LINES),
)


@given(FILES | st.tuples(st.just(".txt"), st.binary(max_size=30)))
def test_no_file_to_predict_ends_in_anything_but_an_answer(tmp_path: Path, file: tuple[str, bytes]) -> None:
    path = tmp_path / f"rows{file[0]}"
    path.write_bytes(file[1])

    def read() -> None:
        for text, _ in prediction.read(path, "text", None):
            text.encode()  # what a tokenizer takes

    answered(read)


# pandas' reader, as datasets uses it, closes a file that it cannot read when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@SLOW
@given(FILES)
def test_no_source_ends_in_anything_but_an_answer(tmp_path: Path, file: tuple[str, bytes]) -> None:
    path = tmp_path / f"rows{file[0]}"
    path.write_bytes(file[1])
    raw = {
        "description": "x", "teacher": {"architecture": "bigbird"}, "student": {"architecture": "tfidf"},
        "data": {
            "source": str(path),
            "splits": {"train": {"from": "train"}, "validation": {"from": "train", "rows": 2}, "test": {"from": "train", "rows": 2}},
        },
    }  # fmt: skip

    def read() -> None:
        for rows in data.load(recipe.build(raw, "r.yaml")).splits.values():
            for text, _ in rows.texts():
                text.encode()

    answered(read)
