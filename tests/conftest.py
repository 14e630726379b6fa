"""Tiny models and small generated data, so that the tests need neither a network nor minutes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread only waits
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="distill-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

# `pytest tests/test_fuzz.py --hypothesis-profile soak` tries many more inputs, and others each time.
settings.register_profile(
    "suite",
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("soak", settings.get_profile("suite"), max_examples=2000, derandomize=False)
settings.load_profile("suite")

GOOD = "good great fine lovely superb warm bright clever".split()
BAD = "bad poor dull awful weak cold dreary stupid".split()
PLAIN = "the a film story actor scene music plot and of with in it was".split()
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def sentence(rng: np.random.Generator, label: int, words: int) -> str:
    """Write a document whose class shows in about a third of its words."""
    mood = GOOD if label else BAD
    return " ".join(str(rng.choice(mood if rng.random() < 0.35 else PLAIN)) for _ in range(words))


def documents(count: int, seed: int = 0, longest: int = 60) -> list[tuple[str, int]]:
    """Make ``count`` documents of both classes, 4 to ``longest`` words, no two alike."""
    rng = np.random.default_rng(seed)
    return [(f"{sentence(rng, i % 2, int(rng.integers(4, longest)))} n{i}", i % 2) for i in range(count)]


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label")) -> Path:
    """Write a csv file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_tokenizer(folder: Path) -> Path:
    """Write a WordPiece tokenizer as BERT has it."""
    from transformers import BertTokenizer

    words = [
        *GOOD,
        *BAD,
        *PLAIN,
        *"abcdefghijklmnopqrstuvwxyz0123456789",
        *(f"##{c}" for c in "0123456789abcdefghijklmnopqrstuvwxyz"),
    ]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordPiece tokenizer as BERT has it."""
    return write_tokenizer(tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture(scope="session")
def roberta_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with RoBERTa's special tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    folder = tmp_path_factory.mktemp("bpe")
    trainer = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(
        [" ".join([*GOOD, *BAD, *PLAIN])] * 3, vocab_size=400, special_tokens=specials
    )
    trainer.save_model(str(folder))
    RobertaTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: Path) -> Path:
    """An empty runs folder with a migrated MLflow store (making one takes seconds)."""
    import shutil

    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(mlflow_store, folder / "mlflow.db")
    monkeypatch.setenv("DISTILL_RUNS", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty sqlite store, to be copied."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}")
    return file


@contextmanager
def power_cut(step: int) -> Iterator[None]:
    """Let the training loop die as the block's ``step``-th optimizer step begins, counted from 1."""
    from distill import training

    real, made = training._step, 0

    def dies(*arguments: Any) -> dict[str, float]:
        nonlocal made
        made += 1
        if made == step:
            raise RuntimeError("power cut")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            yield


def write_recipe(path: Path, tokenizer: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write a recipe over a csv of 160 documents: a tiny BigBird teaches a tiny BERT, both from scratch.

    ``changes`` are dotted keys laid over it: ``{"teacher.train.seed": 3}``.
    """
    import yaml

    source = path.with_name("reviews.csv")
    if not source.exists():
        write_csv(source, documents(160))
    train = {
        "epochs": 1.0,
        "batch_size": 8,
        "tokens_per_batch": 1024,
        "learning_rate": 0.001,
        "precision": "fp32",
    }
    recipe: dict[str, Any] = {
        "description": "tiny",
        "experiment": "tests",
        "data": {
            "source": str(source),
            "splits": {
                "test": {"from": "train", "rows": 30},
                "validation": {"from": "train", "rows": 20},
                "transfer": {"from": "train", "rows": 60},
                "train": {"from": "train"},
            },
        },
        "task": {"labels": ["bad", "good"]},
        "teacher": {
            "architecture": "bigbird", "tokenizer": str(tokenizer), "config": dict(TINY), "max_length": 128,
            "block_size": 4, "random_blocks": 1, "train": dict(train),
        },
        "student": {
            "architecture": "bert_miniature", "checkpoint": None, "max_length": 16, "view": "head_tail",
            "config": dict(TINY), "train": dict(train),
        },
    }  # fmt: skip
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        part = recipe
        for step in parents:
            part = part.setdefault(step, {})
        part[last] = value
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def forked(*works: Callable[[], object]) -> list[int]:
    """Do each work in a child forked from this process, side by side; return exit codes, of signals negative.

    A child has what has been imported and built, and is killed, starved or limited without harm to this process.
    """
    children = []
    for work in works:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of xdist: no child uses them
            child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(200)  # a child that hangs is no reason for the tests to
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """Mount a disk of so many bytes, as in ``"8m"``; where that may not be done the test is skipped."""
    place.mkdir()
    asked = ["/bin/mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    mounted = subprocess.run(asked, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["/bin/umount", str(place)], check=True)


Write = Callable[..., Path]


@pytest.fixture
def recipe_file(tmp_path: Path, tokenizer_folder: Path) -> Write:
    """Write the recipe of :func:`write_recipe`: ``recipe_file({"teacher.train.seed": 3})``."""

    def write(changes: dict[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        return write_recipe(tmp_path / name, tokenizer_folder, changes)

    return write


def distill(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the true command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "distill", *arguments],
        capture_output=True, text=True, timeout=300, env=os.environ | environment,
    )  # fmt: skip
