"""Augmentation: what a copy may be, that it is settled by its row alone, and who reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BAD, GOOD, PLAIN, TINY, Write, distill, documents, write_csv

from distill import augmentation, caching, data, fitting, logits, pretraining, stages, tracking, training
from distill import recipe as recipes
from distill.augmentation import near_words, occurring, replaced, vary, whole_words
from distill.data import Corpus, row_id
from distill.errors import DataError, RecipeError
from distill.runs import find
from distill.schema import Augment, Recipe

torch.set_num_threads(1)

TWINS = {**dict(zip(GOOD, BAD, strict=True)), **dict(zip(BAD, GOOD, strict=True))}
"""In the checkpoint's table each of these stands next to the other."""
NONE = {"delete": 0.0, "replace": 0.0, "ngram": 0.0}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runs folder, without the tracker's store, which takes longer to make than all else here."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv("DISTILL_RUNS", str(folder))
    return folder


def settings(**keys: Any) -> Augment:
    return Augment.model_validate({**NONE, **keys})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A tiny BERT, of whose words each in GOOD is nearest to one in BAD."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **TINY))
    table = model.get_input_embeddings().weight.data
    for good, bad in zip(GOOD, BAD, strict=True):
        ids = tokenizer.convert_tokens_to_ids([good, bad])
        table[ids[1]] = 3 * table[ids[0]] + 0.01 * table[ids[1]]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make(recipe_file: Write, runs: Path, checkpoint: Path) -> Any:
    def load(augment: Mapping[str, Any], **changes: Any) -> Recipe:
        wanted = {"checkpoint": str(checkpoint), **augment}
        return recipes.load(str(recipe_file({"data.augment": wanted, **changes})))

    return load


def copies(corpus: Corpus) -> list[str]:
    """Return the transfer rows without the sixty of the recipe's own."""
    return [text for text, _ in corpus.splits["transfer"].texts()][60:]


def lines(runs: Path) -> list[dict[str, Any]]:
    (path,) = (runs / "_augmented").iterdir()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_near_words_are_those_of_the_largest_cosine() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(700, 6)).astype(np.float32) * rng.uniform(0.1, 9, size=(700, 1)).astype(
        np.float32
    )
    words = [f"w{i}" for i in range(700)]
    found = near_words(words, table, words[100:], 5)
    assert list(found) == words[100:]
    for at in range(100, 700):
        cosine = [-9 if i == at else float(np.dot(table[at], v) / np.linalg.norm(v)) for i, v in enumerate(table)]  # fmt: skip
        assert list(found[f"w{at}"]) == [f"w{i}" for i in np.argsort(cosine)[::-1][:5]]


def test_equally_near_words_come_in_the_vocabularys_order_and_none_is_its_own_neighbour() -> None:
    table = np.array([[1, 0], [2, 0], [0, 1], [3, 0], [0, 0]], np.float32)
    assert near_words(list("abcde"), table, ["b", "e"], 3) == {"b": ["a", "d", "c"], "e": ["a", "b", "c"]}
    assert near_words(list("ab"), table[:2], ["a"], 9) == {"a": ["b"]}
    assert near_words(["a"], table[:1], ["a"], 9) == {"a": []}


