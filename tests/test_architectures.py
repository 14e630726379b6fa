"""Every architecture: built tiny, read alone and in company, lengthened, saved, and read by others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, documents
from torch import Tensor

from distill import attention, catalog, flex, models, pretrained
from distill.attention import Layout
from distill.batching import Batch, collate, micro_batches
from distill.encoding import Encoded
from distill.errors import DataError, RecipeError
from distill.models import Classifier, weights_hash
from distill.packed import Taps
from distill.rules import Blocks, BlockSparse, Full, Rule, Window
from distill.schema import Model
from distill.tasks import TaskSpec

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

TASK = TaskSpec("single_label", ("bad", "good"), "accuracy")
SMALL = {"n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 64}
FOURIER = {"num_hidden_layers": 2, "hidden_size": 30, "intermediate_size": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bigbird": {"section": "teacher", "block_size": 4, "random_blocks": 1, "config": TINY},
    "longformer": {"section": "teacher", "window": [4, 8], "global_tokens": 3, "config": TINY},
    "roberta": {"section": "teacher", "config": TINY},
    "bert": {"section": "teacher", "config": TINY},
    "bert_miniature": {"section": "student", "checkpoint": None, "config": TINY},
    "distilbert": {"section": "student", "checkpoint": None, "config": SMALL},
    "fnet": {"section": "student", "checkpoint": None, "config": FOURIER},
    "teacher_layers": {"section": "student", "layers": [1, 0]},
    "auto": {"section": "student", "config": {}},
    "fnet_from_bert": {"section": "student", "config": {}},
}
# BigBird: (5 + 2 · 1) · 4 = 28 tokens is the last length that is read with full attention.
LENGTHS = [5, 90, 27, 28, 29, 30, 61, 64, 3, 66, 33]


def config_of(architecture: str, **fields: Any) -> tuple[str, Model]:
    values = {**ARCHITECTURES[architecture], **fields}
    section = values.pop("section")
    module = catalog.load(section, architecture)
    config: Model = module.Config.model_validate({"architecture": architecture, "max_length": 96, **values})
    return section, config


@pytest.fixture(scope="session")
def bigbird_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A saved BigBird, for students that are cut out of their teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    section, config = config_of("bigbird", tokenizer=str(tokenizer_folder))
    models.build(config, section, TASK, 7).save(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A pretrained BERT of 4,096 positions with its tokenizer, for students that need a checkpoint."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("pretrained")
    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(5)
    fields = {**TINY, "vocab_size": len(words), "max_position_embeddings": 4096}
    BertModel(BertConfig(**fields)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


Make = Callable[..., Classifier]


@pytest.fixture
def make(tokenizer_folder: Path, bigbird_folder: Path, bert_folder: Path) -> Make:
    """Build a tiny classifier of an architecture, in evaluation mode."""

    def build(architecture: str, seed: int = 0, **fields: Any) -> Classifier:
        teacher = bigbird_folder if architecture == "teacher_layers" else None
        if architecture in ("auto", "fnet_from_bert"):
            fields = {"checkpoint": str(bert_folder), **fields}
        if teacher is None and "checkpoint" not in fields:
            fields = {"tokenizer": str(tokenizer_folder), **fields}
        section, config = config_of(architecture, **fields)
        model = models.build(config, section, TASK, seed, teacher).eval()
        spread(model.model)
        return model

    return build


def spread(model: Any) -> None:
    """Make the weights ten times as large: attention is then far from uniform, and a leak shows."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embeddings" not in name:
                weight.mul_(10)


def packed(lengths: Sequence[int], vocabulary: int = 60, seed: int = 0) -> Encoded:
    """Make documents of random tokens, one window each."""
    rng = np.random.default_rng(seed)
    ids = [np.array([2, *rng.integers(5, vocabulary, max(0, length - 2)), 3])[:length] for length in lengths]
    count = len(lengths)
    return Encoded(
        np.concatenate(ids).astype(np.int32),
        np.zeros(sum(lengths), np.uint8),
        np.cumsum([0, *lengths]),
        np.arange(count + 1),
        np.array(lengths, np.int32),
        np.arange(count),
        np.arange(count) % 2,
        np.ones(count, bool),
    )


