"""Answers in a text: SQuAD's figures, units and windows, pooling and losses by formula, cache, refusals, the whole path."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import BAD, GOOD, PLAIN, TINY, distill
from safetensors.numpy import load_file
from scipy import special
from torch import Tensor

from distill import (
    catalog,
    comparison,
    data,
    gate,
    logits,
    losses,
    models,
    pooling,
    prediction,
    report,
    spans,
    stages,
    sweep,
)
from distill import recipe as recipes
from distill.batching import collate
from distill.data import Rows
from distill.encoding import Encoded, concatenate, encode, encode_texts
from distill.errors import DataError, DistillError, LogitsError, RecipeError, UsageError
from distill.evaluation import agreement
from distill.inference import predict, predict_all
from distill.models import Classifier
from distill.runs import find
from distill.schema import Cache, Model
from distill.spans import Truth
from distill.stages import StudentJob
from distill.tasks import UNREAD, TaskSpec, probabilities, quality

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

TASK = TaskSpec("span", ("start", "end"), "f1")
TEXT = "The Beyoncé's show (1895-96) was, in a word, good..."


def reading(max_length: int = 24, overlap: int = 4, **more: Any) -> Model:
    return Model(architecture="any", view="chunks", max_length=max_length, overlap=overlap, **more)


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request: Any, tokenizer_folder: Path, roberta_tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    folder = tokenizer_folder if request.param == "wordpiece" else roberta_tokenizer_folder
    return AutoTokenizer.from_pretrained(folder)


def contexts(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(PLAIN, int(rng.integers(8, longest)))) + f" n{n}" for n in range(count)]


# Figures


@pytest.mark.parametrize(
    ("given", "right", "exact", "f1"),
    [
        ("The Beatles!", ["beatles"], 1, 1),
        ("the cat's hat", ["cats hat"], 1, 1),
        ("a theatre", ["theatre"], 1, 1),
        ("big red dog", ["red dog", "dog"], 0, 0.8),
        ("dog dog", ["dog"], 0, 2 / 3),
        ("cat", ["dog"], 0, 0),
        ("", ["dog"], 0, 0),
        ("", [], 1, 1),
        ("dog", [], 0, 0),
        ("dog", ["the", "dog"], 1, 1),
        ("", ["the"], 1, 1),
    ],
)
def test_figures_are_squads_by_hand(given: str, right: list[str], exact: float, f1: float) -> None:
    span = [1, len(spans.units(given))] if given else [0, 0]
    found = spans.figures(np.array([span]), [Truth(given or "dog", right)])
    assert found == pytest.approx({"exact_match": exact, "f1": f1})


def test_figures_of_several_rows_are_their_mean() -> None:
    truth = np.array([Truth("a good film", ["good"]), Truth("a good film", ["good film"])])
    found = np.full((2, 4, 2), -9.0, np.float32)
    found[:, 2, 0] = found[:, 2, 1] = 9.0
    assert quality("span", found, truth) == pytest.approx({"exact_match": 0.5, "f1": (1 + 2 / 3) / 2})


def test_the_best_span_is_that_of_every_pair_tried() -> None:
    rng = np.random.default_rng(0)
    found = rng.normal(size=(200, 45, 2)).astype(np.float32)
    found[:100, 0] += 2
    for row, span in zip(found, spans.best(found), strict=True):
        pairs = [(i, j) for i in range(1, 45) for j in range(i, min(45, i + spans.LONGEST))] + [(0, 0)]
        assert tuple(span) == max(pairs, key=lambda pair: row[pair[0], 0] + row[pair[1], 1])


def test_agreement_asks_for_both_ends() -> None:
    mine, theirs = np.zeros((2, 5, 2), np.float32), np.zeros((2, 5, 2), np.float32)
    mine[:, 2], theirs[:, 2, 0], theirs[:, 3, 1], theirs[1, 2, 1] = 5, 5, 5, 6
    assert agreement("span", mine, theirs) == 0.5


# Units and windows


def test_units_are_words_and_single_signs() -> None:
    found = [TEXT[a:b] for a, b in spans.units(TEXT)]
    assert found == "The Beyoncé ' s show ( 1895 - 96 ) was , in a word , good . . .".split()
    assert spans.place(TEXT, (2, 2)) == (4, 11)
    assert spans.place(TEXT, (0, 0)) is None
    assert spans.units("  ").shape == (0, 2)


def test_a_stretch_touches_the_units_that_it_has_a_character_of() -> None:
    bounds = spans.units("ab cd!")
    starts, ends = np.array([0, 1, 2, 1, 5, 3]), np.array([2, 4, 3, 6, 6, 3])
    assert spans.touched(bounds, starts, ends).tolist() == [
        [1, 1],
        [1, 2],
        [-1, -1],
        [1, 3],
        [3, 3],
        [-1, -1],
    ]


def test_every_unit_can_begin_or_end_an_answer_whatever_the_tokenizer(tokenizer: Any) -> None:
    found = encode_texts(tokenizer, [[("was it good", TEXT)]], reading(128), span=True)
    assert found.unit_of is not None
    count = len(spans.units(TEXT))
    assert set(found.unit_of[:, 0]) | set(found.unit_of[:, 1]) == set(range(-1, count + 1))
    assert found.unit_of[0].tolist() == [0, 0]
    read = tokenizer.decode(found.token_ids[(found.unit_of[:, 0] == 2)])
    assert read.strip().lower().startswith("be")


def test_windows_stand_behind_their_question_and_overlap(tokenizer: Any) -> None:
    question, context = "was it good", " ".join(PLAIN * 3)
    model = reading(24, 5, max_windows=20)
    found = encode_texts(tokenizer, [[(question, context)]], model, span=True)
    assert found.unit_of is not None
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    whole = tokenizer(question, context)
    segments = whole.get("token_type_ids") or [0] * len(whole["input_ids"])
    parts = list(zip(found.windows[:-1], found.windows[1:], strict=True))
    assert len(parts) > 2
    told: list[int] = []
    for number, (start, end) in enumerate(parts):
        assert end - start <= 24
        assert found.token_ids[start + 1 : start + 1 + len(asked)].tolist() == asked
        own = found.unit_of[start:end]
        assert own[0].tolist() == [0, 0]
        text = np.flatnonzero(own[:, 0] > 0) + start
        assert set(found.segments[text]) == {max(segments)}
        ids = found.token_ids[text].tolist()
        if number:
            assert told[-5:] == ids[:5]
        told += ids[5:] if number else ids
    assert told == tokenizer(context, add_special_tokens=False)["input_ids"]


def rows_of(texts: list[tuple[str, str]], labels: Any) -> Rows:
    import datasets

    columns = {"text": [q for q, _ in texts], "text_pair": [c for _, c in texts]}
    count = len(texts)
    return Rows(
        "train", datasets.Dataset.from_dict(columns), np.arange(count), labels, np.ones(count, np.int32)
    )


def test_what_is_cut_is_told_and_an_answer_out_of_reach_is_no_label(tokenizer: Any) -> None:
    long = " ".join(PLAIN * 3)
    texts = [("was it good", long), (" ".join(GOOD * 2), "the film"), ("was it good", long)]
    rows = rows_of(texts, np.array([[40, 41], [1, 2], [0, 0]]))
    notes: list[str] = []
    found = encode(tokenizer, rows, reading(24, 0, max_windows=1), span=True, notes=notes)
    assert found.labelled.tolist() == [False, True, True]
    assert notes == [
        "1 of 3 questions are cut to a third of max_length (8 tokens)",
        "1 of 3 answers stand where no window reaches",
    ]
    both = concatenate([found, found])
    assert both.units is not None
    assert both.units.tolist() == [len(PLAIN) * 3 + 1, 3, len(PLAIN) * 3 + 1] * 2
    assert both.labels.shape == (6, 2)


# Pooling and losses by formula


def pooled_by_hand(tokens: np.ndarray, encoded: Encoded, width: int) -> np.ndarray:
    """Probability sums, token by token: the mean over windows of the sum over a unit's tokens."""
    assert encoded.unit_of is not None
    result = np.full((len(encoded), width, 2), UNREAD)
    for document in range(len(encoded)):
        held: dict[tuple[int, int], list[float]] = {}
        for window in range(encoded.documents[document], encoded.documents[document + 1]):
            sums: dict[tuple[int, int], float] = {}
            for token in range(encoded.windows[window], encoded.windows[window + 1]):
                for column in (0, 1):
                    key = (int(encoded.unit_of[token, column]), column)
                    sums[key] = sums.get(key, 0.0) + np.exp(tokens[token, column])
            for key, value in sums.items():
                held.setdefault(key, []).append(value)
        for (unit, column), values in held.items():
            if unit >= 0:
                result[document, unit, column] = np.log(np.mean(values))
    return result


