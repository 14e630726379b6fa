"""What several processes make together is what one makes, and one that is lost costs the steps since its checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Write, documents
from ranks import together

from distill import (
    catalog,
    checkpoint,
    data,
    fitting,
    inference,
    models,
    pretraining,
    processes,
    sharding,
    tracking,
    training,
)
from distill import recipe as recipes
from distill.batching import Batch, collate
from distill.encoding import Encoded, encode_texts
from distill.errors import DataError, Lost, UsageError
from distill.losses import Objective
from distill.masking import HeldOut
from distill.models import Classifier
from distill.runs import Run, RunFolder, create
from distill.schema import Loss, Train
from distill.tasks import Floats, TaskSpec, quality
from distill.training import train

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

TASK = TaskSpec("single_label", ("bad", "good"), "accuracy")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS: dict[str, Any] = {
    "epochs": 4.0, "batch_size": 8, "tokens_per_batch": 96, "learning_rate": 1e-4, "precision": "fp32",
    "evaluate_every": 5,
}  # fmt: skip

Weights = dict[str, Floats]


def build(tokenizer: Path, engine: str = "packed", **config: Any) -> Classifier:
    schema = catalog.load("teacher", "bert").Config
    fields = {"architecture": "bert", "tokenizer": str(tokenizer), "max_length": 64, "engine": engine}
    return models.build(
        schema.model_validate({**fields, "config": {**TINY, **config}}), "teacher", TASK, seed=0
    )


def rows(model: Classifier, count: int) -> Encoded:
    texts = documents(count, longest=30)
    found = encode_texts(model.tokenizer, [[(text, None) for text, _ in texts]], model.config)
    labels = np.array([label for _, label in texts])
    return Encoded(
        **{
            **vars(found),
            "labels": labels,
            "labelled": np.ones(count, np.bool_),
            "row_id": np.arange(count),
        }
    )


def learn(
    tokenizer: Path, path: Path, config: dict[str, Any], any_processes: bool = False, engine: str = "packed"
) -> tuple[Weights, list[list[int]]]:
    """Train in this process and its companions; return the last weights, and the documents of each step here."""
    seen: list[list[int]] = []
    step = training._step

    def begin(*given: Any, **more: Any) -> dict[str, float]:
        seen.append([])
        return step(*given, **more)

    def gather(data: Encoded, indices: Any, *more: Any) -> Batch:
        seen[-1].extend(indices.tolist())
        return collate(data, indices, *more)

    patch = pytest.MonkeyPatch()  # of a process that ends with its work
    patch.setattr(training, "_step", begin)
    patch.setattr(training, "collate", gather)
    patch.setattr(tracking, "sync", lambda folder: True)
    model, accelerator = build(tokenizer, engine, **config), inference.make_accelerator("fp32")
    folder, best = RunFolder(path), iter(range(99))

    def evaluate(model: Classifier) -> dict[str, float]:
        logits = inference.predict_all(model, rows(model, 31), 96, "fp32", accelerator)
        return {"accuracy": next(best) + float(logits[0, 0] * 0)}

    with fitting.working(folder):
        train(
            model, rows(model, 40), Objective("single_label", [Loss(kind="hard")]),
            Train.model_validate(SETTINGS), evaluate, "accuracy",
            folder, accelerator, {"recipe": "a", "processes": accelerator.num_processes},
            any_processes=any_processes,
        )  # fmt: skip
    weights = sharding.weights(model.model)
    found = {name: weight.numpy() for name, weight in weights.items()}
    if processes.is_main():
        model.save(folder.model, weights)
    return found, seen


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make a run's folder."""
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path))

    def make(name: str) -> Path:
        return create(Run(name, "teacher", name, "r", "tests", "bert", 0, 0.0), "recipe: a\n").path

    return make


NewRun = Callable[[str], Path]


def apart(one: Weights, other: Weights) -> float:
    """Return the largest difference of any weight."""
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_two_processes_see_the_documents_of_one_and_end_in_its_weights(
    tokenizer_folder: Path, run: NewRun
) -> None:
    alone, seen = together(1, learn, tokenizer_folder, run("alone"), NO_DROPOUT)[0]
    both = together(2, learn, tokenizer_folder, run("both"), NO_DROPOUT)
    assert len(seen) == 20
    assert [sorted(documents) for documents in seen] == [
        sorted(first + second) for first, second in zip(both[0][1], both[1][1], strict=True)
    ]
    assert all(both[0][1]), both[1][1]
    assert apart(alone, both[0][0]) < 1e-6
    assert apart(both[0][0], both[1][0]) == 0


def measure(tokenizer: Path, recipe_file: Path) -> list[Any]:
    """Measure a classifier on 31 documents, and a masked language model on the windows of held-out text."""
    model, accelerator = build(tokenizer), inference.make_accelerator("fp32")
    documents = rows(model, 31)
    logits = inference.predict_all(model, documents, 96, "fp32", accelerator)
    recipe = recipes.load(str(recipe_file))
    masked = pretraining.build(recipe)
    windows = pretraining._pack(masked, data.load(recipe).splits["validation"], "validation")
    assert len(windows) % 2
    assert len(windows) % 3
    found = HeldOut(windows, masked.masking).measure(masked, 64, accelerator)
    return [quality("single_label", logits, documents.labels), logits.tobytes(), found]