def test_pieces_special_tokens_and_numbers_are_no_whole_words(
    tokenizer_folder: Path, roberta_tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    pieces = AutoTokenizer.from_pretrained(tokenizer_folder)
    pieces.add_special_tokens({"sep_token": "speaker"})
    found = whole_words(pieces)
    assert set(found) == {*GOOD, *BAD, *PLAIN, *"abcdefghijklmnopqrstuvwxyz"}
    assert pieces.convert_ids_to_tokens(list(found.values())) == list(found)
    bytes_ = AutoTokenizer.from_pretrained(roberta_tokenizer_folder)
    found = whole_words(bytes_)
    tokens = bytes_.convert_ids_to_tokens(list(found.values()))
    assert tokens == [f"Ġ{word}" for word in found], "each with the blank before it, which begins a word"
    assert {"great", "film"} <= set(found)
    assert not {"mask", "pad", "unk"} & set(found)


@pytest.mark.parametrize(
    ("word", "to"),
    [
        ("good", "bad"), ("Good,", "Bad,"), ('"GOOD!"', '"BAD!"'), ("(good)...", "(bad)..."), ("gOod", "bad"),
        ("Paris", "London"), ("PARIS", "PARIS"), ("goodness", "goodness"), ("good-natured", "good-natured"),
        ("good2", "good2"), ("<good", "<good"), ("#good", "#good"), ("@good", "@good"), ("--", "--"), ("alone", "alone"),
    ],
)  # fmt: skip
def test_a_word_keeps_its_punctuation_and_capitals(word: str, to: str) -> None:
    near = {"good": ["bad"], "Paris": ["London"], "alone": []}
    assert replaced(word, near, 0.5) == to


def test_every_near_word_can_be_drawn() -> None:
    near = {"a": list("bcde")}
    assert [replaced("a", near, draw) for draw in (0.0, 0.25, 0.5, 0.999999)] == list("bcde")


def test_words_are_left_out_and_replaced_as_often_as_asked() -> None:
    words = 40_000
    near = {"a": ["b", "c"]}
    made = vary(" ".join(["a"] * words), None, 1, 0, settings(delete=0.1, replace=0.3), near)["text"].split()
    assert 1 - len(made) / words == pytest.approx(0.1, abs=0.006)  # four standard errors
    assert sum(word != "a" for word in made) / words == pytest.approx(0.3, abs=0.01)
    assert made.count("b") / words == pytest.approx(0.15, abs=0.01)


def test_an_ngram_is_a_run_of_the_documents_words() -> None:
    words = [f"n{i}" for i in range(6)]
    found: set[tuple[str, ...]] = set()
    for copy in range(400):
        found.add(
            tuple(vary(" ".join(words), None, 1, copy, settings(ngram=1.0, longest_ngram=3), {})["text"].split())
        )  # fmt: skip
    assert found == {tuple(words[a : a + n]) for n in (1, 2, 3) for a in range(7 - n)}
    some = [vary("x y z", None, 1, copy, settings(ngram=0.25), {})["text"] == "x y z" for copy in range(4000)]
    # One draw in five is of each length from 1 to 5, and three of them keep all there is.
    assert sum(some) / 4000 == pytest.approx(0.75 + 0.25 * 3 / 5, abs=0.025)


def test_a_copy_is_settled_by_seed_row_and_number() -> None:
    text = " ".join(f"{word}, and" for word in GOOD)
    chosen = settings(delete=0.2, replace=0.3)
    near = {word: [*BAD] for word in GOOD}

    def one(row: int = -5, copy: int = 1, **keys: Any) -> str:
        return vary(text, None, row, copy, chosen.model_copy(update=keys), near)["text"]

    assert one() == "good, and great, and dull, lovely, and awful, and warm, and and poor, and", (
        "on any machine"
    )
    assert len({one(), one(row=5), one(copy=2), one(seed=1)}) == 4


def test_each_text_of_a_pair_changes_on_its_own() -> None:
    text = " ".join(GOOD * 4)
    made = vary(text, text, 7, 0, settings(delete=0.3), {})
    assert list(made) == ["text", "text_pair"]
    assert made["text"] != made["text_pair"]
    assert text not in made.values()


def test_a_copy_in_which_nothing_changed_is_its_original_to_the_letter() -> None:
    assert vary("two  blanks\n", None, 1, 0, settings(delete=1e-9), {}) == {"text": "two  blanks\n"}


def test_words_that_occur_are_found_in_any_writing(make: Any) -> None:
    rows = data.load(make(NONE | {"delete": 0.1})).splits["train"]
    texts = ["Good, FILM!", "filmgood <story", "Was it", "music2 of"]
    found = replace(
        rows.select(np.arange(4)), dataset=rows.dataset.select(range(4)).map(lambda _, i: {"text": texts[i]}, with_indices=True)
    )  # fmt: skip
    assert occurring([found], {*GOOD, *PLAIN}) == ["film", "good", "it", "of", "was"]


def test_copies_join_the_transfer_set_and_nothing_else(make: Any, runs: Path) -> None:
    recipe = make({"copies": 3, "delete": 0.2, "replace": 0.2, "weight": 0.5})
    before, corpus = data.load(recipe), fitting.load_corpus(recipe)
    for name in ("test", "validation", "train"):
        assert corpus.splits[name].texts() == before.splits[name].texts()
    transfer, train = corpus.splits["transfer"], corpus.splits["train"]
    assert transfer.texts()[:60] == before.splits["transfer"].texts()
    made = copies(corpus)
    assert transfer.labels is None
    assert transfer.weights is not None
    assert transfer.weights.tolist() == [1.0] * 60 + [0.5] * len(made)
    assert transfer.row_id.tolist() == [row_id(text) for text, _ in transfer.texts()]
    held = {int(i) for rows in before.splits.values() for i in rows.row_id}
    assert not held & set(transfer.row_id[60:].tolist())
    written = lines(runs)
    assert [(line["of"], line["copy"]) for line in written] == [(i, c) for i in train.row_id.tolist() for c in range(3)]  # fmt: skip
    kept = [w for line in written if (w := line["text"]).strip() and row_id(w) not in held]
    assert made == list(dict.fromkeys(kept))
    left_out = {
        "blank": r"(\d+) documents left out: blank",
        "repeated": r"(\d+) repeated documents left out",
        "held": r"(\d+) documents dropped that stand in test, validation, train or transfer as well",
    }
    counts = {k: sum(int(n) for note in corpus.notes for n in re.findall(p, note)) for k, p in left_out.items()}  # fmt: skip
    assert sum(counts.values()) == 150 - len(made)
    assert counts["repeated"] > 0
    assert corpus.notes[-1] == (
        f"transfer: {len(made):,} augmented copies of 50 documents of train, each drawn 0.5 times an epoch"
    )


def test_a_copy_that_stands_in_another_split_is_dropped(make: Any, tmp_path: Path) -> None:
    def twin(text: str) -> str:
        return " ".join(TWINS.get(word, word) for word in text.split())

    moods = [(f"{GOOD[i % 8]} {BAD[i // 8]} n{i}", i % 2) for i in range(64)]
    alone = [(f"{GOOD[i % 8]} {GOOD[i // 8]} m{i}", i % 2) for i in range(64)]
    write_csv(tmp_path / "reviews.csv", [*moods, *((twin(text), 1 - label) for text, label in moods), *alone])
    corpus = fitting.load_corpus(
        make({**NONE, "copies": 1, "replace": 1.0, "neighbours": 1}, **{"task.labels": None})
    )
    train = [text for text, _ in corpus.splits["train"].texts()]
    had = {name: {t for t, _ in rows.texts()} - set(copies(corpus)) for name, rows in corpus.splits.items()}
    held = set().union(*had.values())
    assert {name for name, texts in had.items() if texts & {twin(text) for text in train}} == set(had), (
        "each has some"
    )
    assert copies(corpus) == [twin(text) for text in train if twin(text) not in held]
    assert 0 < len(copies(corpus)) < len(train)


def test_near_words_come_from_the_checkpoints_table(make: Any) -> None:
    recipe = make({**NONE, "copies": 1, "replace": 1.0, "neighbours": 1})
    corpus = fitting.load_corpus(recipe)
    for (text, _), copy in zip(corpus.splits["train"].texts(), copies(corpus), strict=True):
        for word, new in zip(text.split(), copy.split(), strict=True):
            assert new == TWINS.get(word, new)
            assert (new == word) == (word not in {*GOOD, *BAD, *PLAIN})
            assert new in {*GOOD, *BAD, *PLAIN, *"abcdefghijklmnopqrstuvwxyz"} or new == word


def test_other_rows_and_their_order_change_no_copy(make: Any, runs: Path, tmp_path: Path) -> None:
    fitting.load_corpus(make({}))
    few = {(line["of"], line["copy"]): line["text"] for line in lines(runs)}
    (runs / "_augmented").rename(runs / "_few")
    write_csv(tmp_path / "reviews.csv", [*documents(160)[::-1], *documents(40, seed=9)])
    fitting.load_corpus(make({}))
    many = {(line["of"], line["copy"]): line["text"] for line in lines(runs)}
    shared = few.keys() & many.keys()
    assert len(shared) > 40
    assert few.keys() != many.keys()
    assert {key: few[key] for key in shared} == {key: many[key] for key in shared}


def test_copies_are_made_once_and_the_same_again(
    make: Any, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fitting.load_corpus(make({}))
    (path,) = (runs / "_augmented").iterdir()
    was = path.read_bytes()
    path.unlink()
    assert fitting.load_corpus(make({})).fingerprint == first.fingerprint
    assert path.read_bytes() == was
    monkeypatch.setattr(augmentation, "vary", None)
    again = fitting.load_corpus(make({"weight": 2.0}))
    assert (again.fingerprint, len(copies(again))) == (first.fingerprint, len(copies(first)))
    with pytest.raises(TypeError):
        fitting.load_corpus(make({"seed": 1}))


def test_damaged_and_half_written_copies_are_made_again(make: Any, runs: Path) -> None:
    first = fitting.load_corpus(make({}))
    (path,) = (runs / "_augmented").iterdir()
    was = path.read_bytes()
    path.write_bytes(was.replace(b"film", b"evil", 1))
    (path.parent / f".{path.stem}.part.1234.tmp").write_text("half")
    assert fitting.load_corpus(make({})).fingerprint == first.fingerprint
    assert [(one, one.read_bytes()) for one in path.parent.iterdir()] == [(path, was)]


def test_pairs_have_copies_of_both_texts_and_of_none_that_is_blank(
    make: Any, tmp_path: Path, runs: Path
) -> None:
    rows = [(text, " ".join(text.split()[:3]), label) for text, label in documents(160)]
    write_csv(tmp_path / "reviews.csv", rows, header=("text", "other", "label"))
    pairs = {"data.text_pair": "other", "teacher.view": "head", "student.view": "head"}
    corpus = fitting.load_corpus(make({**NONE, "delete": 0.6}, **pairs))
    made = corpus.splits["transfer"].texts()[60:]
    assert all(text.strip() and pair and pair.strip() for text, pair in made)
    blank = sum(not (line["text"] and line["text_pair"]) for line in lines(runs))
    assert blank > 0
    assert len(made) <= 4 * 50 - blank
    assert f"{blank} documents left out: blank" in " ".join(corpus.notes)


def test_filters_of_the_source_are_not_for_its_copies(make: Any) -> None:
    ngrams = {**NONE, "ngram": 1.0}
    corpus = fitting.load_corpus(make(ngrams, **{"data.min_words": 4, "data.blank": "refuse"}))
    assert max(len(text.split()) for text in copies(corpus)) <= 5
    assert min(len(text.split()) for text in copies(corpus)) == 1


def test_unlabelled_rows_can_be_copied(make: Any) -> None:
    corpus = fitting.load_corpus(make({"from": ["transfer"], "copies": 1}))
    own = {word for text, _ in data.load(make({})).splits["transfer"].texts() for word in text.split()}
    numbers = {word for text in copies(corpus) for word in text.split() if re.fullmatch(r"n\d+", word)}
    assert numbers
    assert numbers <= own
    with pytest.raises(RecipeError, match=r"data.augment.from: the recipe has no transfer rows"):
        fitting.load_corpus(make({"from": ["transfer"]}, **{"data.splits.transfer": None}))


def test_the_teachers_table_goes_before_the_students(make: Any, checkpoint: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {**NONE, "replace": 1.0, "checkpoint": None}
    recipe = make(
        chosen, **{"teacher.checkpoint": str(checkpoint), "student.checkpoint": str(tmp_path / "no")}
    )
    named = make({**chosen, "checkpoint": str(checkpoint)})
    assert copies(fitting.load_corpus(recipe)) == copies(fitting.load_corpus(named))
    only = make(chosen, **{"student.checkpoint": str(checkpoint)})
    assert copies(fitting.load_corpus(only)) == copies(fitting.load_corpus(named))


def test_without_replacement_no_checkpoint_is_asked_for(make: Any) -> None:
    assert copies(fitting.load_corpus(make({"checkpoint": None, "replace": 0.0})))


@pytest.mark.parametrize(
    ("augment", "changes", "said"),
    [
        ({"delete": 1.5}, {}, "data.augment.delete: must be less than or equal to 1, not 1.5"),
        ({"replace": -0.1}, {}, "data.augment.replace: must be greater than or equal to 0, not -0.1"),
        ({"ngram": 2.0}, {}, "data.augment.ngram: must be less than or equal to 1, not 2.0"),
        ({"delete": 0.6, "replace": 0.6}, {}, "data.augment: delete and replace are shares of the same words"),
        (NONE, {}, "data.augment: delete, replace and ngram are all 0"),
        ({"from": ["test"]}, {}, "data.augment.from.0: must be 'train' or 'transfer', not 'test'"),
        ({"from": ["train", "train"]}, {}, "data.augment: from holds 'train' twice"),
        ({"copys": 3}, {}, "unknown key data.augment.copys; did you mean 'copies'?"),
        ({}, {"student.losses": [{"kind": "hard"}]}, "data.augment: its copies have no labels, and every term"),
        ({"checkpoint": None}, {}, "data.augment.replace: a checkpoint's embeddings say which words are near, and"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_when_the_recipe_is_read(
    make: Any, augment: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=f"^recipe.yaml: {re.escape(said)}") as caught:
        make(augment, **changes)
    assert "\n" not in str(caught.value)


def test_copies_of_which_none_is_new_are_refused(make: Any) -> None:
    with pytest.raises(
        DataError, match=r"jsonl: every one of its 50 documents stands in test, validation, tr"
    ):
        fitting.load_corpus(make({**NONE, "delete": 1e-9}))


def test_the_student_learns_from_copies_and_its_control_does_not(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "sync", lambda folder: None)
    monkeypatch.setattr(training, "release_memory", lambda: None)
    recipe = make({"copies": 2}, **{"student.train.batch_size": 32})
    corpus = fitting.load_corpus(recipe)
    stages.train_teacher(recipe, "tiny", "t")
    drawn: dict[bool, set[int]] = {}
    real = training._step

    def step(
        wrapped: Any, model: Any, part: Any, documents: Any, lengths: Any, objective: Any, *rest: Any
    ) -> Any:
        drawn.setdefault(objective.needs_teacher, set()).update(part.row_id[documents].tolist())
        return real(wrapped, model, part, documents, lengths, objective, *rest)

    monkeypatch.setattr(training, "_step", step)
    stages.train_students(stages.StudentJob(["t"], recipe.dump(), "tiny", "bert_miniature", "s", 1, control=True))  # fmt: skip
    labelled, unlabelled = (set(corpus.splits[n].row_id.tolist()) for n in ("train", "transfer"))
    assert drawn == {True: labelled | unlabelled, False: labelled}
    assert len({find(name).read().facts["data"] for name in ("t", "s", "s-control", "s-tfidf")}) == 1
    monkeypatch.setattr(logits, "fill", None)
    cache = caching.cache_logits(caching.find_teacher("t"), recipe, corpus)
    cache.require(corpus.splits["transfer"].row_id)


def test_pre_training_reads_no_copies(make: Any) -> None:
    rows, _ = pretraining.read(make({}))
    own = data.load(make({})).splits
    assert set(rows.row_id.tolist()) == {*own["train"].row_id.tolist(), *own["transfer"].row_id.tolist()}


def test_a_dry_run_counts_copies(recipe_file: Write, checkpoint: Path, runs: Path) -> None:
    path = str(recipe_file({"data.augment": {"checkpoint": str(checkpoint)}}))
    done = distill("teacher", "--recipe", path, "--dry-run")
    assert done.returncode == 0, done.stderr
    found = re.search(r"transfer: (\d+) augmented copies of 50 documents of train", done.stderr)
    assert found is not None, done.stderr
    assert re.search(rf"^transfer +{60 + int(found[1])} ", done.stdout, re.MULTILINE)
    assert Path(re.findall(r"\S+\.jsonl", done.stderr)[0]).parent == runs / "_augmented"
