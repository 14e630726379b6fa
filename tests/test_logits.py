"""The logit cache: what it refuses, how it grows, and that a pass that was killed costs only its rest."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, documents
from safetensors.numpy import load_file, save_file

from distill import catalog, files, gate, inference, logits, models, progress
from distill.encoding import Encoded, encode_texts
from distill.errors import DiskError, LogitsError
from distill.files import sha256_file
from distill.logits import Logits
from distill.models import Classifier
from distill.progress import Tracker
from distill.schema import Cache
from distill.tasks import Floats, TaskSpec

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

TASK = TaskSpec("single_label", ("bad", "good"), "accuracy")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def make(tokenizer_folder: Path) -> Callable[..., Classifier]:
    """Build a tiny BigBird that reads some documents in full and some block-sparse."""

    def build(seed: int = 0, **fields: Any) -> Classifier:
        values = {
            "architecture": "bigbird", "tokenizer": str(tokenizer_folder), "max_length": 64, "block_size": 4,
            "random_blocks": 1, "config": TINY, **fields,
        }  # fmt: skip
        config = catalog.load("teacher", "bigbird").Config.model_validate(values)
        return models.build(config, "teacher", TASK, seed).eval()

    return build


Make = Callable[..., Classifier]


def rows_of(model: Classifier, count: int, seed: int = 0) -> Encoded:
    texts = [(text, None) for text, _ in documents(count, seed)]
    ids = np.random.default_rng(seed).permutation(10_000)[:count].astype(np.int64) * 10 + seed
    return Encoded(**{**vars(encode_texts(model.tokenizer, [texts], model.config)), "row_id": ids})


class Pass:
    """A teacher, its documents and its cache."""

    def __init__(self, model: Classifier, data: Encoded, **settings: Any) -> None:
        self.model, self.data = model, data
        self.settings = Cache.model_validate({"rows_per_shard": 10, "precision": "fp32", **settings})
        self.key = logits.key_of(model, "fp32", self.settings.dtype)
        self.folder = logits.folder_of(self.key)

    def __call__(self) -> int:
        accelerator = inference.make_accelerator("fp32")
        done = logits.fill(
            self.folder, self.key, self.model, self.data, self.settings, accelerator, "caching"
        )
        logits.write_manifest(self.folder, {})
        return done

    def open(self) -> Logits:
        return Logits(self.folder, self.key)

    def direct(self) -> Floats:
        return inference.predict(self.model, self.data, np.arange(len(self.data)), 4096, "fp32")

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


@pytest.fixture
def cached(make: Make) -> Pass:
    """A whole cache of 35 documents in four shards."""
    model = make()
    result = Pass(model, rows_of(model, 35))
    result()
    return result


def test_rows_come_back_by_id_in_any_order(cached: Pass) -> None:
    cache, expected = cached.open(), cached.direct()
    assert len(cache) == 35
    assert len(cached.shards()) == 4
    order = np.random.default_rng(1).permutation(35)
    np.testing.assert_allclose(cache(cached.data.row_id[order]), expected[order], atol=1e-5)
    twice = cached.data.row_id[[3, 3, 0]]
    np.testing.assert_array_equal(cache(twice), cache(cached.data.row_id)[[3, 3, 0]])


def test_the_same_rows_shuffled_need_nothing_new(cached: Pass) -> None:
    order = np.random.default_rng(1).permutation(35)
    texts = [(text, None) for text, _ in documents(35)]
    again = encode_texts(cached.model.tokenizer, [[texts[i] for i in order]], cached.model.config)
    shuffled = Pass(cached.model, Encoded(**{**vars(again), "row_id": cached.data.row_id[order]}))
    assert shuffled.folder == cached.folder
    assert shuffled() == 0
    np.testing.assert_allclose(shuffled.open()(shuffled.data.row_id), shuffled.direct(), atol=1e-5)


def test_a_pass_shows_its_progress_in_tokens(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shown = make(), []
    real = progress.track

    @contextmanager
    def seen(title: str, total: int, unit: str) -> Iterator[Tracker]:
        with real(title, total, unit) as tracker:
            shown.append(tracker)
            yield tracker

    monkeypatch.setattr("distill.logits.track", seen)
    whole = Pass(model, rows_of(model, 35))
    whole()
    assert [(one.unit, one.total, one.done) for one in shown] == [
        ("tokens", len(whole.data.token_ids), len(whole.data.token_ids))
    ]


def test_a_document_that_stands_twice_is_computed_once(make: Make) -> None:
    model = make()
    data = rows_of(model, 6)
    twice = Pass(model, Encoded(**{**vars(data), "row_id": data.row_id[[0, 1, 2, 3, 4, 4]]}))
    assert twice() == 5
    assert len(twice.open()) == 5


def test_a_killed_pass_goes_on_at_the_missing_rows(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    cut = Pass(model, rows_of(model, 35))
    real, written = logits.write_shard, 0

    def dies(*arguments: Any) -> Path:
        nonlocal written
        written += 1
        if written == 3:
            (cut.folder / "123.part").write_bytes(b"half")
            (cut.folder / ".124.part.abcd.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(logits, "write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            cut()
    with pytest.raises(LogitsError, match="the caching pass has not finished"):
        cut.open()
    assert len(cut.shards()) == 2
    assert cut() == 15
    np.testing.assert_allclose(cut.open()(cut.data.row_id), cut.direct(), atol=1e-5)
    left = {path.name for path in cut.folder.iterdir() if path.suffix in (".part", ".tmp")}
    assert not left
    assert logits.verify(cut.folder) == 35


def test_a_disk_that_fills_up_in_a_shard_keeps_the_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    whole, cut = Pass(model, rows_of(model, 35)), Pass(model, rows_of(model, 35))
    real, synced = files.sync_file, 0

    def full(path: Path) -> None:
        nonlocal synced
        synced += ".part" in path.name
        if synced == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_file", full)
        with pytest.raises(DiskError, match="no space left on device; mend"), files.reporting_disk("mend"):
            cut()
    assert len(cut.shards()) == 2
    assert not list(cut.folder.glob(".*.tmp"))
    assert cut() == 15
    found = cut.open()(cut.data.row_id)
    shutil.rmtree(cut.folder)
    whole()
    np.testing.assert_array_equal(found, whole.open()(whole.data.row_id))


def test_caching_goes_on_in_smaller_batches_where_the_memory_is_not_enough(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make()
    short = Pass(model, rows_of(model, 35), tokens_per_batch=1024)
    expected, real = short.direct(), Classifier.forward

    def forward(self: Classifier, batch: Any, *more: Any) -> Any:
        if len(batch.token_ids) > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, *more)

    monkeypatch.setattr(Classifier, "forward", forward)
    assert short() == 35
    np.testing.assert_allclose(short.open()(short.data.row_id), expected, atol=1e-5)
    assert capsys.readouterr().err.count("out of memory") == 1, "said once, not for each shard"


def test_more_documents_cost_only_themselves(cached: Pass) -> None:
    more = rows_of(cached.model, 20, seed=1)
    both = Pass(cached.model, more)
    assert both.folder == cached.folder
    assert both() == 20
    assert len(both.open()) == 55
    np.testing.assert_allclose(both.open()(cached.data.row_id), cached.direct(), atol=1e-5)
    np.testing.assert_allclose(both.open()(more.row_id), both.direct(), atol=1e-5)


def test_rows_of_other_data_are_refused_with_their_count(cached: Pass) -> None:
    rows = np.concatenate([cached.data.row_id[:5], [-1, -2]])
    for ask in (cached.open().require, cached.open()):
        with pytest.raises(
            LogitsError, match=r"2 of 7 rows have no cached logits \(the first is row id -1\)"
        ):
            ask(rows)
    cached.open().require(cached.data.row_id)


def test_a_flipped_bit_is_refused_and_the_shard_is_named(cached: Pass) -> None:
    shard = cached.shards()[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    for act in (cached.open, lambda: logits.verify(cached.folder)):
        with pytest.raises(LogitsError, match=f"shard {shard.name} is damaged"):
            act()
    shard.unlink()
    with pytest.raises(LogitsError, match=f"shard {shard.name} is missing"):
        cached.open()
    assert cached() in (5, 10)
    np.testing.assert_allclose(cached.open()(cached.data.row_id), cached.direct(), atol=1e-5)


def test_a_cache_is_opened_when_it_holds_the_rows_and_filled_when_it_does_not(cached: Pass) -> None:
    rows, key = cached.data.row_id, cached.key
    cache = logits.opened(cached.folder, key, rows[:7])
    assert cache is not None
    assert len(cache) == 35
    assert logits.opened(cached.folder, key, np.append(rows, -1)) is None
    assert logits.opened(cached.folder.with_name("none"), key, rows) is None
    shard = cached.shards()[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(LogitsError, match=f"shard {shard.name} is damaged .*delete it"):
        logits.opened(cached.folder, key, rows)
    shard.unlink()
    assert logits.opened(cached.folder, key, rows) is None, "as told: deleted, it is computed again"


def test_a_damaged_shard_is_computed_again_even_while_it_lies_there(cached: Pass) -> None:
    shard = cached.shards()[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert cached() > 0
    np.testing.assert_allclose(cached.open()(cached.data.row_id), cached.direct(), atol=1e-5)


def test_a_nan_with_a_right_hash_is_refused_too(cached: Pass) -> None:
    shard = cached.shards()[0]
    arrays = load_file(shard)
    arrays["logits"][0, 0] = np.nan
    shard.unlink()
    save_file(arrays, cached.folder / "new")
    bad = cached.folder / f"{sha256_file(cached.folder / 'new')[:32]}.safetensors"
    (cached.folder / "new").rename(bad)
    logits.write_manifest(cached.folder, {})
    with pytest.raises(LogitsError, match=f"shard {bad.name} holds NaN"):
        cached.open()


def test_a_cache_without_a_manifest_or_key_is_refused(cached: Pass) -> None:
    (cached.folder / "manifest.json").unlink()
    with pytest.raises(LogitsError, match="has not finished; distill cache goes on"):
        cached.open()
    with pytest.raises(LogitsError, match="has not finished"):
        logits.verify(cached.folder)
    with pytest.raises(LogitsError, match="no cached logits here"):
        Logits(cached.folder.parent)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "another teacher's weights"),
        (
            {"max_length": 32, "config": {**TINY, "max_position_embeddings": 64}},
            "read with max_length=64, and 32 is wanted",
        ),
        ({"view": "head_tail"}, "read with view=head, and head_tail is wanted"),
        ({"attention": "full"}, "another configuration of the teacher"),
    ],
)
def test_a_cache_of_another_teacher_or_reading_is_refused_with_the_difference(
    change: dict[str, Any], said: str, cached: Pass, make: Make
) -> None:
    wanted = logits.key_of(make(**change), "fp32", "float32")
    assert logits.folder_of(wanted) != cached.folder
    with pytest.raises(LogitsError, match=said):
        Logits(cached.folder, wanted)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("tokenizer", "x", "another tokenizer"),
        ("labels", ["good", "bad"], r"another label order \(\['bad', 'good'\], not \['good', 'bad'\]\)"),
        ("precision", "bf16", r"another precision \(fp32, not bf16\)"),
        ("dtype", "float16", r"another dtype \(float32, not float16\)"),
    ],
)
def test_a_cache_that_differs_in_anything_else_is_refused_too(
    part: str, value: Any, said: str, cached: Pass
) -> None:
    with pytest.raises(LogitsError, match=said):
        Logits(cached.folder, {**cached.key, part: value})


def test_how_a_teacher_was_trained_and_where_it_lies_is_not_part_of_the_key(
    cached: Pass, tmp_path: Path
) -> None:
    cached.model.save(tmp_path / "elsewhere")
    assert logits.key_of(models.load(tmp_path / "elsewhere"), "fp32", "float32") == cached.key
    other = cached.model.config.train.model_copy(update={"epochs": 99.0})
    cached.model.config = cached.model.config.model_copy(update={"train": other, "checkpoint": "x"})
    assert logits.key_of(cached.model, "fp32", "float32") == cached.key


def test_another_tokenizer_is_another_key(make: Make, roberta_tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    model = make()
    before = logits.key_of(model, "fp32", "float32")
    model.tokenizer = AutoTokenizer.from_pretrained(roberta_tokenizer_folder)
    after = logits.key_of(model, "fp32", "float32")
    assert {k for k in before if before[k] != after[k]} == {"tokenizer"}


class Leaky(Classifier):
    """A teacher whose logits depend on the documents beside, as a model without a mask has them."""

    def forward(self, batch: Any, taps: Any = None) -> Any:
        return super().forward(batch) + 0.001 * batch.size


def test_the_gate_catches_a_teacher_whose_logits_depend_on_the_batch(make: Make, cached: Pass) -> None:
    worst = gate.check_invariance(cached.folder, cached.key, cached.model, cached.data)
    assert worst < 1e-5
    model = make()
    model.__class__ = Leaky
    leaky = Pass(model, rows_of(model, 35))
    shutil.rmtree(leaky.folder)
    leaky()
    with pytest.raises(LogitsError, match=r"has other logits in another batch .*cannot be cached"):
        gate.check_invariance(leaky.folder, leaky.key, model, leaky.data)


def test_half_precision_on_disk_halves_the_cache_and_passes_the_gate(make: Make, cached: Pass) -> None:
    with torch.no_grad():  # logits of a trained model's size, which half precision has to round
        for name, weight in cached.model.model.classifier.named_parameters():
            weight.mul_(30 if "weight" in name else 1)
    half = Pass(cached.model, cached.data, dtype="float16")
    half()
    gate.check_invariance(half.folder, half.key, half.model, half.data)
    assert load_file(half.shards()[0])["logits"].dtype == np.float16
    found = half.open()(half.data.row_id)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, half.direct(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("value", "dtype", "fix"), [(np.nan, "float32", "cache.precision"), (7e4, "float16", "cache.dtype")]
)
def test_a_logit_that_is_not_finite_is_never_written(
    value: float, dtype: str, fix: str, tmp_path: Path
) -> None:
    bad = np.array([[0.0, 1.0], [value, 0.0]], np.float32)
    with pytest.raises(LogitsError, match=f"row 8 are not finite in {dtype}; try {fix}"):
        logits.write_shard(tmp_path, np.array([7, 8]), bad, dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_is_found_by_name_or_path(cached: Pass) -> None:
    assert logits.find(cached.folder.name) == cached.folder
    assert logits.find(str(cached.folder)) == cached.folder
    assert logits.every() == [cached.folder]
    with pytest.raises(LogitsError, match=f"did you mean '{cached.folder.name}'"):
        logits.find(cached.folder.name[:-1])


def test_a_teachers_labels_must_be_the_datas_in_their_order() -> None:
    assert gate.check_labels(["a", "b"], ["a", "b"], "t") is None
    note = gate.check_labels(["LABEL_0", "LABEL_1"], ["a", "b"], "t")
    assert note == "t names no labels; its class numbers are taken to be a, b"
    with pytest.raises(LogitsError, match=r"the same labels in another order: b, a there, a, b in the data"):
        gate.check_labels(["b", "a"], ["a", "b"], "t")
    with pytest.raises(LogitsError, match="other labels"):
        gate.check_labels(["a", "b", "c"], ["a", "b"], "t")


def answers(right: int, rows: int = 300) -> tuple[Floats, np.ndarray]:
    """Make logits of which ``right`` are right."""
    labels = np.arange(rows) % 2
    said = np.where(np.arange(rows) < right, labels, 1 - labels)
    return np.eye(2, dtype=np.float32)[said], labels


def test_cached_logits_that_are_worse_than_what_was_measured_are_refused() -> None:
    found, labels = answers(270)
    assert gate.check_quality("single_label", found, labels, "accuracy", 0.9, "t") == 0.9
    assert gate.check_quality("single_label", found, labels, "accuracy", 0.907, "t") == 0.9
    for evaluated in (0.92, 0.1):  # 0.1: the labels are swapped
        with pytest.raises(LogitsError, match=r"t: accuracy of the cached validation logits is 0\.900"):
            gate.check_quality("single_label", found, labels, "accuracy", evaluated, "t")


def test_a_single_row_that_rounds_to_the_other_side_is_no_reason_to_refuse() -> None:
    found, labels = answers(18, rows=20)
    assert gate.check_quality("single_label", found, labels, "accuracy", 0.95, "t") == 0.9


def test_a_teacher_from_elsewhere_with_swapped_labels_is_refused() -> None:
    found, labels = answers(30)
    with pytest.raises(LogitsError, match=r"worse than guessing \(0\.500\); is the label order swapped"):
        gate.check_quality("single_label", found, labels, "accuracy", None, "t")
    found, labels = answers(200)
    assert gate.check_quality("single_label", found, labels, "accuracy", None, "t") > 0.6


def test_several_teachers_make_one_target() -> None:
    one, two = (np.random.default_rng(s).normal(size=(4, 3)).astype(np.float32) for s in (0, 1))
    found = logits.mean("single_label", [one, two], "mean_logits")
    np.testing.assert_allclose(found, (one + two) / 2, rtol=1e-6)
    assert found.dtype == np.float32

    def log_softmax(x: Floats) -> Floats:
        return np.asarray(x - np.log(np.exp(x).sum(1, keepdims=True)))

    found = logits.mean("single_label", [one, two], "mean_log_probs")
    np.testing.assert_allclose(found, (log_softmax(one) + log_softmax(two)) / 2, rtol=1e-5)
    found = logits.mean("multi_label", [one, two], "mean_log_probs")
    np.testing.assert_allclose(found, (one + two) / 2, rtol=1e-6)


def test_a_second_process_waits_for_the_first_to_leave_the_cache(
    cached: Pass, capsys: pytest.CaptureFixture[str]
) -> None:
    import threading

    from filelock import FileLock

    lock = FileLock(cached.folder / ".lock", thread_local=False)
    lock.acquire()
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(cached()))
    thread.start()
    thread.join(0.5)
    assert done == []
    lock.release()
    thread.join(30)
    assert done == [0]
    assert "another process is caching these logits" in capsys.readouterr().err
