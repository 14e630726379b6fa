"""A teacher beside its student: what is compared, what is refused, and what stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, documents
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from distill import catalog, inference, live, models, training
from distill.batching import Batch, collate, micro_batches
from distill.encoding import Encoded, encode_texts
from distill.errors import Interrupted, RecipeError, UsageError
from distill.files import sha256_file
from distill.live import Pair
from distill.losses import Objective
from distill.models import Classifier, weights_hash
from distill.runs import RunFolder
from distill.schema import Loss, Train
from distill.tasks import TaskSpec

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

TASK = TaskSpec("single_label", ("bad", "good"), "accuracy")
NARROW = {"hidden_size": 16, "intermediate_size": 32}
STILL = {**NARROW, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
INSIDE = [
    Loss(kind="cosine"),
    Loss(kind="hidden_mse"),
    Loss(kind="relation", relation_heads=4),
    Loss(kind="attention"),
    Loss(kind="attention", distance="mse"),
]
Make = Callable[..., Classifier]


def builder(tokenizer: Path) -> Make:
    """Build tiny classifiers of any architecture, with this tokenizer."""

    def build(architecture: str = "bert", seed: int = 0, config: Any = None, **fields: Any) -> Classifier:
        section = "teacher" if architecture in catalog.names("teacher") else "student"
        base: dict[str, Any] = {"architecture": architecture, "max_length": 32, **fields}
        foreign = {"fnet": ("num_attention_heads",), "distilbert": ("intermediate_size",)}.get(
            architecture, ()
        )
        sizes = {name: size for name, size in {**TINY, **(config or {})}.items() if name not in foreign}
        base = {"tokenizer": str(tokenizer), **base, "config": sizes}
        schema = catalog.load(section, architecture).Config
        return models.build(schema.model_validate(base), section, TASK, seed)

    return build


@pytest.fixture
def make(tokenizer_folder: Path) -> Make:
    return builder(tokenizer_folder)


def texts(count: int = 12) -> list[tuple[str, str | None]]:
    return [(text, None) for text, _ in documents(count, longest=50)]


def encoded(model: Classifier, count: int = 12) -> Encoded:
    found = encode_texts(model.tokenizer, [texts(count)], model.config)
    return Encoded(
        **{**vars(found), "labels": np.arange(count) % 2, "labelled": np.ones(count, bool),
           "row_id": np.arange(count)}
    )  # fmt: skip


def values(pair: Pair, batch: Batch) -> dict[int, Tensor]:
    with torch.no_grad():
        found: dict[int, Tensor] = pair.eval()(batch)[1]
    return found


@pytest.mark.parametrize("view", ["head", "chunks"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(view: str, make: Make) -> None:
    student, teacher = make(view=view), make()
    data = encoded(student)
    assert (data.window_counts.max() > 1) == (view == "chunks")
    for each in values(Pair(student, teacher, INSIDE, 0), collate(data, range(12))).values():
        assert each.shape == (12,)
        assert float(each.abs().max()) < 1e-6
    for each in values(Pair(student, make(seed=1), INSIDE, 0), collate(data, range(12))).values():
        assert float(each.min()) > 1e-6


@pytest.mark.parametrize("architecture", ["bert_miniature", "distilbert", "fnet"])
@pytest.mark.parametrize("teacher", ["bigbird", "longformer"])
def test_a_documents_value_is_a_mean_over_its_tokens_whatever_stands_beside_it(
    teacher: str, architecture: str, make: Make
) -> None:
    small = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    fields: dict[str, Any] = {"checkpoint": None, "config": small if architecture == "distilbert" else NARROW}
    if architecture == "fnet":
        fields["transform"] = "max_length"
    student = make(architecture, view="chunks", **fields)
    beside = make(teacher, **({"window": 8} if teacher == "longformer" else {}))
    terms = [Loss(kind="hidden_mse", layer_map="last"), Loss(kind="cosine")]
    if architecture != "fnet":
        terms.append(Loss(kind="relation", relation_heads=2))
    pair, data = Pair(student, beside, terms, 0), encoded(student)
    together = values(pair, collate(data, range(12)))
    alone = [values(pair, collate(data, [at])) for at in range(12)]
    single = Encoded(
        **{**vars(data), "documents": np.arange(len(data.windows)),
           **{name: np.zeros(len(data.windows) - 1, np.int64) for name in ("full_length", "labels", "labelled")},
           "row_id": np.arange(len(data.windows) - 1)}
    )  # fmt: skip
    windows = values(pair, collate(single, range(len(single))))
    sizes = np.diff(data.windows)
    for number in together:
        torch.testing.assert_close(torch.cat([one[number] for one in alone]), together[number])
        for at in range(12):
            span = slice(data.documents[at], data.documents[at + 1])
            expected = np.average(windows[number].numpy()[span], weights=sizes[span])
            assert float(together[number][at]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("term", "depths", "expected"),
    [
        ({}, (2, 6), [(0, 0), (1, 3), (2, 6)]),
        ({}, (4, 6), [(0, 0), (1, 2), (2, 3), (3, 5), (4, 6)]),
        ({"layer_map": "last"}, (2, 6), [(2, 6)]),
        ({"layer_map": [[0, 0], [2, 1]]}, (2, 6), [(0, 0), (2, 1)]),
        ({"kind": "attention"}, (2, 6), [(1, 3), (2, 6)]),
        ({"kind": "attention"}, (6, 2), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]),
        ({"kind": "cosine"}, (2, 6), [(2, 6)]),
        ({"kind": "relation"}, (2, 6), [(2, 6)]),
        ({"kind": "relation", "teacher_layer": 5}, (2, 6), [(2, 5)]),
    ],
)
def test_layers_are_mapped_as_the_term_says(
    term: dict[str, Any], depths: tuple[int, int], expected: list[tuple[int, int]]
) -> None:
    assert live.layer_pairs(Loss.model_validate({"kind": "hidden_mse", **term}), *depths) == expected


@pytest.mark.parametrize(
    ("term", "student", "teacher", "said"),
    [
        ({"kind": "hidden_mse", "layer_map": [[3, 1]]}, {}, {},
         "student.losses.1: layer 3 is out of range; the student has 2 layers"),
        ({"kind": "attention", "layer_map": [[1, 4]]}, {}, {},
         "student.losses.1: layer 4 is out of range; the teacher has 2 layers"),
        ({"kind": "relation", "teacher_layer": 3}, {}, {},
         "student.losses.1: layer 3 is out of range; the teacher has 2 layers"),
        ({"kind": "cosine", "project": False}, {"config": NARROW}, {},
         "student.losses.1: the student's states are 16 wide and the teacher's 32; set project: true"),
        ({"kind": "attention"}, {"config": {"num_attention_heads": 4}}, {},
         "student.losses.1: the student has 4 attention heads and the teacher 2; take kind: relation"),
        ({"kind": "relation", "relation_heads": 3}, {"config": NARROW}, {},
         "student.losses.1: relation_heads: 3 does not divide the widths 16 and 32; take a divisor of 16"),
        ({"kind": "relation"}, {"architecture": "fnet", "checkpoint": None}, {},
         "student.losses.1: the student has no queries and keys to compare; take kind: hidden_mse"),
        ({"kind": "attention"}, {}, {"architecture": "longformer", "window": 8},
         "student.losses.1: the teacher reads windows of student.max_length tokens with sparse attention; "
         "take kind: relation, or a student.max_length that it reads with full attention, if it has one"),
        ({"kind": "attention"}, {}, {"architecture": "bigbird", "block_size": 4, "random_blocks": 1},
         "student.losses.1: the teacher reads windows of student.max_length tokens with sparse attention; "
         "take kind: relation, or a student.max_length that it reads with full attention, if it has one"),
        ({"kind": "cosine"}, {}, {"engine": "stock"},
         "student.losses: the teacher (bert) runs by engine: stock, which shows no layers; take terms of logits"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line_before_any_training(
    term: dict[str, Any], student: dict[str, Any], teacher: dict[str, Any], said: str, make: Make
) -> None:
    terms = [Loss(kind="hard"), Loss.model_validate(term)]
    with pytest.raises(RecipeError) as caught:
        Pair(make(**student), make(**teacher), terms, 0)
    assert str(caught.value) == said


def test_a_bigbird_is_compared_in_attention_where_it_reads_with_full_attention(make: Make) -> None:
    student = make(max_length=28)  # (5 + 2 · 1) · 4: its last such length
    teacher = make("bigbird", block_size=4, random_blocks=1, max_length=64)
    found = values(Pair(student, teacher, [Loss(kind="attention")], 0), collate(encoded(student), range(12)))
    assert (found[0] > 0).all()


def test_both_must_read_the_same_tokens(make: Make, roberta_tokenizer_folder: Path) -> None:
    live.check_reading(make(), make("bigbird", max_length=64), texts())
    with pytest.raises(
        RecipeError, match=r"must have one tokenizer, and theirs differ .*take terms of logits"
    ):
        live.check_reading(make(), make(tokenizer=str(roberta_tokenizer_folder)), texts())
    with pytest.raises(RecipeError) as caught:
        live.check_reading(make(), make(max_length=16), texts())
    assert str(caught.value) == (
        "student.max_length is 32, and the teacher beside it reads 16 tokens; set student.max_length=16"
    )
    cased = make()
    cased.tokenizer.backend_tokenizer.normalizer = None
    shouted = [("GOOD film", None)]
    with pytest.raises(RecipeError, match="must have one tokenizer, and theirs differ; take terms of logits"):
        live.check_reading(make(), cased, shouted)


def test_logits_alone_and_several_teachers_are_refused_and_plain_terms_load_none() -> None:
    terms = [Loss(kind="hard"), Loss(kind="relation")]
    with pytest.raises(
        UsageError, match="relation needs the teacher itself, and --logits gives its logits alone"
    ):
        live.load_teacher(terms, [])
    with pytest.raises(UsageError, match="relation compares layers with those of one teacher, not 2"):
        live.load_teacher(terms, ["a", "b"])
    assert live.load_teacher([Loss(kind="soft")], ["a", "b"]) is None


def test_a_bridge_is_made_where_widths_differ_and_the_seed_settles_it(make: Make) -> None:
    terms = [Loss(kind="hidden_mse"), Loss(kind="relation"), Loss(kind="cosine")]
    first, same, other = (Pair(make(config=NARROW), make(), terms, seed) for seed in (3, 3, 4))
    assert {n: tuple(w.shape) for n, w in first.bridges.named_parameters()} == {
        "0.weight": (32, 16), "2.weight": (32, 16),
    }  # fmt: skip
    assert weights_hash(first.bridges) == weights_hash(same.bridges) != weights_hash(other.bridges)
    assert not list(Pair(make(), make(seed=1), terms, 0).bridges.parameters())
    names = set(first.state_dict())
    assert names == {*(f"student.{n}" for n in make().state_dict()), "bridges.0.weight", "bridges.2.weight"}


class Fit:
    """One run folder in which a pair may be trained again and again."""

    def __init__(self, path: Path, make: Make, config: dict[str, Any] = NARROW, **changes: Any) -> None:
        path.mkdir(exist_ok=True)
        self.config = config
        self.folder, self.make = RunFolder(path), make
        fast = {"epochs": 2.0, "batch_size": 8, "tokens_per_batch": 256, "learning_rate": 1e-3,
                "precision": "fp32", "evaluate_every": 3}  # fmt: skip
        self.settings = Train.model_validate({**fast, **changes})
        self.pair: Pair

    def __call__(self) -> None:
        terms = [Loss(kind="hard"), Loss(kind="hidden_mse"), Loss(kind="relation")]
        student = self.make(config=self.config)
        self.teacher = self.make(seed=1)
        self.pair = Pair(student, self.teacher, terms, 0)
        training.train(
            student, encoded(student, 41), Objective("single_label", terms), self.settings,
            lambda model: {"accuracy": 0.5}, "accuracy", self.folder, inference.make_accelerator("fp32"),
            {"recipe": "a"}, pair=self.pair,
        )  # fmt: skip

    def checkpoint(self) -> Path:
        return next(self.folder.checkpoints.glob("step-*")) / "model.safetensors"


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ask this process to stop in the middle of a step."""
    real = training._step
    made = 0

    def after(step: int) -> None:
        def counted(*arguments: Any) -> dict[str, float]:
            nonlocal made
            made += 1
            if made == step:
                signal.raise_signal(signal.SIGTERM)
            return real(*arguments)

        monkeypatch.setattr(training, "_step", counted)

    return after