def read(model: Classifier, data: Encoded, which: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(collate(data, list(which)))
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_documents_logits_do_not_depend_on_its_company(architecture: str, make: Make) -> None:
    model, data = make(architecture), packed(LENGTHS)
    alone = torch.cat([read(model, data, [i]) for i in range(len(data))])
    everything = read(model, data, range(len(data)))
    backwards = read(model, data, range(len(data))[::-1]).flip(0)
    again = torch.cat([read(model, data, [i]) for i in range(len(data))])
    assert float(alone.std(0).min()) > 0.01, "the documents differ at all"
    for found in (everything, backwards, again):
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    for shortest in (0, 8):
        beside = read(model, data, [shortest, 1])[0]
        torch.testing.assert_close(beside, alone[shortest], atol=1e-5, rtol=1e-5)


def test_every_architecture_is_tested_here() -> None:
    assert set(ARCHITECTURES) == {*catalog.names("teacher"), *catalog.names("student")} - {"tfidf"}


@pytest.mark.parametrize("length", LENGTHS)
def test_bigbird_says_of_a_lone_document_what_a_fresh_stock_model_says(length: int, make: Make) -> None:
    from transformers import BigBirdForSequenceClassification

    model, data = make("bigbird"), packed(LENGTHS)
    read(model, data, range(len(data)))  # whatever came before must not matter
    stock = BigBirdForSequenceClassification(model.model.config).eval()
    stock.load_state_dict(model.model.state_dict())
    at = LENGTHS.index(length)
    ids = torch.from_numpy(data.token_ids[data.windows[at] : data.windows[at + 1]].astype(np.int64))
    with torch.inference_mode():
        expected = stock(input_ids=ids[None]).logits
    torch.testing.assert_close(read(model, data, [at]), expected, atol=1e-5, rtol=1e-5)


def test_bigbird_is_sparse_where_the_document_is_long_and_only_there(make: Make) -> None:
    sparse, data = make("bigbird"), packed([28, 29])
    full = make("bigbird", attention="full")
    full.model.load_state_dict(sparse.model.state_dict())
    gaps = (read(sparse, data, [0, 1]) - read(full, data, [0, 1])).abs().amax(1)
    assert gaps[0] < 1e-5
    assert gaps[1] > 1e-3


def test_bigbirds_random_blocks_in_training_are_the_stock_ones_and_numpys_generator_is_left_alone(
    make: Make,
) -> None:
    from transformers import BigBirdForSequenceClassification

    no_dropout = {**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, data = make("bigbird", config=no_dropout).train(), packed([64, 90])
    stock = BigBirdForSequenceClassification(model.model.config).train()
    stock.load_state_dict(model.model.state_dict())
    state = np.random.get_state()  # the legacy generator: transformers seeds it
    found = model(collate(data, [1]))
    assert all(np.array_equal(a, b) for a, b in zip(state, np.random.get_state(), strict=True))
    ids = torch.from_numpy(data.token_ids[64:].astype(np.int64))
    torch.testing.assert_close(found, stock(input_ids=ids[None]).logits, atol=1e-5, rtol=1e-5)
    assert float((read(model.eval(), data, [1]) - found.detach()).abs().max()) > 1e-4, "random blocks matter"


WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTILBERT_WITHOUT_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
KEY_BIAS = re.compile(r"(key|key_global|k_lin)\.bias")
BLOCK = 4
# One token, two, around a block, around a window, around the last length of BigBird's full attention, long.
MIXED = [28, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5, 5, 27, 29, 8, 9, 61, 64, 90, 96, 33]


def without_dropout(architecture: str) -> dict[str, float]:
    if architecture in ("fnet", "fnet_from_bert"):
        return {"hidden_dropout_prob": 0.0}
    return DISTILBERT_WITHOUT_DROPOUT if architecture == "distilbert" else WITHOUT_DROPOUT


def engines(make: Make, architecture: str, **fields: Any) -> tuple[Classifier, Classifier]:
    """Make a packed classifier and a stock one with the same weights and without dropout."""
    config = {**ARCHITECTURES[architecture].get("config", {}), **without_dropout(architecture)}
    ours = make(architecture, config=config, **fields)
    stock = make(architecture, config=config, engine="stock", **fields)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_stock_agree_in_logits_and_in_every_gradient(
    architecture: str, training: bool, make: Make
) -> None:
    ours, stock = engines(make, architecture)
    data = packed(MIXED)
    batch = collate(data, range(len(data)))
    found, expected = (gradients(m, [batch], training=training) for m in (ours, stock))
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), stock(batch), atol=1e-5, rtol=1e-5)
    agree(found, expected)


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Hold gradients against one another, each by its own size; one that is absent must be zero."""
    assert found.keys() <= expected.keys()
    for name, gradient in expected.items():
        # A key's bias has a gradient of zero but for rounding: it is measured by its weights'.
        scale = float(expected[KEY_BIAS.sub(r"\1.weight", name)].abs().max())
        torch.testing.assert_close(
            found.get(name, torch.zeros_like(gradient)), gradient, atol=1e-4 * scale, rtol=0, msg=name
        )


PUBLISHED = {
    "bigbird": {"block_size": 64, "random_blocks": 3},
    "longformer": {"window": 512, "global_tokens": 1},
}
# One token, two, around a block of 64, around the last length of full attention (704), and beyond.
REAL_LENGTHS = [63, 1, 704, 1024, 2, 4096, 65, 705, 64, 2048, 703]


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "teacher_layers"])
def test_packed_and_stock_agree_at_the_published_blocks_windows_and_lengths(
    architecture: str, make: Make
) -> None:
    wide = {"max_position_embeddings": 4096} if ARCHITECTURES[architecture]["section"] == "student" else {}
    config = {**ARCHITECTURES[architecture]["config"], **without_dropout(architecture), **wide}
    fields = {"max_length": 4096, "config": config, **PUBLISHED.get(architecture, {})}
    ours, stock = make(architecture, **fields), make(architecture, engine="stock", **fields)
    stock.load_state_dict(ours.state_dict())
    data = packed(REAL_LENGTHS)
    # Stock pads to the longest: documents of like length keep the test quick.
    parts = micro_batches(data, np.arange(len(data)), 8192, stock.padding)
    expected = torch.zeros(len(data), 2)
    with torch.no_grad():
        for part in parts:
            expected[part] = stock(collate(data, part))
        found = ours(collate(data, range(len(data))))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    some = [0, 1, 3, 7]
    batch = collate(data, some)
    agree(gradients(ours, [batch], training=False), gradients(stock, [batch], training=False))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_bigbird_on_the_grid_of_its_maximum_is_stock_padded_to_it(training: bool, make: Make) -> None:
    from distill import padded

    ours, stock = engines(make, "bigbird", grid="max_length")
    data = packed(MIXED)
    batch = collate(data, range(len(data)))
    stock.model.train(training)
    ours.train(training)
    with torch.no_grad():
        expected = stock.model(**padded.inputs(stock.model, batch, 96)).logits
        torch.testing.assert_close(ours(batch), expected, atol=1e-5, rtol=1e-5)


def test_bigbirds_fixed_plan_is_the_same_in_training_and_evaluation(make: Make) -> None:
    data = packed([64, 90])
    config = {**TINY, **WITHOUT_DROPOUT}
    model = make("bigbird", random_plan="fixed", config=config)
    stock = make("bigbird", config=config)
    stock.load_state_dict(model.state_dict())
    evaluation = read(model, data, [0, 1])
    torch.testing.assert_close(read(model.train(), data, [0, 1]), evaluation)
    torch.testing.assert_close(read(stock.train(), data, [0, 1]), evaluation)
    assert float((read(stock.eval(), data, [0, 1]) - evaluation).abs().max()) > 1e-4


@pytest.mark.parametrize("global_blocks", [1, 2, 3])
def test_bigbird_without_random_blocks_equals_full_attention_under_its_mask(
    global_blocks: int, make: Make
) -> None:
    """The stock code cannot do either; a dense mask can."""
    size, lengths = 4, [40, 37, 8, 3, 24]
    torch.manual_seed(0)
    query, key, value = torch.randn(3, sum(lengths), 2, 8)
    offsets = np.cumsum([0, *lengths]).tolist()

    def plan(length: int) -> Blocks:
        count = -(-length // size)
        none = torch.zeros(1, max(0, count - 1 - global_blocks), 0, dtype=torch.long)
        return Blocks(size, count, none, 1, global_blocks)

    found = attention.packed(query, key, value, Layout(offsets), BlockSparse(plan, size))
    for start, length in zip(offsets, lengths, strict=False):
        block = torch.arange(length) // size
        last = int(block[-1])
        ends = (block < global_blocks) | (block == last)
        mask = ((block[:, None] - block).abs() <= 1) | ends | ends[:, None]
        one = [x[start : start + length].transpose(0, 1) for x in (query, key, value)]
        expected = torch.nn.functional.scaled_dot_product_attention(one[0], one[1], one[2], mask)
        torch.testing.assert_close(found[start : start + length], expected.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_drops_its_share_enlarges_the_rest_and_repeats_with_the_seed(probability: float) -> None:
    ones = torch.ones(1001, 100, requires_grad=True)
    torch.manual_seed(0)
    found = attention.drop(ones, probability)
    kept = found != 0
    assert abs(1 - float(kept.float().mean()) - probability) < 0.01
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - probability)))
    (gradient,) = torch.autograd.grad(found.sum(), ones)
    assert torch.equal(gradient, found), "a weight that was dropped learns nothing"
    torch.manual_seed(0)
    assert torch.equal(attention.drop(ones, probability), found)
    assert attention.drop(ones, 0.0) is ones


RULES: dict[str, Rule] = {
    "full": Full(),
    "window": Window(4, 2, chunk=8),
    "blocks": BlockSparse(lambda length: plan_of(length), 4),
}


def plan_of(length: int) -> Blocks | None:
    """Draw random blocks that differ by head, one of them twice; short documents see all."""
    count = -(-length // 4)
    if count < 5:
        return None
    extra = torch.from_numpy(np.random.default_rng(count).integers(0, count, (2, count - 2, 2)))
    return Blocks(4, count, extra, 3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # for a GPU it is compiled
@pytest.mark.parametrize("rule", RULES)
def test_one_call_for_the_whole_batch_equals_the_runs_of_documents(rule: str) -> None:
    """The way of a GPU: on a CPU its forward pass alone runs."""
    layout = Layout(np.cumsum([0, 3, 40, 40, 1, 17, 33, 9]).tolist())
    torch.manual_seed(0)
    query, key, value = torch.randn(3, layout.offsets[-1], 2, 8)
    with torch.inference_mode():
        found = flex.attend(query, key, value, layout, RULES[rule])
        expected = attention.packed(query, key, value, layout, RULES[rule])
        full = attention.packed(query, key, value, layout, Full())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if rule != "full":
        assert float((expected - full).abs().max()) > 0.1


def gradients(model: Classifier, batches: Sequence[Batch], training: bool = True) -> dict[str, Tensor]:
    model.train(training)
    model.zero_grad()
    for batch in batches:
        model(batch).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "teacher_layers"])
def test_gradient_checkpointing_changes_no_gradient(architecture: str, make: Make) -> None:
    base = ARCHITECTURES[architecture]["config"]
    model = make(architecture, config={**base, **without_dropout(architecture)})
    data = packed(LENGTHS)
    batches = [collate(data, part) for part in micro_batches(data, np.arange(len(data)), 128)]
    expected = gradients(model, batches)
    models.checkpoint_activations(model.model)
    layer_calls = 0

    def count(*_: Any) -> None:
        nonlocal layer_calls
        layer_calls += 1

    inside = next(m for m in models.layers(model.model)[0].modules() if isinstance(m, torch.nn.LayerNorm))
    inside.register_forward_hook(count)
    found = gradients(model, batches)
    assert layer_calls == 2 * len(batches), "layers are computed again in the backward pass"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_gradient_checkpointing_changes_no_gradient_of_a_document_in_long_and_short_windows(
    make: Make,
) -> None:
    from distill.encoding import encode_texts

    no_dropout = {**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make("bigbird", view="chunks", max_length=40, config=no_dropout)
    text = " ".join(["good", "bad", "the"] * 15)
    data = encode_texts(model.tokenizer, [[(text, None), ("good film", None)]], model.config)
    assert np.diff(data.windows).tolist()[0] > 28, "block-sparse and full attention in one pass"
    batch = collate(data, [0, 1])
    expected = gradients(model, [batch])
    models.checkpoint_activations(model.model)
    for name, gradient in gradients(model, [batch]).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("width", [30, 31])
def test_fnet_at_a_fixed_length_is_stock_over_padding_tokens_and_another_model_than_without(
    width: int, make: Make
) -> None:
    fields = {**FOURIER, "hidden_size": width}
    fixed = make("fnet", transform="max_length", max_length=64, config=fields)
    own = make("fnet", max_length=64, config=fields)
    own.load_state_dict(fixed.state_dict())
    data = packed([64, 20, 1, 33])
    for at in range(len(data)):
        ids = torch.from_numpy(data.token_ids[data.windows[at] : data.windows[at + 1]].astype(np.int64))
        filled = torch.nn.functional.pad(ids, (0, 64 - len(ids)), value=fixed.model.config.pad_token_id)
        with torch.inference_mode():
            alone, wide = (own.model(input_ids=x[None]).logits for x in (ids, filled))
        torch.testing.assert_close(read(own, data, range(len(data)))[at], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(read(fixed, data, range(len(data)))[at], wide[0], atol=1e-5, rtol=1e-5)
        assert (len(ids) == 64) == bool((wide - alone).abs().max() < 1e-3)
    stock = make("fnet", transform="max_length", max_length=64, config=fields, engine="stock")
    stock.load_state_dict(fixed.state_dict())
    batch = collate(data, range(len(data)))
    agree(gradients(fixed, [batch], training=False), gradients(stock, [batch], training=False))


def test_a_released_fnet_is_read_at_the_length_that_it_was_trained_at() -> None:
    config = catalog.load("student", "fnet").Config
    assert config(architecture="fnet").is_filled
    assert not config(architecture="fnet", transform="document").is_filled
    assert not config(architecture="fnet", checkpoint=None).is_filled


def test_what_fnet_pads_counts_among_the_tokens_of_a_batch(make: Make) -> None:
    model, data = make("fnet", transform="max_length", max_length=64), packed([5] * 8)
    assert [len(part) for part in micro_batches(data, np.arange(8), 128, model.padding)] == [2, 2, 2, 2]
    assert make("fnet").padding is None


def test_longformers_global_tokens_see_and_are_seen_beyond_the_window(make: Make) -> None:
    data = packed([60])
    one, three = (make("longformer", window=4, global_tokens=n) for n in (1, 3))
    three.model.load_state_dict(one.model.state_dict())
    changed = packed([60])
    changed.token_ids[50] = 10 if data.token_ids[50] != 10 else 11
    assert float((read(one, data, [0]) - read(one, changed, [0])).abs().max()) > 1e-5
    assert float((read(one, data, [0]) - read(three, data, [0])).abs().max()) > 1e-5


def test_longformers_windows_are_one_for_each_layer_and_even(make: Make) -> None:
    assert make("longformer").model.config.attention_window == [4, 8]
    assert make("longformer", window=6).model.config.attention_window == [6, 6]
    with pytest.raises(RecipeError, match=r"window has 3 numbers, and the model has 2 layers"):
        make("longformer", window=[4, 4, 4])
    with pytest.raises(ValueError, match="must be even"):
        make("longformer", window=5)
    with pytest.raises(ValueError, match="the widest must be a multiple"):
        make("longformer", window=[4, 6])


def short_checkpoint(folder: Path, tokenizer: Path, kind: str, **more: Any) -> Any:
    """Save an encoder of 32 positions with its tokenizer, as a hub would have it."""
    from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel

    torch.manual_seed(3)
    words = AutoTokenizer.from_pretrained(tokenizer)
    fields = {**TINY, "vocab_size": len(words), "pad_token_id": words.pad_token_id, **more}
    model = (
        BertModel(BertConfig(**fields, max_position_embeddings=32))
        if kind == "bert"
        else RobertaModel(
            RobertaConfig(
                **fields, max_position_embeddings=34, type_vocab_size=1, bos_token_id=0, eos_token_id=2
            )
        )
    )
    spread(model)
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return model


@pytest.fixture(params=["bert", "roberta"])
def short(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer_folder: Path, roberta_tokenizer_folder: Path
) -> tuple[str, Path, Any]:
    """A short pretrained encoder: its kind, its folder and itself."""
    tokenizer = tokenizer_folder if request.param == "bert" else roberta_tokenizer_folder
    return request.param, tmp_path, short_checkpoint(tmp_path, tokenizer, request.param)


def last_hidden(architecture: str, model: Classifier, ids: Tensor) -> Tensor:
    extra = {}
    if architecture == "longformer":
        extra["global_attention_mask"] = (torch.arange(ids.shape[1]) < 1).long()[None]
    with torch.inference_mode():
        result: Tensor = model.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)[
            0
        ]
    return result


@pytest.mark.parametrize("architecture", ["bigbird", "longformer", "plain"])
def test_a_lengthened_checkpoint_reads_short_documents_as_before_and_long_ones_too(
    architecture: str, short: tuple[str, Path, Any], make: Make
) -> None:
    kind, folder, before = short
    architecture = kind if architecture == "plain" else architecture
    wide = {"window": 64, "global_tokens": 1} if architecture == "longformer" else {}
    model = make(architecture, checkpoint=str(folder), lengthen=True, config={}, **wide)
    # ``make`` spreads weights: take the checkpoint's own again.
    section, config = config_of(architecture, checkpoint=str(folder), lengthen=True, config={}, **wide)
    model = models.build(config, section, TASK, 0).eval()
    data = packed([24, 32, 95])
    for at in (0, 1):
        ids = torch.from_numpy(data.token_ids[data.windows[at] : data.windows[at + 1]].astype(np.int64))[None]
        if architecture == "bigbird" and at == 1:
            continue  # 32 tokens are beyond the full attention of these small blocks
        with torch.inference_mode():
            expected = before(input_ids=ids)[0]
        torch.testing.assert_close(
            last_hidden(architecture, model, ids), expected, atol=1e-5, rtol=1e-5, check_device=False
        )
    assert torch.isfinite(read(model, data, [2])).all()
    with pytest.raises(RecipeError, match="lengthen"):
        make(architecture, checkpoint=str(folder), config={}, **wide)


def test_a_lengthened_longformer_begins_with_its_global_projections_as_copies(
    short: tuple[str, Path, Any],
) -> None:
    section, config = config_of("longformer", checkpoint=str(short[1]), lengthen=True, window=8, config={})
    model = models.build(config, section, TASK, 0)
    for layer in models.layers(model.model):
        own: Any = layer.get_submodule("attention.self")
        for part in ("query", "key", "value"):
            for name in ("weight", "bias"):
                assert torch.equal(
                    getattr(getattr(own, part), name), getattr(getattr(own, f"{part}_global"), name)
                )


@pytest.mark.parametrize("architecture", ["bigbird", "bert", "bert_miniature", "distilbert", "fnet"])
def test_a_configuration_that_cannot_be_is_one_line(architecture: str, make: Make) -> None:
    width = "dim" if architecture == "distilbert" else "hidden_size"
    for config, words in (
        ({"hiden_size": 32}, r"\.config: an? \w+ has no 'hiden_size'; did you mean 'hidden_size'\?"),
        ({width: "wide"}, rf"\.config: .*{width}.*"),
        ({width: 0.5}, rf"\.config: .*{width}.*"),
        ({"max_position_embeddings": 32}, r"\.max_length is 96, and the checkpoint has 32 positions; set \w+\.max_length=32"),
    ):  # fmt: skip
        with pytest.raises(RecipeError) as caught:
            make(architecture, config={**ARCHITECTURES[architecture]["config"], **config})
        assert re.fullmatch(f"(teacher|student){words}", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_window_beyond_the_positions_is_one_line_that_names_lengthen(
    architecture: str, tmp_path: Path, tokenizer_folder: Path, roberta_tokenizer_folder: Path, make: Make
) -> None:
    tokenizer = tokenizer_folder if architecture == "bert" else roberta_tokenizer_folder
    short_checkpoint(tmp_path, tokenizer, architecture)
    with pytest.raises(RecipeError) as caught:
        make(architecture, checkpoint=str(tmp_path), config={})
    assert str(caught.value) == (
        "teacher.max_length is 96, and the checkpoint has 32 positions; "
        "set teacher.max_length=32 or teacher.lengthen=true"
    )


@pytest.mark.parametrize("architecture", ["bigbird", "longformer", "roberta"])
def test_a_checkpoint_of_another_architecture_is_refused(
    architecture: str, tmp_path: Path, tokenizer_folder: Path, make: Make
) -> None:
    make("distilbert").save(tmp_path / "model")
    with pytest.raises(RecipeError, match="is a distilbert model"):
        make(architecture, checkpoint=str(tmp_path / "model"), config={})


def test_a_miniature_of_another_size_is_refused(tmp_path: Path, tokenizer_folder: Path, make: Make) -> None:
    short_checkpoint(tmp_path, tokenizer_folder, "bert")
    with pytest.raises(RecipeError, match="has 2 layers of width 32, and the recipe says 4 of 256"):
        make("bert_miniature", checkpoint=str(tmp_path), layers=4, width=256, config={}, max_length=16)


@pytest.mark.parametrize("architecture", ["bert", "bigbird"])
def test_a_checkpoint_that_lacks_weights_is_refused(
    architecture: str, tmp_path: Path, tokenizer_folder: Path, make: Make
) -> None:
    from safetensors.torch import load_file, save_file

    short_checkpoint(tmp_path, tokenizer_folder, "bert")
    file = tmp_path / "model.safetensors"
    kept = {n: w.clone() for n, w in load_file(file).items() if "layer.1.output.dense" not in n}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 2 of the model's weights, .*layer\.1\.output\.dense"):
        make(architecture, checkpoint=str(tmp_path), lengthen=True, config={})


def test_a_checkpoint_that_cannot_be_read_is_one_line(
    tmp_path: Path, tokenizer_folder: Path, make: Make
) -> None:
    short_checkpoint(tmp_path, tokenizer_folder, "bert")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for fields in ({"max_length": 32}, {"lengthen": True}):
        with pytest.raises(DataError, match=r"teacher\.checkpoint: ") as caught:
            make("bert", checkpoint=str(tmp_path), config={}, **fields)
        assert "\n" not in str(caught.value)


def test_a_saved_classifier_that_lost_its_head_is_refused(tmp_path: Path, make: Make) -> None:
    from safetensors.torch import load_file, save_file

    make("bert").save(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    kept = {n: w.clone() for n, w in load_file(file).items() if not n.startswith("classifier")}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 2 of the model's weights, classifier\.bias"):
        models.load(tmp_path / "model")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be loaded"):
        models.load(tmp_path / "model")


@pytest.mark.parametrize("architecture", ["bert_miniature", "distilbert", "auto", "fnet_from_bert"])
def test_a_lengthened_student_reads_short_documents_as_before_and_long_ones_too(
    architecture: str, tmp_path: Path, tokenizer_folder: Path, make: Make
) -> None:
    short_checkpoint(tmp_path, tokenizer_folder, "bert")
    if architecture == "distilbert":
        make("distilbert", config={**SMALL, "max_position_embeddings": 32}, max_length=32).save(tmp_path)
    size = {"layers": 2, "width": 128} if architecture == "bert_miniature" else {}
    if size:
        short_checkpoint(tmp_path, tokenizer_folder, "bert", hidden_size=128)
    fields = {"checkpoint": str(tmp_path), "config": {}, **size}
    with pytest.raises(RecipeError) as caught:
        make(architecture, **fields)
    assert str(caught.value) == (
        "student.max_length is 96, and the checkpoint has 32 positions; "
        "set student.max_length=32 or student.lengthen=true"
    )
    before = make(architecture, max_length=32, **fields)
    after = make(architecture, lengthen=True, **fields)
    table = after.model.base_model.embeddings.position_embeddings.weight
    old = before.model.base_model.embeddings.position_embeddings.weight
    assert torch.equal(table, pretrained.tile(old, 96))
    assert after.model.config.max_position_embeddings == 96
    encoder = before.model.base_model_prefix
    head = {n: w for n, w in before.model.state_dict().items() if not n.startswith(encoder)}
    after.model.load_state_dict(head, strict=False)  # heads are random: give both the same
    data = packed([32, 20, 95])
    torch.testing.assert_close(read(after, data, [0, 1]), read(before, data, [0, 1]), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(read(after, data, [2])).all()
    after.save(tmp_path / "again")
    assert weights_hash(models.load(tmp_path / "again").model) == weights_hash(after.model)


def test_a_position_table_of_another_size_is_refused_and_not_made_up(bert_folder: Path, make: Make) -> None:
    with pytest.raises(DataError, match=r"lacks 1 of the model's weights, .*position_embeddings"):
        make("auto", config={"max_position_embeddings": 64})
    with pytest.raises(RecipeError, match=r"student\.config: .*hiddn_size"):
        make("auto", config={"hiddn_size": 64})


def test_an_fnet_from_a_bert_has_its_weights_and_no_projection(bert_folder: Path, make: Make) -> None:
    from transformers import AutoModel, FNetForSequenceClassification

    section, config = config_of("fnet_from_bert", checkpoint=str(bert_folder))
    model = models.build(config, section, TASK, 0).model
    assert type(model) is FNetForSequenceClassification
    theirs, ours = AutoModel.from_pretrained(bert_folder).state_dict(), model.fnet.state_dict()
    assert torch.equal(ours.pop("embeddings.projection.weight"), torch.eye(32))
    assert not ours.pop("embeddings.projection.bias").any()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs.pop(name.replace("fourier.output", "attention.output"))), name
    left = {re.sub(r"^encoder\.layer\.\d+\.", "", name) for name in theirs}
    assert left == {
        f"attention.{part}.{kind}"
        for part in ("self.query", "self.key", "self.value", "output.dense")
        for kind in ("weight", "bias")
    }


def test_an_fnet_from_a_bert_is_that_bert_but_for_its_attention(bert_folder: Path) -> None:
    """The paper's layer by hand, over the checkpoint's own modules."""
    from transformers import AutoModel

    bert = AutoModel.from_pretrained(bert_folder).eval()
    section, config = config_of("fnet_from_bert", checkpoint=str(bert_folder))
    model = models.build(config, section, TASK, 0).eval()
    data = packed([17])
    ids = torch.from_numpy(data.token_ids.astype(np.int64))[None]
    with torch.inference_mode():
        states = bert.embeddings(ids)
        for layer in bert.encoder.layer:
            mixed = torch.fft.fft2(states, dim=(1, 2)).real
            states = layer.attention.output.LayerNorm(states + mixed)
            states = layer.output(layer.intermediate(states), states)
        expected = model.model.classifier(bert.pooler(states))
    torch.testing.assert_close(read(model, data, [0]), expected, atol=1e-5, rtol=1e-5)


def test_an_fnet_from_a_bert_at_a_fixed_length_reads_padding_as_text(make: Make) -> None:
    own, fixed = make("fnet_from_bert"), make("fnet_from_bert", transform="max_length")
    data = packed([96, 20])
    torch.testing.assert_close(read(own, data, [0]), read(fixed, data, [0]), atol=1e-5, rtol=1e-5)
    assert float((read(own, data, [1]) - read(fixed, data, [1])).abs().max()) > 1e-3


KNOWN = {"bert": "teacher", "roberta": "teacher", "bigbird": "teacher", "longformer": "teacher", "distilbert": "student"}  # fmt: skip


@pytest.mark.parametrize("architecture", [*KNOWN, "fnet"])
def test_auto_reads_a_known_type_as_its_own_file_does(architecture: str, tmp_path: Path, make: Make) -> None:
    from transformers import AutoModelForSequenceClassification

    more: dict[str, Any] = {"transform": "max_length"} if architecture == "fnet" else {}
    more |= {"global_tokens": 1} if architecture == "longformer" else {}
    theirs, data = make(architecture, **more), packed(LENGTHS)
    theirs.save(tmp_path)
    section, config = config_of("auto", checkpoint=str(tmp_path))
    ours = models.build(config, section, TASK, 0).eval()
    assert type(ours.model) in AutoModelForSequenceClassification._model_mapping.values()
    everything = range(len(data))
    torch.testing.assert_close(read(ours, data, everything), read(theirs, data, everything))
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }


def other_checkpoint(folder: Path, tokenizer: Path, kind: str, **fields: Any) -> Path:
    """Save a tiny model of a type that no file here reads."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {**TINY, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    config = AutoConfig.for_model(kind, **{**sizes, **fields})
    torch.manual_seed(3)
    AutoModel.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