def test_pooling_is_the_formula_and_its_gradient(tokenizer: Any) -> None:
    texts = [("was it good", c) for c in [*contexts(3), TEXT]]
    found = encode_texts(tokenizer, [texts], reading(24, 5, max_windows=3), span=True)
    batch = collate(found, range(len(texts)))
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(len(found.token_ids), 2)) * 3
    got = pooling.by_unit(torch.from_numpy(tokens), batch)
    np.testing.assert_allclose(got.numpy(), pooled_by_hand(tokens, found, batch.units), rtol=1e-12)
    assert (got == UNREAD).any(), "three windows do not hold all"
    shift = pooling.by_unit(torch.from_numpy(tokens + 700.0), batch)
    read = got != UNREAD
    torch.testing.assert_close(shift[read], got[read] + 700.0)
    one = collate(found, [3])
    start = int(found.windows[found.documents[3]])
    asked = torch.from_numpy(tokens[start:]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pooling.by_unit(x, one), (asked,))


def test_losses_are_the_formulas() -> None:
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 4, 6, 2)) * 2
    student[1, 4:], teacher[1, 4:] = UNREAD, UNREAD  # a shorter document
    student[2, 3] = UNREAD  # a unit that the student has not read
    labels = np.array([[0, 0], [1, 3], [2, 2], [4, 5]])
    log_q = special.log_softmax(student, axis=1)
    hard = -(log_q[range(4), labels[:, 0], 0] + log_q[range(4), labels[:, 1], 1]) / 2
    got = losses.hard("span", torch.from_numpy(student), torch.from_numpy(labels))
    np.testing.assert_allclose(got.numpy(), hard)
    temperature, wanted = 2.5, np.zeros(4)
    for row in range(4):
        for column in (0, 1):
            read = student[row, :, column] != UNREAD
            p, q = (special.softmax(x[row, read, column] / temperature) for x in (teacher, student))
            known = p > 0
            wanted[row] += temperature**2 * np.sum(p[known] * np.log(p[known] / q[known])) / 2
    got = losses.soft("span", torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    np.testing.assert_allclose(got.numpy(), wanted)


def test_gradients_of_the_losses_are_right_and_none_flows_to_what_was_not_read() -> None:
    rng = np.random.default_rng(2)
    student, teacher = (torch.from_numpy(x) for x in rng.normal(size=(2, 2, 4, 2)))
    labels = torch.tensor([[1, 2], [0, 0]])
    teacher[1, 3] = UNREAD
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.soft("span", s, teacher, 2.0), (student,))
    assert torch.autograd.gradcheck(lambda s: losses.hard("span", s, labels), (student,))
    unread = student.detach().clone()
    unread[0, 3] = UNREAD
    unread.requires_grad_()
    (slope,) = torch.autograd.grad(losses.soft("span", unread, teacher, 2.0).sum(), unread)
    assert torch.isfinite(slope).all()
    assert (slope[0, 3] == 0).all()