@pytest.mark.parametrize("changes", [{}, {"log_gradient_norms": True, "gradient_checkpointing": True}])
def test_a_run_with_a_live_teacher_that_was_stopped_ends_with_the_same_bits_bridges_included(
    changes: dict[str, Any], tmp_path: Path, make: Make, stop: Callable[[int], None]
) -> None:
    whole = Fit(tmp_path / "whole", make, **changes)
    whole()
    before = Pair(make(config=NARROW), make(seed=1), list(whole.pair.terms.values()), 0).bridges
    assert weights_hash(before) != weights_hash(whole.pair.bridges), "they are trained"
    assert weights_hash(whole.teacher.model) == weights_hash(make(seed=1).model), "the teacher is not"
    cut = Fit(tmp_path / "cut", make, **changes)
    stop(4)
    with pytest.raises(Interrupted):
        cut()
    cut()
    assert sha256_file(cut.checkpoint()) == sha256_file(whole.checkpoint())
    with safe_open(cut.checkpoint(), "pt") as file:
        assert "bridges.1.weight" in file.keys()  # noqa: SIM118
    figures = list(cut.folder.entries())[-1]["metrics"]
    assert {"train/loss_hard", "train/loss_hidden_mse", "train/loss_relation"} <= figures.keys()
    whole.pair.student.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    assert set(again.state_dict()) == set(whole.pair.student.state_dict())