def test_figures_are_the_same_to_the_bit_on_one_two_and_three_processes(
    tokenizer_folder: Path, recipe_file: Write
) -> None:
    file = recipe_file({"student.max_length": 28})
    alone = measure(tokenizer_folder, file)
    assert alone[0]["nll"] > 0
    for world in (2, 3):
        assert together(world, measure, tokenizer_folder, file) == [alone] * world


def lose(number: int, rank: int, tokenizer: Path, path: Path, **more: Any) -> None:
    """Train, and let one of the processes be killed or stopped as the eighth step of twenty begins."""
    step, made = training._step, 0

    def interrupted(*given: Any, **more: Any) -> dict[str, float]:
        nonlocal made
        made += 1
        if made == 8 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), number)
        return step(*given, **more)

    pytest.MonkeyPatch().setattr(training, "_step", interrupted)
    learn(tokenizer, path, NO_DROPOUT, **more)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_costs_the_steps_since_the_checkpoint(
    number: int, rank: int, tokenizer_folder: Path, run: NewRun
) -> None:
    folder = RunFolder(run("lost"))
    answers = together(
        2, lose, number, rank, tokenizer_folder, folder.path,
        hanging=number == signal.SIGSTOP, DISTILL_TIMEOUT="4" if number == signal.SIGSTOP else "60",
    )  # fmt: skip
    left = answers[1 - rank]
    assert isinstance(left, Lost), left
    assert "\n" not in str(left)
    assert left.exit_code == 75
    assert folder.read().status == "interrupted"
    assert checkpoint.latest(folder.checkpoints) == folder.checkpoints / "step-000000005"
    answers = together(2, learn, tokenizer_folder, folder.path, NO_DROPOUT)
    assert len(answers[0][1]) == 15, "steps that were left"
    assert folder.read().status == "finished"


def test_a_run_goes_on_with_another_number_of_processes_where_it_may(
    tokenizer_folder: Path, run: NewRun
) -> None:
    whole, _ = together(1, learn, tokenizer_folder, run("whole"), NO_DROPOUT)[0]
    path = run("moved")
    together(2, lose, signal.SIGKILL, 1, tokenizer_folder, path)
    refused = together(1, learn, tokenizer_folder, path, NO_DROPOUT)[0]
    assert isinstance(refused, DataError)
    assert str(refused) == (
        "moved: cannot be resumed: processes was 2, and is 1 now; --any-processes allows that"
    )
    moved, seen = together(1, learn, tokenizer_folder, path, NO_DROPOUT, True)[0]
    assert len(seen) == 15
    assert apart(whole, moved) < 1e-6


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip
WRAPS = {
    "packed": {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
    "stock": {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"},
}


def cut_up() -> None:
    """Let Accelerate cut models up on CPUs, too, where it leaves that out by itself."""
    from accelerate.utils import DistributedType

    processes.state().distributed_type = DistributedType.MULTI_GPU


def learn_in_parts(number: int, engine: str, tokenizer: Path, path: Path) -> Any:
    """Train a model that is cut up; a process is killed as the eighth step begins, where ``number`` is a signal."""
    cut_up()
    if number:
        lose(number, 1, tokenizer, path, engine=engine)
    return learn(tokenizer, path, NO_DROPOUT, engine=engine)


@pytest.mark.parametrize("engine", ["packed", "stock"])
def test_a_model_that_is_cut_up_ends_in_the_weights_of_a_whole_one_and_goes_on(
    engine: str, tokenizer_folder: Path, run: NewRun
) -> None:
    alone, _ = together(1, learn, tokenizer_folder, run("alone"), NO_DROPOUT, False, engine)[0]
    environment: Any = {**FSDP2, **WRAPS[engine]}
    path = run("parts")
    both = together(2, learn_in_parts, 0, engine, tokenizer_folder, path, **environment)
    assert apart(alone, both[0][0]) < 1e-6
    saved = models.load(path / "model").model.state_dict()
    assert apart(both[0][0], {name: weight.numpy() for name, weight in saved.items()}) == 0
    assert apart(both[0][0], both[1][0]) == 0
    path = run("lost")
    answers = together(2, learn_in_parts, signal.SIGKILL, engine, tokenizer_folder, path, **environment)
    assert isinstance(answers[0], Lost)
    again = together(2, learn_in_parts, 0, engine, tokenizer_folder, path, **environment)
    assert len(again[0][1]) == 15
    assert apart(both[0][0], again[0][0]) == 0


@pytest.mark.parametrize(
    ("on", "engine", "norms", "said"),
    [
        (False, "stock", False, "Accelerate leaves it out on CPUs"),
        (True, "packed", False, "--set teacher.engine=stock"),
        (True, "stock", True, "set it to false"),
    ],
)
def test_what_cannot_be_cut_up_is_refused(
    on: bool, engine: str, norms: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**FSDP2, **WRAPS["stock"]}.items():
        monkeypatch.setenv(name, value)
    sharding.check(SimpleNamespace(is_fsdp2=True), "stock", norms=False)
    with pytest.raises(UsageError, match=said):
        sharding.check(SimpleNamespace(is_fsdp2=on), engine, norms)