OTHERS: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 32},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False, "type_vocab_size": 0},
    "mpnet": {"pad_token_id": 1},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 16, "cls_token_id": 2, "sep_token_id": 3, "eos_token_id": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_auto_pads_other_types_and_a_document_is_read_the_same_in_any_company(
    kind: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    folder = other_checkpoint(tmp_path / "ckpt", tokenizer_folder, kind, **OTHERS[kind])
    section, config = config_of("auto", checkpoint=str(folder))
    model = models.build(config, section, TASK, 0).eval()
    spread(model.model)
    data = packed(LENGTHS)
    together = read(model, data, range(len(data)))
    alone = torch.cat([read(model, data, [at]) for at in range(len(data))])
    assert float(alone.std(0).min()) > 1e-3, "the documents differ at all"
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert [len(part) for part in micro_batches(data, np.arange(2), 96, model.padding)] == [1, 1]
    model.save(tmp_path / "saved")
    again = models.load(tmp_path / "saved")
    torch.testing.assert_close(read(again, data, range(len(data))), together)
    gradients(model, [collate(data, [0, 1])])
    models.freeze(model.model, embeddings=True, lowest=0)
    # Rows that are reserved for padding are no positions.
    assert pretrained.reserved(model.model.config) == (2 if kind == "mpnet" else 0)


def test_auto_tiles_positions_behind_the_reserved_ones(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = other_checkpoint(tmp_path, tokenizer_folder, "mpnet", pad_token_id=1, max_position_embeddings=34)
    section, config = config_of("auto", checkpoint=str(folder), max_length=33)
    with pytest.raises(RecipeError, match="is 33, and the checkpoint has 32 positions"):
        models.build(config, section, TASK, 0)
    section, config = config_of("auto", checkpoint=str(folder), lengthen=True)
    model = models.build(config, section, TASK, 0).eval()
    table = model.model.base_model.embeddings.position_embeddings.weight
    assert len(table) == 98
    assert torch.equal(table[2:34], table[34:66])
    assert torch.isfinite(read(model, packed([96]), [0])).all()


def test_auto_refuses_what_it_cannot_read_in_one_line(tmp_path: Path, tokenizer_folder: Path) -> None:
    def refusal(kind: str, more: dict[str, Any], **fields: Any) -> str:
        folder = other_checkpoint(tmp_path / kind, tokenizer_folder, kind, **more)
        section, config = config_of("auto", checkpoint=str(folder), **fields)
        with pytest.raises(RecipeError) as caught:
            models.build(config, section, TASK, 0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    vision = {"image_size": 8, "patch_size": 4}
    assert "is a vit model, which transformers has no sequence classifier for" in refusal("vit", vision)
    rope = {"max_position_embeddings": 64, **OTHERS["modernbert"]}
    assert refusal("modernbert", rope, lengthen=True) == (
        "student.lengthen: a modernbert has no table of positions to tile; set student.max_length=64"
    )


def test_code_beside_a_checkpoint_never_runs_and_nobody_is_asked(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = other_checkpoint(tmp_path, tokenizer_folder, "electra", **OTHERS["electra"])
    (folder / "own.py").write_text("raise SystemExit('this ran')\n")
    section, config = config_of("auto", checkpoint=str(folder))
    own = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", None]}
    for file in ("tokenizer_config.json", "config.json"):
        about = json.loads((folder / file).read_text()) | {"auto_map": own}
        about |= {"model_type": "homemade"} if file == "config.json" else {"tokenizer_class": "Homemade"}
        (folder / file).write_text(json.dumps(about))
        if file == "tokenizer_config.json":
            models.build(config, section, TASK, 0).save(tmp_path / "saved")
    with pytest.raises(DataError, match=r"student\.checkpoint: ") as caught:
        models.build(config, section, TASK, 0)
    assert "\n" not in str(caught.value)
    assert "trust" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_auto_refuses_a_model_in_which_padding_is_not_hidden(
    bert_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_folder: Path
) -> None:
    from distill import padded

    folder = other_checkpoint(tmp_path, tokenizer_folder, "electra", **OTHERS["electra"])
    real = padded.inputs

    def blind(*arguments: Any) -> dict[str, Tensor]:
        found = real(*arguments)
        return {**found, "attention_mask": torch.ones_like(found["attention_mask"])}

    monkeypatch.setattr(padded, "inputs", blind)
    monkeypatch.setattr(pretrained, "classifier", spread_after(pretrained.classifier))
    section, config = config_of("auto", checkpoint=str(folder))
    with pytest.raises(RecipeError, match="is a electra model, and its logits depend on the padding"):
        models.build(config, section, TASK, 0)


def spread_after(build: Callable[..., Any]) -> Callable[..., Any]:
    def built(*arguments: Any, **named: Any) -> Any:
        model = build(*arguments, **named)
        spread(model)
        return model

    return built


def test_reduced_embeddings_are_the_best_of_their_rank_and_settled() -> None:
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(rows, 12)) * np.linspace(1, 3, 12) for rows in (40, 9, 2)]
    found = pretrained.reduce([torch.from_numpy(t).float() for t in tables], 5)
    assert [tuple(t.shape) for t in found] == [(40, 5), (9, 5), (2, 5)]
    reduced, whole = torch.cat(found).double().numpy(), np.concatenate(tables)
    left, values, right = np.linalg.svd(whole, full_matrices=False)
    signs = np.sign(right[np.arange(5), np.abs(right[:5]).argmax(1)])
    np.testing.assert_allclose(reduced, left[:, :5] * values[:5] * signs, atol=1e-4)
    # In the old width that is the best approximation of its rank there is.
    best = (left[:, :5] * values[:5]) @ right[:5]
    np.testing.assert_allclose(reduced @ (signs[:, None] * right[:5]), best, atol=1e-4)
    flipped = pretrained.reduce([torch.from_numpy(t[::-1].copy()).float() for t in tables[::-1]], 5)
    np.testing.assert_allclose(torch.cat(flipped).numpy()[::-1], reduced, atol=1e-4)
    same = pretrained.reduce([torch.from_numpy(t).float() for t in tables], 12)
    np.testing.assert_allclose(
        torch.cat(same).numpy() @ torch.cat(same).numpy().T, whole @ whole.T, atol=1e-3
    )


@pytest.mark.parametrize("architecture", ["bert_miniature", "distilbert"])
@pytest.mark.parametrize("family", ["bigbird", "longformer", "bert"])
def test_a_student_may_begin_with_its_teachers_embeddings_reduced(
    family: str, architecture: str, tmp_path: Path, tokenizer_folder: Path, roberta_tokenizer_folder: Path, make: Make
) -> None:  # fmt: skip
    words = roberta_tokenizer_folder if family == "longformer" else tokenizer_folder
    teacher = make(family, tokenizer=str(words), **({"window": 8} if family == "longformer" else {}))
    teacher.save(tmp_path)
    narrow = {"dim": 16, "hidden_dim": 32} if architecture == "distilbert" else {"hidden_size": 16}
    config = {**ARCHITECTURES[architecture]["config"], **narrow}
    fields = {"config": config, "max_length": 20, "init": "teacher_embeddings"}
    _, about = config_of(architecture, **fields)
    student = models.build(about, "student", TASK, 0, tmp_path)
    again = models.build(about, "student", TASK, 0, tmp_path)
    assert weights_hash(student.model) == weights_hash(again.model)
    assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    theirs, ours = teacher.model.base_model.embeddings, student.model.base_model.embeddings
    first = 2 if family == "longformer" else 0
    tables = [theirs.word_embeddings, theirs.position_embeddings, theirs.token_type_embeddings]
    values = [t.weight.detach() for t in tables]
    expected = pretrained.reduce([values[0], values[1][first:], values[2]], 16)
    assert torch.equal(ours.word_embeddings.weight, expected[0])
    if architecture == "distilbert":
        assert torch.equal(ours.position_embeddings.weight, expected[1][:20] + expected[2][0])
    else:
        assert torch.equal(ours.position_embeddings.weight, expected[1][:20])
        assert torch.equal(ours.token_type_embeddings.weight, expected[2])
    assert torch.isfinite(read(student, packed([20, 3]), [0, 1])).all()
    student.save(tmp_path / "student")
    assert weights_hash(models.load(tmp_path / "student").model) == weights_hash(student.model)


def test_embeddings_of_a_teacher_are_refused_where_they_cannot_be_had(
    tmp_path: Path, make: Make, tokenizer_folder: Path
) -> None:
    teacher = make("bert", max_length=64)
    teacher.save(tmp_path / "bert")
    make("distilbert").save(tmp_path / "distilbert")

    def refusal(folder: str | None, **fields: Any) -> str:
        _, config = config_of("bert_miniature", init="teacher_embeddings", **fields)
        with pytest.raises(RecipeError) as caught:
            models.build(config, "student", TASK, 0, tmp_path / folder if folder else None)
        return str(caught.value)

    wide = {"config": {**TINY, "hidden_size": 64}}
    assert "the student is 64 wide and the teacher 32" in refusal("bert", **wide)
    assert "is 65, and the checkpoint has 64 positions" in refusal("bert", max_length=65)
    assert "a distilbert has no word_embeddings, position_embeddings, token_type_emb" in refusal("distilbert")
    assert "student.tokenizer is missing" in refusal(None)
    longer = {"max_length": 80, "lengthen": True, "init": "teacher_embeddings"}
    _, config = config_of("bert_miniature", **longer)
    student = models.build(config, "student", TASK, 0, tmp_path / "bert")
    assert len(student.model.bert.embeddings.position_embeddings.weight) == 80
    for taken in ({"tokenizer": str(tokenizer_folder)}, {"checkpoint": "some/bert"}):
        for architecture in ("bert_miniature", "distilbert"):
            with pytest.raises(ValueError, match="takes the embeddings and the tokenizer from the teacher"):
                config_of(architecture, init="teacher_embeddings", **taken)


@pytest.mark.parametrize("family", ["bigbird", "longformer", "roberta", "bert"])
def test_teacher_layers_takes_the_chosen_layers_and_the_embeddings_exactly(
    family: str, tmp_path: Path, tokenizer_folder: Path, roberta_tokenizer_folder: Path, make: Make
) -> None:
    words = roberta_tokenizer_folder if family in ("roberta", "longformer") else tokenizer_folder
    deeper = {**TINY, "num_hidden_layers": 3}
    fields = {"window": 8} if family == "longformer" else {}
    teacher = make(family, config=deeper, tokenizer=str(words), **fields)
    teacher.save(tmp_path / "model")
    _, config = config_of("teacher_layers", layers=[2, 0], max_length=16)
    student = models.build(config, "student", TASK, 0, tmp_path / "model")
    theirs, ours = teacher.model.base_model.state_dict(), student.model.base_model.state_dict()
    checked = 0
    for name, weight in ours.items():
        if name.startswith("embeddings.position_embeddings"):
            expected = theirs[name][: len(weight)]
        elif name.startswith("encoder.layer."):
            at, rest = name.removeprefix("encoder.layer.").split(".", 1)
            expected = theirs[f"encoder.layer.{[2, 0][int(at)]}.{rest}"]
        elif name.startswith("pooler"):
            continue
        else:
            expected = theirs[name]
        assert torch.equal(weight, expected), name
        checked += 1
    assert checked > 30
    assert len(models.layers(student.model)) == 2


def test_teacher_layers_reads_as_its_teacher_does_when_it_has_all_the_layers(
    tmp_path: Path, make: Make
) -> None:
    teacher = make("bert")
    teacher.save(tmp_path / "model")
    _, config = config_of("teacher_layers", layers=[0, 1])
    student = models.build(config, "student", TASK, 0, tmp_path / "model").eval()
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            student.model.base_model(ids)[0], teacher.model.base_model(ids)[0], atol=1e-6, rtol=1e-6
        )


def test_teacher_layers_refuses_a_layer_that_the_teacher_has_not(bigbird_folder: Path) -> None:
    _, config = config_of("teacher_layers", layers=[0, 2])
    with pytest.raises(
        RecipeError, match=r"student\.layers: 2 is out of range; the teacher has layers 0 to 1"
    ):
        models.build(config, "student", TASK, 0, bigbird_folder)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        config_of("teacher_layers", layers=[-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_classifier_comes_back_the_same(architecture: str, tmp_path: Path, make: Make) -> None:
    model, data = make(architecture), packed(LENGTHS)
    before = read(model, data, range(len(data)))
    model.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    assert torch.equal(read(again, data, range(len(data))), before)
    assert weights_hash(again.model) == weights_hash(model.model)
    assert again.labels == ["bad", "good"]
    assert again.config == model.config
    assert again.config.max_length == again.tokenizer.model_max_length == 96


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_classifier_is_a_pipeline_with_label_names_and_our_logits(
    architecture: str, tmp_path: Path, make: Make
) -> None:
    from transformers import pipeline

    model = make(architecture)
    model.save(tmp_path / "model")
    texts = [text for text, _ in documents(8, longest=18)]
    stock = pipeline("text-classification", model=str(tmp_path / "model"), device="cpu")
    if architecture == "longformer":  # stock Longformer makes the first token global, and only that one
        model = make(architecture, global_tokens=1)
    theirs = [stock(text, top_k=None, function_to_apply="none") for text in texts]
    ours = models.TextReader(model).logits([(text, None) for text in texts])
    for scores, row in zip(theirs, ours, strict=True):
        named = {score["label"]: score["score"] for score in scores}
        assert named == pytest.approx({"bad": row[0], "good": row[1]}, abs=1e-5)


@pytest.mark.parametrize("architecture", ["fnet", "fnet_from_bert"])
def test_a_pipeline_reads_an_fnet_of_a_fixed_length_when_it_is_told_to_pad(
    architecture: str, tmp_path: Path, make: Make
) -> None:
    from transformers import pipeline

    model = make(architecture, transform="max_length", max_length=40)
    model.save(tmp_path / "model")
    texts = [text for text, _ in documents(4, longest=30)]
    ours = models.TextReader(model).logits([(text, None) for text in texts])
    stock = pipeline("text-classification", model=str(tmp_path / "model"), device="cpu")
    for more, same in (({"padding": "max_length", "truncation": True}, True), ({}, False)):
        found = [stock(text, top_k=None, function_to_apply="none", **more) for text in texts]
        theirs = [
            [next(s["score"] for s in row if s["label"] == name) for name in ("bad", "good")] for row in found
        ]
        assert (np.abs(np.array(theirs) - ours).max() < 1e-4) == same


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_seed_settles_the_weights(architecture: str, make: Make) -> None:
    one, same, other = (weights_hash(make(architecture, seed).model) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_all_miniatures_are_presets_of_their_published_names() -> None:
    presets = catalog.presets()
    sizes = {
        (p["layers"], p["width"])
        for p in presets.values()
        if p["architecture"] == "bert_miniature" and "layers" in p
    }
    assert sizes == {(n, w) for n in (2, 4, 6, 8, 10, 12) for w in (128, 256, 512, 768)}
    for layers, width in sizes:
        found = presets[f"bert_L{layers}_H{width}"]
        assert found["checkpoint"] == f"google/bert_uncased_L-{layers}_H-{width}_A-{width // 64}"
        catalog.load("student", "bert_miniature").Config.model_validate(found)
    assert presets["bert_tiny"] == presets["bert_L2_H128"]
    assert presets["bert_medium"] == presets["bert_L8_H512"]


def test_the_logit_of_a_document_in_chunks_is_the_mean_of_its_windows(make: Make) -> None:
    from distill.encoding import encode_texts

    model = make("bert", view="chunks", max_length=12)
    text = " ".join(["good", "bad", "film", "the"] * 9)
    whole = encode_texts(model.tokenizer, [[(text, None), ("good film", None)]], model.config)
    assert whole.window_counts.tolist() == [4, 1]
    single = Encoded(
        whole.token_ids, whole.segments, whole.windows, np.arange(6), np.zeros(5), np.zeros(5), np.zeros(5), np.ones(5, bool)
    )  # fmt: skip
    windows = torch.cat([read(model, single, [i]) for i in range(5)])
    pooled = read(model, whole, [0, 1])
    torch.testing.assert_close(pooled[0], windows[:4].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled[1], windows[4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read(model, whole, [1, 0]), pooled.flip(0), atol=1e-5, rtol=1e-5)


def test_freezing_keeps_embeddings_and_lowest_layers_and_nothing_else(make: Make) -> None:
    model = make("bert")
    models.freeze(model.model, embeddings=True, lowest=1)
    frozen = {name for name, p in model.model.named_parameters() if not p.requires_grad}
    assert frozen == {
        name
        for name, _ in model.model.named_parameters()
        if name.startswith(("bert.embeddings", "bert.encoder.layer.0."))
    }
    with pytest.raises(RecipeError, match="3 layers to freeze, and the model has 2"):
        models.freeze(make("bert").model, embeddings=False, lowest=3)


def test_tiling_repeats_the_learnt_positions() -> None:
    table = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(pretrained.tile(table, 7), table[[0, 1, 2, 0, 1, 2, 0]])


def test_the_saved_folder_says_how_it_reads(tmp_path: Path, make: Make) -> None:
    make("bigbird").save(tmp_path / "model")
    about = json.loads((tmp_path / "model" / "distill.json").read_text())
    assert about["section"] == "teacher"
    assert about["model"]["block_size"] == 4
    assert about["task"] == {"kind": "single_label", "labels": ["bad", "good"], "metric": "accuracy"}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "fnet at max_length"])
def test_tapped_states_are_transformers_hidden_states_and_change_no_logit(
    architecture: str, make: Make
) -> None:
    name, _, filled = architecture.partition(" at ")
    model, data = make(name, **({"transform": filled} if filled else {})), packed(LENGTHS)
    depth = len(models.layers(model.model))
    taps = Taps(range(depth + 1), ())
    with torch.inference_mode():
        logits = model(collate(data, range(len(data))), taps)
    torch.testing.assert_close(logits, read(model, data, range(len(data))), atol=1e-5, rtol=1e-5)
    assert list(taps.states) == list(range(depth + 1))
    for start, stop in pairwise(data.windows.tolist()):
        ids = torch.from_numpy(data.token_ids[start:stop].astype(np.int64))
        if filled:
            ids = torch.nn.functional.pad(ids, (0, 96 - len(ids)), value=model.model.config.pad_token_id)
        # A new one for each: a BigBird that has read a short document stays with full attention.
        stock = type(model.model)(model.model.config).eval()
        stock.load_state_dict(model.model.state_dict())
        extra = {} if name == "fnet" else {"attention_mask": torch.ones_like(ids)[None]}
        if name == "longformer":
            extra["global_attention_mask"] = (torch.arange(len(ids)) < 3).long()[None]
        with torch.inference_mode():
            expected = stock.base_model(input_ids=ids[None], output_hidden_states=True, **extra).hidden_states
        assert len(expected) == depth + 1
        for layer, states in taps.states.items():
            torch.testing.assert_close(
                states[start:stop], expected[layer][0, : stop - start], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_tapped_queries_and_keys_make_transformers_attention_maps(architecture: str, make: Make) -> None:
    model, data = make(architecture), packed(LENGTHS)
    taps = Taps((), (1, 2))
    with torch.inference_mode():
        model(collate(data, range(len(data))), taps)
    assert not taps.sparse
    model.model.set_attn_implementation("eager")
    for start, stop in pairwise(data.windows.tolist()):
        ids = torch.from_numpy(data.token_ids[start:stop].astype(np.int64))
        with torch.inference_mode():
            expected = model.model.base_model(input_ids=ids[None], output_attentions=True).attentions
        for layer, (query, key, value) in taps.heads.items():
            q, k = (x[start:stop].transpose(0, 1) for x in (query, key))
            maps = (q @ k.transpose(1, 2) / value.shape[2] ** 0.5).softmax(-1)
            torch.testing.assert_close(maps, expected[layer - 1][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "sparse"), [("bigbird", {29, 96}), ("longformer", {5, 28, 29, 96}), ("bert", set())]
)
def test_a_tap_tells_where_some_token_does_not_see_all_of_its_document(
    architecture: str, sparse: set[int], make: Make
) -> None:
    model = make(architecture)
    found = set()
    for length in (5, 28, 29, 96):
        taps = Taps((), (1,))
        with torch.inference_mode():
            model(collate(packed([length]), [0]), taps)
        found |= {length} if taps.sparse else set()
    assert found == sparse


def test_what_is_not_tapped_costs_nothing(make: Make) -> None:
    """In the last layer the first tokens alone are fed forward, unless its states are asked for."""
    model, data = make("bert"), packed([30, 20])
    rows: list[int] = []
    models.layers(model.model)[-1].get_submodule("intermediate.dense").register_forward_hook(
        lambda module, given, result: rows.append(len(given[0]))
    )
    with torch.inference_mode():
        for taps in (None, Taps((0, 1), (1, 2)), Taps((2,), ())):
            model(collate(data, [0, 1]), taps)
    assert rows == [2, 2, 50]