def test_the_cut_into_micro_batches_changes_no_gradient_of_student_or_bridge(make: Make) -> None:
    terms = [Loss(kind="hard"), Loss(kind="hidden_mse", weight=2.0), Loss(kind="relation")]
    found = []
    for tokens in (64, 10**6):
        student = make(config=STILL)
        pair, data = Pair(student, make(seed=1), terms, 0), encoded(student)
        assert (len(micro_batches(data, np.arange(12), tokens)) > 1) == (tokens == 64)
        accelerator = inference.make_accelerator("fp32")
        settings = Train.model_validate({"tokens_per_batch": tokens, "clip_norm": None})
        optimizer = training.make_optimizer(pair, settings)
        caught: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(
            lambda *_, pair=pair, caught=caught: caught.update(
                {n: p.grad.clone() for n, p in pair.named_parameters() if p.grad is not None}
            )
        )
        figures = training._step(
            pair, pair, data, np.arange(12), data.tokens, Objective("single_label", terms), settings, optimizer,
            accelerator, None,
        )  # fmt: skip
        assert figures["loss"] == pytest.approx(
            figures["loss_hard"] + 2 * figures["loss_hidden_mse"] + figures["loss_relation"], rel=1e-5
        )
        found.append((figures, caught))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    assert float(found[0][1]["bridges.1.weight"].abs().max()) > 0
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_two_processes_train_student_and_bridge_as_one_does(
    tmp_path: Path, tokenizer_folder: Path, make: Make
) -> None:
    alone = Fit(tmp_path / "alone", make, STILL)
    alone()
    script = tmp_path / "both.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom test_live import STILL, Fit, builder\n"
        "from distill import processes\n"
        "Fit(Path(sys.argv[1]), builder(Path(sys.argv[2])), STILL)()\nprocesses.leave()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "both"), str(tokenizer_folder)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Steps of 8 over 41 documents: in the last of an epoch one process has none.
    one, two = (
        load_file(next((tmp_path / name).glob("checkpoints/step-*/model.safetensors")))
        for name in ("alone", "both")
    )
    torch.testing.assert_close(two["bridges.1.weight"], one["bridges.1.weight"], atol=1e-4, rtol=0)
    before = Pair(make(config=STILL), make(seed=1), list(alone.pair.terms.values()), 0).bridges.state_dict()
    assert float((one["bridges.1.weight"] - next(iter(before.values()))).abs().max()) > 5e-3
    for a, b in zip(*(RunFolder(tmp_path / name).entries() for name in ("alone", "both")), strict=True):
        told = {name: value for name, value in a["metrics"].items() if name.startswith("train/loss")}
        assert told == pytest.approx({name: b["metrics"][name] for name in told}, rel=1e-3)
