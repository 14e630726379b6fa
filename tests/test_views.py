"""Views and encoding: which tokens of a document a model reads, and how they are laid out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BAD, GOOD, PLAIN, documents, sentence

from distill.data import Rows
from distill.encoding import Encoded, concatenate, encode, encode_texts
from distill.schema import Model
from distill.views import cut, cut_pair

TEN = list(range(10))


def windows(ids: Sequence[int], room: int, view: Any, **more: int) -> list[list[int]]:
    return [list(window) for window in cut(ids, room, view, **more)]


@pytest.mark.parametrize(
    ("view", "room", "expected"),
    [
        ("head", 4, [[0, 1, 2, 3]]),
        ("tail", 4, [[6, 7, 8, 9]]),
        ("head_tail", 4, [[0, 1, 8, 9]]),
        ("head_tail", 5, [[0, 1, 2, 8, 9]]),
        ("head_tail", 1, [[0]]),
        ("chunks", 4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        ("chunks", 5, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
    ],
)
def test_a_view_reads_the_tokens_that_it_says(view: Any, room: int, expected: list[list[int]]) -> None:
    assert windows(TEN, room, view) == expected


@pytest.mark.parametrize("view", ["head", "tail", "head_tail", "chunks"])
@pytest.mark.parametrize("length", [0, 1, 10])
def test_a_document_that_fits_is_read_whole_by_every_view(view: Any, length: int) -> None:
    assert windows(TEN[:length], 10, view, overlap=3) == [TEN[:length]]


def test_chunks_overlap_by_what_they_say_and_stop_at_the_last_window() -> None:
    assert windows(TEN, 4, "chunks", overlap=1) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows(TEN, 6, "chunks", overlap=2) == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]]
    assert windows(TEN, 3, "chunks", max_windows=2) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("overlap", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [9, 10, 11, 23, 24, 25, 64])
def test_chunks_leave_no_token_out_and_no_window_is_only_overlap(length: int, overlap: int) -> None:
    found = windows(list(range(length)), 8, "chunks", max_windows=100, overlap=overlap)
    assert sorted({token for window in found for token in window}) == list(range(length))
    for before, after in itertools.pairwise(found):
        assert before[len(before) - overlap :] == after[:overlap]
        assert len(after) > overlap


@pytest.mark.parametrize(
    ("lengths", "room", "expected"),
    [((3, 3), 6, (3, 3)), ((9, 2), 6, (4, 2)), ((2, 9), 6, (2, 4)), ((9, 9), 6, (3, 3)), ((9, 9), 7, (3, 4)), ((9, 8), 7, (4, 3))],
)  # fmt: skip
def test_a_pair_is_cut_from_the_longer_text_first(
    lengths: tuple[int, int], room: int, expected: tuple[int, int]
) -> None:
    first, second = cut_pair(list(range(lengths[0])), list(range(lengths[1])), room)
    assert (first, second) == (list(range(expected[0])), list(range(expected[1])))


# Encoding, held against the tokenizers' own


def unigram(folder: Path, tokenizer: Any) -> Path:
    """Make a unigram tokenizer, as BigBird and FNet have it."""
    specials = "<pad> </s> <s> [MASK] [CLS] [SEP] <unk>".split()
    words = [f"▁{word}" for word in (*GOOD, *BAD, *PLAIN)]
    pieces = [(piece, -1.0) for piece in words] + [(c, -9.0) for c in "▁abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer(vocab=[*((s, 0.0) for s in specials), *pieces]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bigbird_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BigBirdTokenizer

    return unigram(tmp_path_factory.mktemp("bigbird"), BigBirdTokenizer)


@pytest.fixture(scope="session")
def fnet_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import FNetTokenizer

    return unigram(tmp_path_factory.mktemp("fnet"), FNetTokenizer)


# RoBERTa's tokenizer is Longformer's as well, and BERT's that of the miniatures and of DistilBERT.
@pytest.fixture(params=[f"{name}tokenizer_folder" for name in ("", "roberta_", "bigbird_", "fnet_")])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoTokenizer

    folder: Path = request.getfixturevalue(request.param)
    return AutoTokenizer.from_pretrained(folder)


def model(max_length: int, **more: Any) -> Model:
    return Model(architecture="any", max_length=max_length, **more)


def window(encoded: Encoded, number: int) -> tuple[list[int], list[int]]:
    part = slice(encoded.windows[number], encoded.windows[number + 1])
    return encoded.token_ids[part].tolist(), encoded.segments[part].tolist()


def test_single_texts_are_encoded_as_the_tokenizer_does(tokenizer: Any) -> None:
    texts = [text for text, _ in documents(30, longest=40)] + ["", "x", "ünknown wörds 日本", "a" * 200]
    encoded = encode_texts(tokenizer, [[(text, None) for text in texts]], model(16))
    assert len(encoded) == len(texts)
    for number, text in enumerate(texts):
        wanted = tokenizer(text, truncation=True, max_length=16)["input_ids"]
        assert window(encoded, number) == (wanted, [0] * len(wanted))
        assert encoded.full_length[number] == len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("max_length", [8, 9, 15, 24, 200])
def test_pairs_are_encoded_as_the_tokenizer_does(tokenizer: Any, max_length: int) -> None:
    rng = np.random.default_rng(max_length)
    lengths = [(a, b) for a in (1, 2, 5, 8, 21) for b in (1, 3, 5, 8, 22)]
    pairs = [(sentence(rng, 0, a), sentence(rng, 1, b)) for a, b in lengths]
    encoded = encode_texts(tokenizer, [pairs], model(max_length))
    for number, (first, second) in enumerate(pairs):
        wanted = tokenizer(first, second, truncation="longest_first", max_length=max_length)
        ids, segments = window(encoded, number)
        assert ids == wanted["input_ids"]
        assert segments == wanted.get("token_type_ids", [0] * len(ids))
        assert encoded.full_length[number] == len(tokenizer(first, second)["input_ids"])


def test_bert_tells_a_pair_apart_by_segments(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    found = encode_texts(
        AutoTokenizer.from_pretrained(tokenizer_folder), [[("good film", "bad plot")]], model(16)
    )
    assert found.segments.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_roberta_and_bigbird_tell_a_pair_apart_by_separators(
    roberta_tokenizer_folder: Path, bigbird_tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    for folder, specials in (
        (roberta_tokenizer_folder, ["<s>", "</s>", "</s>", "</s>"]),
        (bigbird_tokenizer_folder, ["[CLS]", "[SEP]", "[SEP]"]),
    ):
        own = AutoTokenizer.from_pretrained(folder)
        found = encode_texts(own, [[("good film", "bad plot")]], model(16))
        tokens = own.convert_ids_to_tokens(found.token_ids.tolist())
        assert [token for token in tokens if token in own.all_special_tokens] == specials
        assert not found.segments.any()


def test_every_window_of_chunks_has_its_special_tokens(tokenizer: Any) -> None:
    text = sentence(np.random.default_rng(0), 1, 50)
    encoded = encode_texts(tokenizer, [[(text, None)]], model(16, view="chunks", overlap=2, max_windows=3))
    inner = tokenizer(text, add_special_tokens=False)["input_ids"]
    start, end = tokenizer("x")["input_ids"][0], tokenizer("x")["input_ids"][-1]
    assert [window(encoded, n)[0] for n in range(3)] == [
        [start, *inner[0:14], end],
        [start, *inner[12:26], end],
        [start, *inner[24:38], end],
    ]
    assert encoded.documents.tolist() == [0, 3]


def test_a_document_of_a_megabyte_is_cut_to_the_window(tokenizer: Any) -> None:
    text = "good film " * 105_000
    assert len(text) > 1 << 20
    encoded = encode_texts(tokenizer, [[(text, None), ("bad plot", None)]], model(32))
    assert np.diff(encoded.windows).tolist() == [32, len(tokenizer("bad plot")["input_ids"])]
    assert encoded.full_length[0] > 200_000


def test_offsets_row_ids_and_labels_belong_together(tokenizer: Any) -> None:
    rows = _rows([text for text, _ in documents(25)], np.arange(25) % 2)
    encoded = encode(tokenizer, rows, model(16, view="chunks"))
    assert (encoded.windows[0], encoded.windows[-1]) == (0, len(encoded.token_ids))
    assert (encoded.documents[0], encoded.documents[-1]) == (0, len(encoded.windows) - 1)
    assert len(encoded.segments) == len(encoded.token_ids)
    assert (np.diff(encoded.windows) >= 3).all()
    assert encoded.window_counts.max() > 1
    for number in range(25):
        own = np.diff(encoded.windows)[encoded.documents[number] : encoded.documents[number + 1]]
        assert encoded.longest_window[number] == own.max()
    assert encoded.row_id.tolist() == rows.row_id.tolist()
    assert encoded.labels.tolist() == [n % 2 for n in range(25)]
    assert encoded.labelled.all()


def _rows(texts: list[str], labels: Any) -> Rows:
    import datasets

    ids = np.arange(len(texts), dtype=np.int64) + 1000
    words = np.array([len(t.split()) for t in texts], dtype=np.int32)
    return Rows("train", datasets.Dataset.from_dict({"text": texts}), ids, labels, words)


def test_encoding_does_not_depend_on_how_documents_are_batched(tokenizer: Any) -> None:
    texts: list[tuple[str, str | None]] = [(text, None) for text, _ in documents(12)]
    whole = encode_texts(tokenizer, [texts], model(16, view="chunks"))
    parts = encode_texts(tokenizer, [texts[:5], [], texts[5:]], model(16, view="chunks"))
    for name in ("token_ids", "segments", "windows", "documents", "full_length"):
        assert getattr(whole, name).tolist() == getattr(parts, name).tolist(), name


@pytest.mark.parametrize(
    "labels", [np.array([1, 0, 1]), np.array([[1, 0], [0, 1], [1, 1]], np.float32), np.array([0.5, 1.5, 2.5], np.float32)]
)  # fmt: skip
@pytest.mark.parametrize("unlabelled_first", [False, True])
def test_splits_put_together_keep_every_document(tokenizer: Any, labels: Any, unlabelled_first: bool) -> None:
    labelled = encode(
        tokenizer, _rows(["good film", "bad plot and " * 9, "x"], labels), model(8, view="chunks")
    )
    bare = encode(tokenizer, _rows(["dull " * 12, "great"], None), model(8, view="chunks"))
    parts = [bare, labelled] if unlabelled_first else [labelled, bare]
    both = concatenate(parts)
    assert both.labels.dtype == labels.dtype
    assert both.labels.shape == (5, *labels.shape[1:])
    assert both.labels[both.labelled].tolist() == labels.tolist()
    assert both.labelled.tolist() == (
        [False] * 2 + [True] * 3 if unlabelled_first else [True] * 3 + [False] * 2
    )
    assert both.row_id.tolist() == [i for part in parts for i in part.row_id]
    expected = [window(part, n) for part in parts for n in range(len(part.windows) - 1)]
    assert [window(both, n) for n in range(len(both.windows) - 1)] == expected
    assert both.window_counts.tolist() == [n for part in parts for n in part.window_counts]