# Architectures: our logits are those of transformers' own class that reads the folder

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bigbird": {"section": "teacher", "block_size": 4, "random_blocks": 1, "config": TINY},
    "longformer": {"section": "teacher", "window": [4, 8], "config": TINY},
    "roberta": {"section": "teacher", "config": TINY},
    "bert": {"section": "teacher", "config": TINY},
    "bert_miniature": {"section": "student", "checkpoint": None, "config": TINY},
    "distilbert": {"section": "student", "checkpoint": None, "config": {"n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 64}},
    "fnet": {"section": "student", "checkpoint": None, "transform": "max_length", "config": {"num_hidden_layers": 2, "hidden_size": 30, "intermediate_size": 64}},
    "teacher_layers": {"section": "student", "layers": [1, 0]},
    "auto": {"section": "student"},
    "fnet_from_bert": {"section": "student"},
}  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., Classifier]:
    """Build a tiny finder of spans of an architecture, in evaluation mode."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    pretrained = tmp_path_factory.mktemp("pretrained")
    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(5)
    BertModel(BertConfig(**TINY, vocab_size=len(words))).save_pretrained(pretrained)
    words.save_pretrained(pretrained)
    cut_from = tmp_path_factory.mktemp("teacher") / "model"

    def build(architecture: str, seed: int = 0, **fields: Any) -> Classifier:
        values = {"max_length": 64, "overlap": 8, **ARCHITECTURES[architecture], **fields}
        section = values.pop("section")
        if architecture in ("auto", "fnet_from_bert"):
            values["checkpoint"] = str(pretrained)
        elif architecture != "teacher_layers":
            values.setdefault("tokenizer", str(tokenizer_folder))
        elif not cut_from.exists():
            build("bigbird", 7).save(cut_from)
        config = catalog.load(section, architecture).Config.model_validate(
            {"architecture": architecture, "view": "chunks", **values}
        )
        model = models.build(config, section, TASK, seed, cut_from).eval()
        with torch.no_grad():  # attention is then far from uniform, and a leak shows
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and "embeddings" not in name:
                    weight.mul_(6)
        return model

    return build


Make = Callable[..., Classifier]


def token_logits(model: Classifier, batch: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model._forward(model.model, model.config, batch)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_is_read_by_transformers_and_says_the_same_of_each_token(
    architecture: str, make: Make, tmp_path: Path, roberta_tokenizer_folder: Path
) -> None:
    from transformers import AutoModelForQuestionAnswering

    question = "was it good"
    own: dict[str, Any] = {}
    if (
        architecture == "longformer"
    ):  # stock makes all of the question global, and wants RoBERTa's three separators
        words = models.load_tokenizer(
            Model(architecture="any", tokenizer=str(roberta_tokenizer_folder)), "teacher"
        )
        own = {"global_tokens": 1 + len(words(question, add_special_tokens=False)["input_ids"])}
        own |= {"tokenizer": str(roberta_tokenizer_folder), "max_length": 128}
    model = make(architecture, **own)
    model.save(tmp_path / "model")
    stock, info = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    stock.eval()
    texts = [(question, c) for c in contexts(4, longest=24)]
    found = encode_texts(model.tokenizer, [texts], model.config, span=True)
    ours = token_logits(model, collate(found, range(4)))
    for at in range(4):
        window = slice(found.windows[at], found.windows[at + 1])
        ids = torch.from_numpy(found.token_ids[window].astype(np.int64))[None]
        kinds = torch.from_numpy(found.segments[window].astype(np.int64))[None]
        arguments: dict[str, Any] = {"input_ids": ids}
        if getattr(stock.config, "type_vocab_size", 0) > 1:
            arguments["token_type_ids"] = kinds
        if architecture == "fnet":
            short = 64 - ids.shape[1]
            pads = (("input_ids", stock.config.pad_token_id), ("token_type_ids", 0))
            arguments |= {n: torch.nn.functional.pad(arguments[n], (0, short), value=v) for n, v in pads}
        with torch.no_grad():
            theirs = stock(**arguments)
        assert found.unit_of is not None
        context = found.unit_of[window, 0] >= 0
        wanted = torch.stack([theirs.start_logits, theirs.end_logits], 2)[0, : ids.shape[1]]
        torch.testing.assert_close(ours[window][context], wanted[context], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_documents_logits_do_not_depend_on_its_batch_and_every_trained_weight_has_a_gradient(
    architecture: str, make: Make
) -> None:
    model = make(architecture)
    texts = [("was it good", c) for c in contexts(6, longest=90)]
    found = encode_texts(model.tokenizer, [texts], model.config, span=True)
    assert max(found.window_counts) > 1
    together = predict(model, found, np.arange(6), 1 << 14, "fp32")
    for at in range(6):
        alone = predict(model, found, np.array([at]), 1 << 14, "fp32")
        np.testing.assert_allclose(alone, together[[at], : alone.shape[1]], atol=1e-4)
        assert (together[at, alone.shape[1] :] == UNREAD).all()
    model.train()
    model(collate(found, range(6)))[:, 1:5].sum().backward()
    lost = [n for n, p in model.model.named_parameters() if p.requires_grad and p.grad is None]
    assert [n for n in lost if "pooler" not in n] == []


def test_processes_add_up_to_what_one_computes(make: Make) -> None:
    model = make("bert")
    texts: list[tuple[str, str | None]] = [("was it good", c) for c in contexts(7, longest=90)]
    found = encode_texts(model.tokenizer, [texts], model.config, span=True)
    parts: list[Tensor] = []

    class Rank:
        num_processes, device, is_fsdp2 = 2, torch.device("cpu"), False

        def __init__(self, number: int) -> None:
            self.process_index = number

        def reduce(self, own: Tensor, how: str) -> Tensor:
            parts.append(own)
            return own

    for rank in (0, 1):
        predict_all(model, found, 1 << 14, "fp32", Rank(rank))
    alone = predict(model, found, np.arange(7), 1 << 14, "fp32")
    np.testing.assert_allclose(sum(parts), alone, atol=1e-4)


def test_two_models_of_unlike_tokenizers_say_the_same_units(
    make: Make, tokenizer_folder: Path, roberta_tokenizer_folder: Path
) -> None:
    texts: list[tuple[str, str | None]] = [("was it good", c) for c in [*contexts(3), TEXT]]
    one, other = make("bert"), make("roberta", tokenizer=str(roberta_tokenizer_folder))
    shapes = {models.TextReader(model).logits(texts).shape for model in (one, other)}
    assert shapes == {(4, max(len(spans.units(str(c))) for _, c in texts) + 1, 2)}


# The cache


def test_a_cache_of_spans_holds_each_unit_once_and_gives_it_back(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill import inference

    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    model = make("bert")
    texts = [("was it good", c) for c in contexts(12, longest=70)]
    found = encode_texts(model.tokenizer, [texts], model.config, span=True)
    found = Encoded(**{**vars(found), "row_id": np.arange(12) * 7 + 3})
    settings = Cache.model_validate({"rows_per_shard": 5, "precision": "fp32", "dtype": "float16"})
    key = logits.key_of(model, "fp32", "float16")
    folder = logits.folder_of(key)
    logits.fill(folder, key, model, found, settings, inference.make_accelerator("fp32"), "caching")
    assert gate.check_invariance(folder, key, model, found) < 0.01
    logits.write_manifest(folder, {})
    cache = logits.Logits(folder, key)
    asked = np.array([5, 0, 11])
    wanted = predict(model, found, asked, 1 << 14, "fp32")
    np.testing.assert_allclose(cache(found.row_id[asked]), wanted, rtol=2e-3, atol=2e-3)
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    assert found.units is not None
    assert sum(len(shard["logits"]) for shard in shards) == found.units.sum()
    assert logits.verify(folder) == 12
    two = logits.mean("span", [wanted, wanted + 1], "mean_log_probs")
    np.testing.assert_allclose(probabilities("span", two), probabilities("span", wanted), atol=1e-5)


def test_a_cache_of_classes_is_what_it_was(tokenizer_folder: Path, tmp_path: Path) -> None:
    config = catalog.load("teacher", "bert").Config.model_validate(
        {"architecture": "bert", "tokenizer": str(tokenizer_folder), "config": TINY}
    )
    model = models.build(config, "teacher", TaskSpec("single_label", ("bad", "good"), "accuracy"), 0)
    assert sorted(logits.key_of(model, "fp32", "float32")) == sorted(
        "format weights config tokenizer reading precision dtype kind labels".split()
    )
    shard = logits.write_shard(tmp_path, np.arange(3), np.ones((3, 2), np.float32), "float32")
    assert {name: array.shape for name, array in load_file(shard).items()} == {
        "row_id": (3,),
        "logits": (3, 2),
    }


# Rows


def answer(context: str, text: str, at: int | None = None) -> dict[str, Any]:
    return {"text": [text], "answer_start": [context.index(text) if at is None else at]}


def mood_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A text in which one word says whether it is good; every sixth has none."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        words = [str(word) for word in rng.choice(PLAIN, int(rng.integers(8, 30)))]
        at, none = int(rng.integers(len(words))), number % 6 == 0
        if not none:
            words[at] = str(rng.choice([*GOOD, *BAD]))
        context = " ".join(words) + f" {number}"
        start = len(" ".join([*words[:at], ""]))
        found = {"text": [], "answer_start": []} if none else {"text": [words[at]], "answer_start": [start]}
        rows.append({"question": "was it good", "context": context, "answers": found})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SPAN = {
    "data.text": "question", "data.text_pair": "context", "data.label": "answers", "task": {"kind": "span"},
    "teacher.view": "chunks", "student.view": "chunks", "student.max_length": 24, "student.overlap": 4,
}  # fmt: skip


@pytest.fixture
def span_recipe(recipe_file: Any, tmp_path: Path) -> Callable[..., Path]:
    def write(changes: dict[str, Any] | None = None, rows: list[dict[str, Any]] | None = None) -> Path:
        source = write_jsonl(tmp_path / "squad.jsonl", rows or mood_rows(160))
        path: Path = recipe_file({**copy.deepcopy(SPAN), "data.source": str(source), **(changes or {})})
        return path

    return write


def test_rows_have_units_and_all_their_answers(span_recipe: Any) -> None:
    rows = mood_rows(160)
    rows[1]["answers"]["text"].append(rows[1]["context"].split()[0])
    rows[1]["answers"]["answer_start"].append(0)
    corpus = data.load(recipes.load(str(span_recipe(rows=rows))))
    assert corpus.task == TASK
    assert corpus.splits["transfer"].truth is None
    known = {row["context"]: row for row in rows}
    seen = 0
    for name in ("train", "validation", "test"):
        part = corpus.splits[name]
        assert part.truth is not None
        assert part.labels is not None
        assert data.describe(part, corpus.task)["labels"]["no answer"] == (part.labels[:, 0] == 0).sum()
        for truth, label in zip(part.truth, part.labels, strict=True):
            answers = known[truth.context]["answers"]
            assert list(truth.answers) == answers["text"]
            place = spans.place(truth.context, label)
            assert (place is None) == (not answers["text"])
            if place is not None:
                assert place == (
                    answers["answer_start"][0],
                    answers["answer_start"][0] + len(answers["text"][0]),
                )
            seen += 1
    assert seen == 100
    rows[1]["answers"]["text"][1] = rows[1]["context"].split()[0][:1]
    again = data.load(recipes.load(str(span_recipe(rows=rows))))
    in_transfer = rows[1]["context"] in corpus.splits["transfer"].dataset["text_pair"]
    assert (again.fingerprint == corpus.fingerprint) == in_transfer


CONTEXT = "a film that is good and is long"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (answer(CONTEXT, "good", 14), "row 3: the answer 'good' is not at character 14 of its context; it first stands at 15"),
        ({"text": ["bad"], "answer_start": [0]}, "row 3: the answer 'bad' is not at character 0 of its context; it stands nowhere"),
        ({"text": ["good"], "answer_start": [-16]}, "row 3: the answer 'good' is not at character -16"),
        ({"text": [" "], "answer_start": [1]}, "row 3: the answer ' ' has no text; where there is none, leave the lists empty"),
        ({"text": ["a", "film"], "answer_start": [0]}, "row 3: .* holds no answers; must be as"),
        (None, "row 3: the answers are missing"),
    ],
)  # fmt: skip
def test_answers_that_do_not_stand_there_are_refused(cell: Any, message: str, span_recipe: Any) -> None:
    rows = mood_rows(160)
    rows[2] = {"question": "was it good", "context": CONTEXT, "answers": cell}
    with pytest.raises(DataError, match=message):
        data.load(recipes.load(str(span_recipe(rows=rows))))


def test_a_label_that_is_no_answer_is_refused(span_recipe: Any) -> None:
    rows = [{**row, "answers": "good"} for row in mood_rows(20)]
    with pytest.raises(DataError, match="'good' holds no answers; must be as"):
        data.load(recipes.load(str(span_recipe(rows=rows))))


def test_a_wrong_answer_is_one_line_and_exit_code_4(span_recipe: Any, runs: Path) -> None:
    rows = mood_rows(160)
    rows[11]["answers"] = {"text": ["film"], "answer_start": [1000]}
    done = distill("teacher", "--recipe", str(span_recipe(rows=rows)), DISTILL_RUNS=str(runs))
    assert done.returncode == 4
    assert "row 12: the answer 'film' is not at character 1000 of its context" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(runs.glob("run*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.text_pair": None}, "set data.text=question and data.text_pair=context"),
        ({"data.augment": {}}, "data.augment leaves words out"),
        ({"teacher.view": "head"}, "teacher.view: head would not read all"),
        ({"student.view": "head_tail"}, "student.view: head_tail would not read all"),
        ({"student.overlap": 8}, "student.overlap: must be less than a third of max_length"),
        ({"student.max_length": 12, "student.overlap": 0}, "that 16 or more"),
        ({"student.engine": "stock"}, "engine: stock finds no spans"),
        ({"student.train.label_smoothing": 0.1}, "label_smoothing has no meaning for task.kind: span"),
        ({"student.calibrate": True}, "student.calibrate has no meaning for task.kind: span"),
        ({"task.class_weights": "balanced"}, "class_weights has no meaning for kind: span"),
        ({"task.thresholds": "fitted"}, "needs kind: multi_label, not span"),
        ({"task.labels": ["a", "b"]}, "labels has no meaning for kind: span"),
        ({"task.metric": "accuracy"}, "span has no metric 'accuracy'"),
        ({"task.metric": "exact_mach"}, "did you mean 'exact_match'"),
        ({"student": {"architecture": "tfidf", "view": "chunks"}}, "tfidf finds no spans"),
        *(
            ({"student.losses": [{"kind": kind}]}, rf"losses.0: {kind} is not for task.kind: span")
            for kind in ("dkd", "mse_logits", "cosine", "hidden_mse", "relation", "attention")
        ),
    ],
)
def test_what_has_no_meaning_for_spans_is_refused(changes: Any, message: str, span_recipe: Any) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(str(span_recipe(changes)))


def test_a_checkpoint_without_a_head_for_spans_is_refused(make: Make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PatchTSTConfig

    PatchTSTConfig().save_pretrained(tmp_path / "odd")
    AutoTokenizer.from_pretrained(make("bert").config.tokenizer).save_pretrained(tmp_path / "odd")
    config = catalog.load("student", "auto").Config(
        architecture="auto", checkpoint=str(tmp_path / "odd"), view="chunks"
    )
    with pytest.raises(DistillError, match="has no finder of answers for"):
        models.build(config, "student", TASK, 0)


# The whole path


def test_a_teacher_teaches_a_student_that_answers(
    span_recipe: Any, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from distill import tracking

    monkeypatch.setattr(tracking, "sync", lambda folder: None)
    train = {
        "epochs": 12.0,
        "batch_size": 8,
        "tokens_per_batch": 1024,
        "learning_rate": 0.003,
        "precision": "fp32",
    }
    rows = mood_rows(220)
    path = span_recipe(
        {"teacher.train": train, "student.train": {**train, "epochs": 4.0}, "cache.precision": "fp32"}, rows
    )
    recipe = recipes.load(str(path))
    teacher = stages.train_teacher(recipe, "spans", "t")
    assert teacher.metrics()["test"]["exact_match"] > 0.8
    job = StudentJob(["t"], recipe.dump(), "spans", "bert_miniature", "s", seeds=1, control=True)
    student, control = stages.train_students(job)
    assert (student.name, control.name) == ("s", "s-control")
    assert student.metrics()["test"]["f1"] > 0.6
    found = comparison.compare(comparison.collect(["s"]))
    assert {row.role for row in found.rows} == {"teacher", "distilled", "control"}
    for row in found.rows:
        assert set(row.figures) == {"f1", "exact_match"}
        assert set(row.buckets) == {"0-99"}
    assert "There is no baseline for spans: TF-IDF finds none." in found.notes
    heads = [str(column.header).replace("\n", " ") for column in report.table(found).columns]
    assert heads[1:3] == ["f1", "exact_match"]
    assert not (runs / "s" / "suspects.json").exists()

    new = mood_rows(12, seed=9)
    file = write_jsonl(tmp_path / "new.jsonl", new)
    prediction.predict(find("s"), file, "question", "context", None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12
    for line, asked in zip(lines, new, strict=True):
        assert set(line) == {"answer", "start", "end", "score"}
        assert 0 <= line["score"] <= 1
        assert line["answer"] == (
            "" if line["start"] is None else asked["context"][line["start"] : line["end"]]
        )
    right = [line["answer"] in (row["answers"]["text"] or [""]) for line, row in zip(lines, new, strict=True)]
    assert sum(right) >= 7
    with pytest.raises(UsageError, match="add --text and --text-pair"):
        prediction.predict(find("s"), file, "question", None, None)


def test_a_hybrid_has_no_head_for_spans(make: Make) -> None:
    with pytest.raises(RecipeError, match="attention_layers: the hybrid has no head that finds spans"):
        make("fnet_from_bert", attention_layers=1)


def test_a_search_over_spans_trains_no_baseline(monkeypatch: pytest.MonkeyPatch, span_recipe: Any) -> None:
    from distill import search

    found = sweep.combinations(str(span_recipe()), [], ["bert_tiny"], {}, "g", control=True)
    parts = [sweep.part(one, "r", ["t"], "g", 1) for one in found]
    trained: list[Any] = []
    monkeypatch.setattr(sweep, "run", lambda parts, corpus: trained.extend(parts))
    asked = search.Search("r", "r", [], [], {}, ["t"], "g", trials=1, seeds=1, control=True)
    search.run(asked, cast("Any", None), parts)
    assert trained == []


def test_a_sweep_of_spans_has_no_baseline(span_recipe: Any) -> None:
    found = sweep.combinations(str(span_recipe()), [], ["bert_tiny"], {}, "g", control=True)
    assert [one.role for one in found] == ["distilled", "control"]


@pytest.mark.parametrize("kind", ["single_label", "regression"])
def test_a_teacher_of_another_kind_is_refused(kind: Any) -> None:
    with pytest.raises(LogitsError, match=f"t is of task.kind: {kind}, and the recipe of task.kind: span"):
        gate.check_kind(kind, "span", "t")
    gate.check_kind(kind, "single_label", "t")


def test_a_reader_from_elsewhere_can_teach(make: Make, tmp_path: Path) -> None:
    model = make("bert")
    model.save(tmp_path / "model")
    (tmp_path / "model" / models.ABOUT).unlink()
    again = models.load(tmp_path / "model")
    assert again.task == TASK
    assert (again.config.view, again.config.architecture) == ("chunks", "bert")
