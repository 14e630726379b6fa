"""Text that is streamed: it teaches what the same text teaches when it is read whole, and is not held."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import Write, documents

from distill import data, hub, stages, yaml_strict
from distill import recipe as recipes
from distill.data import Rows
from distill.encoding import encode
from distill.errors import DataError
from distill.files import sha256_file
from distill.schema import Data, Model, Recipe
from distill.spool import Joined, Spool

torch.set_num_threads(1)


@pytest.fixture
def shards(tmp_path: Path, recipe_file: Write) -> Path:
    """Three parquet files: new documents, a repeat in another file, a blank one, and one of the labelled source."""
    recipe_file()
    texts: list[str | None] = [text for text, _ in documents(60, seed=7)]
    texts[25], texts[31], texts[44] = texts[3], None, documents(160)[0][0]
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        part = texts[20 * number : 20 * number + 20]
        write(folder / f"train-{number}.parquet", {"n": list(range(20)), "text": part})
    return folder


def write(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=8)


def read(address: object, **more: Any) -> Rows:
    return data.read_text(Data(source="x"), str(address), "key", [], **more)


def texts_of(rows: Rows) -> list[tuple[str, str | None]]:
    return [texts for batch in rows.batches() for texts in batch]


def test_a_streamed_source_gives_the_same_student_to_the_bit(
    runs: Path, shards: Path, recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(streaming: bool) -> Recipe:
        source = {"source": f"{shards}/train-*.parquet", "rows": 40, "weight": 1.5, "streaming": streaming}
        other = {"source": str(shards / "train-0.parquet"), "weight": 0.5}
        return recipes.load(
            str(recipe_file({"data.transfer": [source, other], "data.deduplicate": False})), []
        )

    stages.train_teacher(recipe(False), "tiny", "t")
    found: dict[bool, Any] = {}
    for streaming in (False, True):
        place = tmp_path / f"runs-{streaming}"
        shutil.copytree(runs, place)
        monkeypatch.setenv("DISTILL_RUNS", str(place))
        wish = recipe(streaming)
        job = stages.StudentJob(
            teachers=["t"], recipe=wish.dump(), recipe_name="tiny", student="bert_miniature", group="s", seeds=1,
            control=False, only="distilled",
        )  # fmt: skip
        (student,) = stages.train_students(job)
        corpus = data.load(wish)
        transfer = corpus.splits["transfer"]
        assert transfer.weights is not None
        found[streaming] = (
            corpus.fingerprint,
            corpus.notes,
            transfer.weights.tolist(),
            texts_of(transfer),
            sorted(path.name for path in place.glob("_logits/*/*.safetensors")),
            sha256_file(student.model / "model.safetensors"),
        )
    assert found[True] == found[False]


def test_repeats_and_held_out_documents_are_left_out_of_a_stream_too(
    shards: Path, recipe_file: Write
) -> None:
    corpora = [
        data.load(
            recipes.load(
                str(recipe_file({"data.transfer": [{"source": str(shards), "streaming": streaming}]})), []
            )
        )
        for streaming in (False, True)
    ]
    whole, streamed = (corpus.splits["transfer"] for corpus in corpora)
    assert len(whole) == 60 + 57
    assert corpora[0].notes == corpora[1].notes
    assert texts_of(whole) == texts_of(streamed)
    np.testing.assert_array_equal(whole.row_id, streamed.row_id)
    np.testing.assert_array_equal(whole.words, streamed.words)
    some = np.array([0, 59, 60, 80, 116])
    assert texts_of(streamed.select(some)) == whole.texts(some)


def test_a_hub_data_set_is_streamed_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text, _ in documents(2300)]
    asked: list[bool] = []

    def load_dataset(address: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append(streaming)
        held = datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))})
        return held.to_iterable_dataset(num_shards=3) if streaming else held

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    streamed, whole = read("some/corpus", streaming=True), read("some/corpus")
    assert asked == [True, False]
    assert texts_of(streamed) == texts_of(whole) == [(text, None) for text in texts]
    np.testing.assert_array_equal(streamed.row_id, whole.row_id)


def test_neither_text_nor_token_ids_of_a_stream_are_held(
    runs: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = Model(architecture="any", max_length=256)
    peaks = []
    for count in (2000, 5000):
        folder = tmp_path / str(count)
        folder.mkdir()
        line = " ".join(["good film"] * 50)
        write(folder / "a.parquet", {"text": [f"{line} n{number}" for number in range(count)]})
        tracemalloc.start()
        encoded = encode(tokenizer, read(folder, streaming=True), model)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert isinstance(encoded.token_ids, Spool)
        assert len(encoded.token_ids) > 100 * count
    assert peaks[1] - peaks[0] < 3000 * 120, "of a document's 100 words, some 60 bytes are kept"


def test_what_is_on_disk_is_read_as_it_was_written(runs: Path) -> None:
    rng = np.random.default_rng(0)
    held, spool = [], Spool(np.int32, (2,))
    for size in (3, 0, 5):
        held.append(rng.integers(0, 1 << 30, (size, 2)).astype(np.int32))
        spool.append(held[-1])
    whole = np.concatenate(held)
    both = Joined([Joined([whole, spool]), whole[:0], spool])
    for start, stop in ((0, 8), (8, 16), (9, 12), (13, 13), (16, 24)):
        np.testing.assert_array_equal(both[start:stop], np.concatenate([whole] * 3)[start:stop])
    assert (len(spool), len(both)) == (8, 24)
    assert list(runs.glob(".*")) == [], "the file has no name: nothing is left of a process that is killed"


def test_a_stream_that_changed_while_it_was_used_is_refused(shards: Path) -> None:
    rows = read(shards, streaming=True)
    whole = pyarrow.parquet.read_table(shards / "train-2.parquet").to_pydict()
    write(shards / "train-2.parquet", {**whole, "text": ["another text", *whole["text"][1:]]})
    with pytest.raises(DataError, match="transfer: its text is not what it was when this command began"):
        texts_of(rows)
    write(shards / "train-2.parquet", {name: cells[:7] for name, cells in whole.items()})
    with pytest.raises(DataError, match="transfer: its text is shorter than when this command began"):
        texts_of(rows)


def _text_file(folder: Path) -> Path:
    path = folder / "lines.txt"
    path.write_text("a good film\n")
    return path


def _broken(folder: Path) -> Path:
    (folder / "train-1.parquet").write_bytes(b"PAR1 and no more")
    return folder


def _other_columns(folder: Path) -> Path:
    write(folder / "train-1.parquet", {"n": [1], "body": ["a good film"]})
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_text_file, r"lines.txt: only .parquet files and hub data sets are streamed; convert it"),
        (_broken, r"train-1.parquet: cannot be read"),
        (_other_columns, r"train-1.parquet: no column 'text', which train-0.parquet has"),
        (lambda folder: folder / "test-*.parquet", r"there is no .*test-\*.parquet"),
    ],
)
def test_what_cannot_be_streamed_is_refused(change: Callable[[Path], Path], words: str, shards: Path) -> None:
    with pytest.raises(DataError, match=words):
        read(change(shards), streaming=True)


def test_a_shard_that_breaks_off_is_refused_while_it_is_read(shards: Path) -> None:
    path = shards / "train-1.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 2] = b"\xff" * (len(content) // 2 - len(content) // 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match="shards: cannot be read"):
        read(shards, streaming=True)


def test_streaming_is_written_into_the_resolved_recipe(shards: Path, recipe_file: Write) -> None:
    source = {"source": str(shards), "streaming": True}
    dumped = recipes.load(str(recipe_file({"data.transfer": [source]})), []).dump()
    assert yaml_strict.parse(dumped, "recipe")["data"]["transfer"][0]["streaming"] is True
