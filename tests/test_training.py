"""The loop: what it learns, what it selects, and that a stop in the middle costs nothing."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import TINY, documents, forked, power_cut
from torch import Tensor

from distill import catalog, checkpoint, files, inference, memory, models, processes, progress, training
from distill.batching import collate, micro_batches
from distill.encoding import Encoded, concatenate, encode_texts
from distill.errors import DataError, Diverged, Interrupted, OutOfMemory
from distill.files import sha256_file
from distill.losses import Objective
from distill.models import Classifier, weights_hash
from distill.runs import RunFolder
from distill.schema import Loss, Schedule, Train
from distill.tasks import Floats, TaskSpec, quality
from distill.training import Evaluate, Trained, learning_rate, total_steps, train

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

TASK = TaskSpec("single_label", ("bad", "good"), "accuracy")
FAST = {"epochs": 2.0, "batch_size": 8, "tokens_per_batch": 256, "learning_rate": 1e-3, "precision": "fp32"}


def settings(**changes: Any) -> Train:
    return Train.model_validate({**FAST, **changes})


@pytest.fixture
def make(tokenizer_folder: Path) -> Callable[..., Classifier]:
    """Build a tiny BERT; its dropout is on unless it is said to be off."""

    def build(seed: int = 0, **config: Any) -> Classifier:
        fields = {"architecture": "bert", "tokenizer": str(tokenizer_folder), "max_length": 64}
        schema = catalog.load("teacher", "bert").Config
        return models.build(
            schema.model_validate({**fields, "config": {**TINY, **config}}), "teacher", TASK, seed
        )

    return build


Make = Callable[..., Classifier]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def labelled(model: Classifier, count: int, seed: int = 0, *, known: bool = True) -> Encoded:
    rows = documents(count, seed, longest=30)
    found = encode_texts(model.tokenizer, [[(text, None) for text, _ in rows]], model.config)
    labels = np.array([label for _, label in rows])
    if not known:
        labels = 1 - labels  # wrong ones: whoever reads them learns nonsense
    ids = np.arange(count) + 1000 * seed
    return Encoded(**{**vars(found), "labels": labels, "labelled": np.full(count, known), "row_id": ids})


HARD = Objective("single_label", [Loss(kind="hard")])


class Fit:
    """One run folder in which training may be started again and again."""

    def __init__(self, path: Path, make: Make, rows: int = 40, **changes: Any) -> None:
        path.mkdir(exist_ok=True)
        self.folder = RunFolder(path)
        self.make, self.changes = make, changes
        self.model = make()
        self.data = labelled(self.model, rows)
        self.evaluations = 0

    def evaluate(self, model: Classifier) -> dict[str, float]:
        self.evaluations += 1
        held_out = labelled(model, 30, seed=1)
        accelerator = inference.make_accelerator("fp32")
        found = inference.predict_all(model, held_out, 1024, "fp32", accelerator)
        return quality("single_label", found, held_out.labels)

    def __call__(
        self,
        evaluate: Evaluate | None = None,
        meaning: dict[str, Any] | None = None,
        objective: Objective = HARD,
        lookup: Callable[[Any], Floats] | None = None,
        on_evaluation: Callable[[], object] = lambda: None,
    ) -> Trained:
        self.model = self.make()
        return train(
            self.model, self.data, objective, settings(**self.changes), evaluate or self.evaluate, "accuracy",
            self.folder, inference.make_accelerator("fp32"), meaning or {"recipe": "a"}, lookup, on_evaluation,
        )  # fmt: skip

    @property
    def hash(self) -> str:
        return weights_hash(self.model.model)


def test_a_tiny_model_learns_the_generated_data(tmp_path: Path, make: Make) -> None:
    fit = Fit(tmp_path / "run", make, rows=160, epochs=6.0, learning_rate=3e-3)
    done = fit()
    assert done.steps == 120
    assert done.best > 0.75
    assert fit.evaluate(fit.model)["accuracy"] == done.best


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal in the middle of a step."""
    real = training._step
    made = 0

    def counted(*arguments: Any) -> dict[str, float]:
        nonlocal made
        made += 1
        if made == step:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(training, "_step", counted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    step: int, number: int, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An epoch has five steps; the model is measured after each third.
    whole = Fit(tmp_path / "whole", make, evaluate_every=3)
    expected = whole()
    cut = Fit(tmp_path / "cut", make, evaluate_every=3)
    with monkeypatch.context() as patch:
        stop_after(patch, step, number)
        with pytest.raises(Interrupted, match=f"stopped at step {step} of 10"):
            cut()
    done = cut()
    assert cut.hash == whole.hash
    assert (done.steps, done.best, done.best_step, done.tokens) == (
        expected.steps, expected.best, expected.best_step, expected.tokens,
    )  # fmt: skip
    assert cut.evaluations == whole.evaluations == 4


def test_a_sigterm_that_comes_twice_at_once_is_one_wish_and_a_later_one_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with training.listening() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        monkeypatch.setattr(training, "ONE_WISH", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_killed_goes_on_from_its_last_evaluation_to_the_same_bits(
    tmp_path: Path, make: Make
) -> None:
    whole = Fit(tmp_path / "whole", make, evaluate_every=3)
    whole()
    cut = Fit(tmp_path / "cut", make, evaluate_every=3)
    with power_cut(6):
        cut()
    assert [p.name for p in cut.folder.checkpoints.iterdir()] == ["step-000000003"]
    cut()
    assert cut.hash == whole.hash


def test_a_run_killed_at_any_write_of_a_file_ends_with_the_same_bits(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Fit(tmp_path / "whole", make, rows=16, max_steps=3, evaluate_every=1)
    whole(evaluate=same)
    for write in itertools.count(1):
        cut = copy(whole)
        cut.folder = RunFolder(tmp_path / str(write))
        cut.folder.path.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(files, "_instants", itertools.count(1))
            patch.setenv("DISTILL_DIE_AT_WRITE", str(write))
            (code,) = forked(lambda: cut(evaluate=same))  # noqa: B023
        if code == 0:
            break
        assert code == -signal.SIGKILL
        (code,) = forked(lambda: cut(evaluate=same))  # noqa: B023
        assert code == 0
        assert checkpoint_hash(cut) == checkpoint_hash(whole), f"killed at write {write}"
        left = sorted(p.name for p in cut.folder.checkpoints.iterdir())
        assert left[-2:] == ["step-000000002", "step-000000003"], "nothing half written"
    # Each of three checkpoints: five files, each before and after its rename, and then the folder.
    assert write == 3 * (5 * 2 + 2) + 1


@contextmanager
def rank_of_two(rank: int, port: int) -> Iterator[None]:
    """Be one of two processes, as torchrun starts them."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
    yield
    processes.leave()


def on_two_ranks(work: Callable[[int], object]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        with rank_of_two(rank, port):
            work(rank)

    assert forked(partial(one, 0), partial(one, 1)) == [0, 0]


def test_two_ranks_halve_their_batches_and_leave_steps_out_together(tmp_path: Path, make: Make) -> None:
    def fit(name: str, tokens: int) -> Fit:
        return Fit(tmp_path / name, make, batch_size=16, tokens_per_batch=tokens, skip_nonfinite=2)

    asked, short = fit("asked", 64), fit("short", 256)

    def plain(rank: int) -> None:
        asked(evaluate=same, objective=SOFT, lookup=no_number_for(7))

    def starved(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:  # the other one has room
                room_for(patch, 80)
            short(evaluate=same, objective=SOFT, lookup=no_number_for(7))
        (tmp_path / f"rank{rank}").write_text(weights_hash(short.model.model))

    on_two_ranks(plain)
    on_two_ranks(starved)
    assert checkpoint_hash(short) == checkpoint_hash(asked)
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    assert [entry["not_finite"] for entry in journal(short, "not_finite")] == [[7], [7]]
    assert journal(short, "metrics")[0]["metrics"] == {"train/tokens_per_batch": 64}


def test_no_random_state_is_kept_for_every_step_is_seeded(tmp_path: Path, make: Make) -> None:
    def disturbing(model: Classifier) -> dict[str, float]:
        torch.manual_seed(next(seeds))
        np.random.seed(next(seeds))
        return {"accuracy": 0.5}

    seeds = iter(range(100))
    whole, cut = (Fit(tmp_path / name, make, evaluate_every=3) for name in ("whole", "cut"))
    whole(evaluate=lambda model: {"accuracy": 0.5})
    with power_cut(6):
        cut(evaluate=disturbing)
    cut(evaluate=disturbing)
    assert checkpoint_hash(cut) == checkpoint_hash(whole)


@pytest.mark.parametrize("file", ["model", "optimizer", "best", "state"])
def test_a_second_ctrl_c_while_it_saves_ends_at_once_and_costs_no_bit(
    file: str, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (Fit(tmp_path / name, make, evaluate_every=3) for name in ("whole", "cut"))
    whole(evaluate=same)
    real = sha256_file

    def hashing(path: Path) -> str:
        if path.stem == file and "step-000000004" in str(path):
            os.kill(os.getpid(), signal.SIGINT)
        return real(path)

    with monkeypatch.context() as patch:
        stop_after(patch, 4, signal.SIGINT)
        patch.setattr(checkpoint, "sha256_file", hashing)
        with pytest.raises(KeyboardInterrupt):
            cut(evaluate=same)
    assert [path.name for path in cut.folder.checkpoints.iterdir()] == ["step-000000003"]
    cut(evaluate=same)
    assert checkpoint_hash(cut) == checkpoint_hash(whole)


def test_measuring_a_finished_model_shows_its_progress(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    model = make()
    data, accelerator = labelled(model, 30), inference.make_accelerator("fp32")
    quiet = inference.predict_all(model, data, 256, "fp32", accelerator)
    assert "tokens" not in capsys.readouterr().err
    shown = inference.predict_all(model, data, 256, "fp32", accelerator, "s: measuring test")
    total = f"{int(data.tokens.sum()):,}"
    assert f"s: measuring test: {total}/{total} tokens" in capsys.readouterr().err
    assert np.array_equal(quiet, shown)


def test_dropout_is_on_and_the_seed_settles_it(tmp_path: Path, make: Make) -> None:
    first, same = Fit(tmp_path / "a", make), Fit(tmp_path / "b", make)
    first(), same()
    assert first.hash == same.hash
    other = Fit(tmp_path / "c", make, seed=1)
    other()
    assert other.hash != first.hash
    still = Fit(tmp_path / "d", lambda: make(**NO_DROPOUT))
    still()
    assert still.hash != first.hash


MEANING = {"recipe": "epochs: 2\nseed: 0\n", "data": "abc"}


@pytest.fixture
def stopped(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """A run that was stopped at step 4 of 10, after its evaluation at 3."""
    fit = Fit(tmp_path / "run7", make, evaluate_every=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, signal.SIGTERM)
        with pytest.raises(Interrupted):
            fit(meaning=MEANING)
    return fit


@pytest.mark.parametrize(
    ("meaning", "said"),
    [
        ({"recipe": "epochs: 2\nseed: 1\n", "data": "abc"}, "recipe was seed: 0, and is seed: 1 now"),
        ({"recipe": "epochs: 2\n", "data": "abc"}, "recipe was seed: 0, and is absent now"),
        ({"recipe": "epochs: 2\nseed: 0\n", "data": "xyz"}, "data was abc, and is xyz now"),
    ],
)
def test_a_resume_with_something_else_is_refused_with_the_difference(
    meaning: dict[str, Any], said: str, stopped: Fit
) -> None:
    with pytest.raises(DataError) as caught:
        stopped(meaning=meaning)
    assert str(caught.value) == f"run7: cannot be resumed: {said}"


def damage(path: Path, harm: str) -> None:
    content = bytearray(path.read_bytes())
    if harm == "lose":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("file", ["model", "optimizer", "best", "state", "manifest"])
@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_stands_in(
    file: str, harm: str, stopped: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = stopped.folder.checkpoints / "step-000000004"
    path = next(newest.glob(f"{file}.*"))
    damage(path, harm)
    assert checkpoint.latest(stopped.folder.checkpoints) == newest.with_name("step-000000003")
    told = capsys.readouterr().err
    assert told.startswith("run7: step-000000004/")
    assert path.name in told or file == "manifest"
    assert told.endswith("going on from step-000000003\n")


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(
    tmp_path: Path, make: Make, stopped: Fit
) -> None:
    whole = Fit(tmp_path / "whole", make, evaluate_every=3)
    whole(meaning=MEANING)
    damage(stopped.folder.checkpoints / "step-000000004" / "optimizer.safetensors", "flip")
    with power_cut(4):  # at the seventh step, after one more checkpoint
        stopped(meaning=MEANING)
    kept = sorted(path.name for path in stopped.folder.checkpoints.iterdir())
    assert kept == ["step-000000003", "step-000000006"], "never the damaged one in a whole one's place"
    stopped(meaning=MEANING)
    assert stopped.hash == whole.hash


def test_when_every_checkpoint_is_damaged_the_run_is_refused_and_nothing_is_thrown_away(stopped: Fit) -> None:
    for step, file in ((4, "state.json"), (3, "model.safetensors")):
        damage(stopped.folder.checkpoints / f"step-{step:09d}" / file, "cut")
    with pytest.raises(DataError, match=r"run7: every checkpoint is damaged") as caught:
        stopped(meaning=MEANING)
    assert "step-000000004/state.json, step-000000003/model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(list(stopped.folder.checkpoints.iterdir())) == 2


def test_what_a_killed_process_left_half_written_is_neither_read_nor_kept(stopped: Fit) -> None:
    folder = stopped.folder.checkpoints
    half = folder / ".step-000000009.12345678.tmp"
    half.mkdir()
    (half / "model.safetensors").touch()
    assert checkpoint.latest(folder) == folder / "step-000000004"
    stopped(meaning=MEANING)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000000009", "step-000000010"]


def scripted(*figures: float) -> Evaluate:
    """Evaluate to these figures, one after another."""
    rest = list(figures)
    return lambda model: {"accuracy": rest.pop(0)}


def test_patience_ends_a_run_that_no_longer_gets_better(tmp_path: Path, make: Make) -> None:
    fit = Fit(tmp_path / "run", make, evaluate_every=1, patience=2)
    done = fit(evaluate=scripted(0.5, 0.7, 0.6, 0.7, 0.9))
    assert (done.steps, done.best, done.best_step) == (4, 0.7, 2)


def test_the_model_holds_the_weights_of_its_best_evaluation_afterwards(tmp_path: Path, make: Make) -> None:
    fit = Fit(tmp_path / "run", make, evaluate_every=2)
    seen: list[str] = []
    figures = iter([0.5, 0.9, 0.7, 0.8, 0.9])

    def evaluate(model: Classifier) -> dict[str, float]:
        seen.append(weights_hash(model.model))
        return {"accuracy": next(figures)}

    done = fit(evaluate=evaluate)
    assert done.best_step == 4
    assert fit.hash == seen[1] != seen[-1]


def test_the_journal_has_every_evaluation_and_the_learning_rate(tmp_path: Path, make: Make) -> None:
    fit, told = Fit(tmp_path / "run", make), []
    fit(on_evaluation=lambda: told.append(1))
    lines = [e for e in fit.folder.entries() if "eval/accuracy" in e["metrics"]]
    assert [line["step"] for line in lines] == [5, 10]
    assert told == [1, 1]
    assert lines[-1]["metrics"]["train/learning_rate"] == pytest.approx(1e-4)
    assert {"train/loss", "train/loss_hard", "eval/nll"} <= lines[-1]["metrics"].keys()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_own_code(tmp_path: Path, make: Make) -> None:
    fit = Fit(tmp_path / "run", make)

    def lookup(rows: Any) -> Floats:
        return np.full((len(rows), 2), np.nan, np.float32)

    with pytest.raises(Diverged, match=r"run: the loss is not finite at step 1 .*learning_rate") as caught:
        fit(objective=Objective("single_label", [Loss(kind="soft")]), lookup=lookup)
    assert caught.value.exit_code == 6
    assert not fit.folder.checkpoints.exists()


SOFT = Objective("single_label", [Loss(kind="soft")])


def no_number_for(*bad: int) -> Callable[[Any], Floats]:
    """Look teacher logits up that are NaN for these rows."""

    def lookup(rows: Any) -> Floats:
        return np.where(np.isin(rows, bad)[:, None], np.float32(np.nan), teacher_logits(rows))

    return lookup


def journal(fit: Fit, event: str) -> list[dict[str, Any]]:
    return [entry for entry in fit.folder.entries() if entry["event"] == event]


def test_a_step_without_a_finite_loss_is_left_out_and_its_rows_are_named(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = Fit(tmp_path / "run", make, max_steps=1, skip_nonfinite=1)
    fit(objective=SOFT, lookup=no_number_for(*range(0, 40, 2)))
    assert fit.hash == weights_hash(make().model), "nothing of it was applied"
    (entry,) = journal(fit, "not_finite")
    assert (entry["step"], len(entry["rows"])) == (1, 8)
    assert entry["not_finite"] == sorted(row for row in entry["rows"] if row % 2 == 0)
    assert "run: the loss is not finite at step 1 (row id" in capsys.readouterr().err
    assert all(np.isfinite(value) for e in fit.folder.entries() for value in e["metrics"].values())


def test_steps_are_left_out_as_often_as_the_recipe_allows_and_the_last_good_checkpoint_stays(
    tmp_path: Path, make: Make
) -> None:
    # Two epochs: each row comes twice.
    fit = Fit(tmp_path / "run", make, evaluate_every=1, skip_nonfinite=1)
    with pytest.raises(Diverged, match=r"run: the loss is not finite at step \d+ \(row id 7\)") as caught:
        fit(evaluate=same, objective=SOFT, lookup=no_number_for(7))
    assert caught.value.exit_code == 6
    first, second = journal(fit, "not_finite")
    assert first["not_finite"] == second["not_finite"] == [7]
    kept = checkpoint.latest(fit.folder.checkpoints)
    assert kept is not None
    assert kept.name == f"step-{second['step'] - 1:09d}"
    fit = Fit(tmp_path / "other", make, skip_nonfinite=2)
    assert fit(evaluate=same, objective=SOFT, lookup=no_number_for(7)).steps == 10


@pytest.mark.parametrize("step", [3, 8])
def test_steps_that_were_left_out_are_counted_over_a_stop_and_a_resume(
    step: int, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(name: str) -> Fit:
        return Fit(tmp_path / name, make, skip_nonfinite=2)

    whole, cut = fit("whole"), fit("cut")
    whole(evaluate=same, objective=SOFT, lookup=no_number_for(7))
    with monkeypatch.context() as patch:
        stop_after(patch, step, signal.SIGTERM)
        with pytest.raises(Interrupted):
            cut(evaluate=same, objective=SOFT, lookup=no_number_for(7))
    cut(evaluate=same, objective=SOFT, lookup=no_number_for(7))
    assert checkpoint_hash(cut) == checkpoint_hash(whole)
    states = [
        json.loads((max(f.folder.checkpoints.iterdir()) / "state.json").read_text()) for f in (whole, cut)
    ]
    assert [state["skipped"] for state in states] == [2, 2]


class Steep(Objective):
    """A finite loss whose gradient is not."""

    def per_document(self, term: Loss, logits: Tensor, batch: Any) -> Tensor:
        return super().per_document(term, logits, batch) + (logits.sum(1) * 0).sqrt()


@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_a_gradient_that_is_not_finite_is_not_applied_either(
    clip_norm: float | None, tmp_path: Path, make: Make
) -> None:
    steep = Steep("single_label", [Loss(kind="hard")])
    fit = Fit(tmp_path / "run", make, max_steps=1, skip_nonfinite=1, clip_norm=clip_norm)
    fit(objective=steep)
    assert fit.hash == weights_hash(make().model)
    with pytest.raises(Diverged, match="other: the gradient is not finite at step 1: "):
        Fit(tmp_path / "other", make, clip_norm=clip_norm)(objective=steep)


def room_for(patch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Let a GPU of this size run out of memory; return the sizes of the batches that were tried."""
    real, tried = Classifier.forward, list[int]()

    def forward(self: Classifier, batch: Any, *more: Any) -> Any:
        tried.append(len(batch.token_ids))
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, batch, *more)

    patch.setattr(Classifier, "forward", forward)
    return tried


def test_a_batch_too_large_for_the_memory_is_halved_and_trains_as_if_it_had_been_asked_for(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Fit(tmp_path / "asked", make, tokens_per_batch=64)
    asked(evaluate=same)
    capsys.readouterr()
    short = Fit(tmp_path / "short", make, tokens_per_batch=256)
    with monkeypatch.context() as patch:
        tried = room_for(patch, 80)
        with power_cut(9):  # at step 7: the first was tried three times
            short(evaluate=same)
        assert max(tried[2:]) <= 64, "after 256 and 128"
    told = capsys.readouterr().err
    assert told.count("out of memory") == 1
    assert "short: out of memory at step 1 with train.tokens_per_batch=256: going on with 64;" in told
    # Gone on with, it does not try again what was too large.
    short(evaluate=same)
    assert "out of memory" not in capsys.readouterr().err
    assert checkpoint_hash(short) == checkpoint_hash(asked)


def test_a_process_without_memory_halves_its_batches(
    tmp_path: Path, make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    wide = {"intermediate_size": 8192}

    def one(name: str, tokens: int) -> Fit:
        build = partial(make, **wide)
        return Fit(tmp_path / name, build, 120, max_steps=1, batch_size=120, tokens_per_batch=tokens)

    fit = one("run", 4096)

    def starved() -> None:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20), resource.RLIM_INFINITY))
        fit(evaluate=same)

    assert forked(starved) == [0]
    told = capfd.readouterr().err
    assert told.count("out of memory") == 1
    (entry,) = (e for e in fit.folder.entries() if "train/tokens_per_batch" in e["metrics"])
    tokens = int(entry["metrics"]["train/tokens_per_batch"])
    asked = one("asked", tokens)
    asked(evaluate=same)
    assert checkpoint_hash(fit) == checkpoint_hash(asked)


def test_where_the_smallest_batch_is_too_large_the_run_ends_with_its_own_code(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Fit(tmp_path / "run", make)
    room_for(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match="out of memory with batches of 64 tokens") as caught:
        fit(evaluate=same)
    assert caught.value.exit_code == 5


def test_predicting_halves_its_batches_once_and_says_so_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make().eval()
    data, accelerator = labelled(model, 30), inference.make_accelerator("fp32")
    expected = inference.predict_all(model, data, 1024, "fp32", accelerator)
    tried = room_for(monkeypatch, 150)
    for _ in range(2):
        found = inference.predict_all(model, data, 1024, "fp32", accelerator)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(tried[len(tried) // 2 + 1 :]) <= 150, "what had no room is not tried again"
    assert (
        capsys.readouterr().err == "out of memory with batches of 1,024 tokens: going on with smaller ones\n"
    )
    room_for(monkeypatch, 0)
    with pytest.raises(OutOfMemory):
        inference.predict_all(model, data, 1024, "fp32", accelerator)


def test_a_model_whose_weights_burst_is_never_selected(tmp_path: Path, make: Make) -> None:
    # One step only: the loss was finite before it, and accuracy can be computed of NaN.
    fit = Fit(tmp_path / "run", make, max_steps=1, learning_rate=1e30, clip_norm=None)
    with pytest.raises(Diverged, match="not finite"):
        fit()


def test_a_learning_rate_beyond_reason_is_told(tmp_path: Path, make: Make) -> None:
    with pytest.raises(Diverged, match="not finite"):
        Fit(tmp_path / "run", make, learning_rate=1e20)()


def test_the_linear_schedule_warms_up_and_goes_down_to_zero() -> None:
    found = [learning_rate(settings(warmup_steps=2, learning_rate=1.0), s, 6) for s in range(7)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_the_cosine_schedule_is_half_a_cosine() -> None:
    found = [learning_rate(settings(schedule="cosine", learning_rate=2.0), s, 4) for s in range(5)]
    assert found == pytest.approx([1 + np.cos(np.pi * s / 4) for s in range(5)])


def test_the_constant_schedule_is_constant_after_its_warm_up() -> None:
    s = settings(schedule="constant", learning_rate=1.0, warmup_steps=2)
    assert [learning_rate(s, step, 10) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]


def test_a_warm_up_longer_than_the_run_is_cut_to_a_tenth() -> None:
    s = settings(warmup_steps=500, learning_rate=1.0)
    assert [learning_rate(s, step, 20) for step in (0, 1, 2)] == pytest.approx([0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 10), ({"epochs": 0.5}, 3), ({"epochs": 0.01}, 1), ({"max_steps": 4}, 4), ({"max_steps": 99}, 10)],
)
def test_steps_follow_from_epochs_and_end_at_max_steps(changes: dict[str, Any], expected: int) -> None:
    assert total_steps(settings(**changes), 40) == expected


def test_what_is_frozen_stays_and_the_rest_is_trained(tmp_path: Path, make: Make) -> None:
    before = make().model.state_dict()
    fit = Fit(tmp_path / "run", make, freeze_embeddings=True, freeze_layers=1)
    fit()
    after = fit.model.model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {n for n in before if n.startswith(("bert.embeddings.", "bert.encoder.layer.0."))}
    assert same == frozen


def test_biases_and_norms_do_not_decay(make: Make) -> None:
    optimizer = training.make_optimizer(make(), settings(weight_decay=0.3))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in others["params"])


TERMS: Sequence[Loss] = [
    Loss(kind="soft", temperature=2.0),
    Loss(kind="hard", weight=0.5),
    Loss(kind="dkd", weight=0.25, temperature=2.0),
]


def teacher_logits(rows: Any) -> Floats:
    """Make logits that are a function of the row id alone."""
    return np.stack([np.random.default_rng(int(r)).normal(size=2) for r in rows]).astype(np.float32)


def step_gradients(
    model: Classifier, data: Encoded, tokens: int, norms: bool = False
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Make one optimizer step over all rows and catch the gradients that it used."""
    accelerator = inference.make_accelerator("fp32")
    optimizer = training.make_optimizer(model, settings())
    caught: dict[str, Tensor] = {}

    def catch(*_: Any) -> None:
        caught.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(catch)
    chosen = settings(tokens_per_batch=tokens, clip_norm=None)
    objective = Objective("single_label", TERMS)
    values = training._step(
        model, model, data, np.arange(len(data)), data.longest_window, objective, chosen, optimizer,
        accelerator, teacher_logits, norms,
    )  # fmt: skip
    return values, caught


def half_labelled(model: Classifier) -> Encoded:
    return concatenate([labelled(model, 8), labelled(model, 12, seed=2, known=False)])


def test_the_cut_into_micro_batches_changes_no_gradient(make: Make) -> None:
    model = make(**NO_DROPOUT).train()
    data = half_labelled(model)
    assert len(micro_batches(data, np.arange(20), 64)) > 5
    assert len(micro_batches(data, np.arange(20), 10**6)) == 1
    values, few = step_gradients(make(**NO_DROPOUT).train(), data, 10**6)
    others, many = step_gradients(model, data, 64)
    assert values == pytest.approx(others, rel=1e-5)
    assert few.keys() == many.keys()
    for name, gradient in few.items():
        torch.testing.assert_close(many[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_each_term_is_a_mean_over_the_rows_that_it_applies_to(make: Make) -> None:
    model = make(**NO_DROPOUT).train()
    data = half_labelled(model)
    with torch.no_grad():
        logits = model(collate(data, range(20)))
    log_p = torch.log_softmax(logits, -1)
    hard = -log_p[:8].gather(1, torch.from_numpy(data.labels[:8, None])).mean()
    p = torch.softmax(torch.from_numpy(teacher_logits(data.row_id)) / 2, -1)
    soft = 4 * (p * (p.log() - torch.log_softmax(logits / 2, -1))).sum(-1)
    decoupled, soft = soft[:8].mean(), soft.mean()  # with two classes dkd is Hinton's, where there is a label
    values, _ = step_gradients(model, data, 64)
    assert values["loss_hard"] == pytest.approx(float(hard), rel=1e-5)
    assert values["loss_soft"] == pytest.approx(float(soft), rel=1e-5)
    assert values["loss_dkd"] == pytest.approx(float(decoupled), rel=1e-5)
    assert values["loss"] == pytest.approx(float(soft + 0.5 * hard + 0.25 * decoupled), rel=1e-5)


MOVING = Objective(
    "single_label",
    [
        Loss(kind="soft", weight=Schedule(start=1.0, end=0.0), temperature=Schedule(start=4.0, end=1.0)),
        Loss(kind="hard", weight=Schedule(start=0.0, end=1.0, shape="cosine", until=0.5)),
    ],
)


def same(model: Classifier) -> dict[str, float]:
    """Evaluate to one figure, in no time."""
    return {"accuracy": 0.5}


def test_a_run_with_schedules_that_was_stopped_ends_with_the_same_bits(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: str) -> Fit:
        return Fit(tmp_path / folder, make, rows=24, evaluate_every=2)

    whole, cut = fit("whole"), fit("cut")
    whole(evaluate=same, objective=MOVING, lookup=teacher_logits)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGTERM)
        with pytest.raises(Interrupted):
            cut(evaluate=same, objective=MOVING, lookup=teacher_logits)
    cut(evaluate=same, objective=MOVING, lookup=teacher_logits)
    last = [list(one.folder.entries())[-1]["metrics"] for one in (whole, cut)]
    moved = [{k: v for k, v in line.items() if "_per_second" not in k} for line in last]
    assert moved[0] == moved[1]
    assert checkpoint_hash(cut) == checkpoint_hash(whole)


def checkpoint_hash(fit: Fit) -> str:
    """Hash the last step's weights; the model holds those of its best evaluation."""
    return sha256_file(max(fit.folder.checkpoints.glob("step-*")) / "model.safetensors")


def test_scheduled_values_are_in_the_journal_beside_the_losses_and_fixed_ones_are_not(
    tmp_path: Path, make: Make
) -> None:
    fit = Fit(tmp_path / "run", make)
    fit(evaluate=same, objective=MOVING, lookup=teacher_logits)
    lines = {e["step"]: e["metrics"] for e in fit.folder.entries()}
    assert [line["train/weight_soft"] for line in lines.values()] == pytest.approx([5 / 9, 0.0])
    assert [line["train/temperature_soft"] for line in lines.values()] == pytest.approx([4 - 4 / 3, 1.0])
    assert [line["train/weight_hard"] for line in lines.values()] == [1.0, 1.0]
    assert not any("temperature_hard" in name for line in lines.values() for name in line)
    last = lines[10]
    assert last["train/loss"] == pytest.approx(last["train/loss_hard"])
    fixed = Fit(tmp_path / "fixed", make, max_steps=1)
    fixed(evaluate=same, objective=Objective("single_label", TERMS), lookup=teacher_logits)
    names = {name for entry in fixed.folder.entries() for name in entry["metrics"]}
    assert not any("weight" in name or "temperature" in name for name in names)


def test_the_norm_of_each_terms_gradient_is_exact_over_micro_batches(make: Make) -> None:
    model = make(**NO_DROPOUT).train()
    data = half_labelled(model)
    values, _ = step_gradients(make(**NO_DROPOUT).train(), data, 64, norms=True)
    objective = Objective("single_label", TERMS)
    batch = collate(data, range(20), teacher_logits(data.row_id))
    for term, name, count in zip(objective.terms, ("soft", "hard", "dkd"), (20, 8, 8), strict=True):
        model.zero_grad()
        torch.autograd.backward(objective.per_document(term, model(batch), batch).sum() / count)
        parts = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
        assert values[f"gradient_norm_{name}"] == pytest.approx(sum(parts) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_writing_gradient_norms_down_changes_no_weight(
    checkpointing: bool, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = training._step

    def step(*arguments: Any) -> dict[str, float]:
        asked.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(training, "_step", step)
    hashes, names = [], []
    for on in (False, True):
        fit = Fit(
            tmp_path / str(on), make, rows=48, evaluate_every=4, log_gradient_norms=on, tokens_per_batch=96,
            gradient_checkpointing=checkpointing, freeze_embeddings=True,
        )  # fmt: skip
        fit(evaluate=same, objective=Objective("single_label", TERMS), lookup=teacher_logits)
        hashes.append(checkpoint_hash(fit))
        names.append({name for entry in fit.folder.entries() for name in entry["metrics"]})
    assert hashes[0] == hashes[1]
    assert names[1] - names[0] == {f"train/gradient_norm_{name}" for name in ("soft", "hard", "dkd")}
    # At the steps that are logged, and at no others.
    assert [at + 1 for at, on in enumerate(asked[12:]) if on] == [4, 8, 10, 12]
    assert not any(asked[:12])


def test_labels_of_transfer_rows_are_never_used(tmp_path: Path, make: Make) -> None:
    objective = Objective("single_label", TERMS)
    hashes = []
    for labels in (0, 1):
        fit = Fit(tmp_path / f"run{labels}", make)
        data = half_labelled(fit.model)
        fit.data = Encoded(**{**vars(data), "labels": np.where(data.labelled, data.labels, labels)})
        fit(objective=objective, lookup=teacher_logits)
        hashes.append(fit.hash)
    assert hashes[0] == hashes[1]


def test_a_checkpoint_holds_no_pickle(stopped: Fit) -> None:
    names = {p.name for p in max(stopped.folder.checkpoints.iterdir()).iterdir()}
    assert names == {
        "model.safetensors", "optimizer.safetensors", "best.safetensors", "state.json", "manifest.json",
    }  # fmt: skip
    state = json.loads(max(stopped.folder.checkpoints.glob("*/state.json")).read_text())
    assert state["step"] == 4
    assert state["best_step"] == 3


def test_freed_memory_is_given_back_for_a_hundredth_of_the_time_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, released = 0.0, list[float]()

    def release() -> None:
        nonlocal now
        released.append(now)
        now += 0.05

    monkeypatch.setattr(memory, "release_memory", release)
    monkeypatch.setattr("distill.memory.time.monotonic", lambda: now)
    tidy = memory.Releases()
    while now < 100:
        tidy()
        now += 0.1
    assert 15 < len(released) <= 20
