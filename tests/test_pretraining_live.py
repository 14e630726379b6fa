"""A masked language model that learns from another: what is compared, what is refused, and what stays behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, Write, distill, power_cut
from safetensors import safe_open
from scipy import special
from torch import Tensor, nn

from distill import data, inference, models, pretraining, tracking
from distill import recipe as recipes
from distill import runs as folders
from distill.batching import collate
from distill.errors import DataError, DistillError, RecipeError, UsageError
from distill.masked_live import MaskedPair, compare
from distill.masking import HeldOut, MaskedLanguage
from distill.runs import RunFolder
from distill.schema import Loss, Recipe, Schedule

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

TRAIN = {
    "epochs": 1.0, "batch_size": 16, "tokens_per_batch": 256, "learning_rate": 3e-3, "precision": "fp32",
    "warmup_steps": 0, "max_steps": 9, "evaluate_every": 4,
}  # fmt: skip
NARROW = {**TINY, "hidden_size": 16, "intermediate_size": 32}
TERMS = [Loss(kind="soft", weight=5.0, temperature=2.0), Loss(kind="hard", weight=2.0), Loss(kind="cosine")]
Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "sync", lambda folder: None)


def masked_model(folder: Path, tokenizer: Path, seed: int = 1, **fields: Any) -> Path:
    """Save a BERT that is a masked language model, with random weights."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(seed)
    sized = {
        **TINY,
        "num_hidden_layers": 4,
        "vocab_size": len(words),
        "max_position_embeddings": 64,
        **fields,
    }
    BertForMaskedLM(BertConfig(**sized)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A masked language model of four layers, with rows beyond its vocabulary."""
    return masked_model(tmp_path_factory.mktemp("teacher"), tokenizer_folder, vocab_size=120)


@pytest.fixture
def make(recipe_file: Write, teacher: Path) -> Make:
    """A recipe whose student is narrower than the teacher that it is pre-trained beside."""

    def build(**changes: Any) -> Recipe:
        keys: dict[str, Any] = {"pretraining.teacher": str(teacher), "student.config": NARROW}
        keys |= {f"pretraining.train.{key}": value for key, value in TRAIN.items()}
        return recipes.load(str(recipe_file({**keys, **changes})))

    return build


def pretrain(recipe: Recipe, name: str = "p", resume: str | None = None) -> RunFolder:
    return pretraining.pretrain(recipe, "tiny", "x", None if resume else name, resume)


def pair_of(recipe: Recipe) -> MaskedPair:
    found = pretraining._with_teacher(recipe)[1]
    assert found is not None
    return found


def expected(
    student: tuple[np.ndarray, np.ndarray], teacher: tuple[np.ndarray, np.ndarray], t: float
) -> tuple[np.ndarray, np.ndarray]:
    """Soft and cosine terms of each window, as the paper has them, one window and one token at a time."""
    soft, cosine = [], []
    for s, states, w, wanted in zip(*student, *teacher, strict=True):
        p, q = special.softmax(w / t, axis=1), special.softmax(s / t, axis=1)
        soft.append(t**2 * (p * np.log(p / q)).sum(1).mean())
        norms = np.linalg.norm(states, axis=1) * np.linalg.norm(wanted, axis=1)
        cosine.append((1 - (states * wanted).sum(1) / norms).mean())
    return np.array(soft), np.array(cosine)


def drawn(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.from_numpy(3 * rng.normal(size=shape)) for shape in shapes]


@pytest.mark.parametrize("t", [1.0, 2.0, 5.0])
def test_the_teachers_terms_are_their_formulas(t: float) -> None:
    s, h, w, u = drawn(np.random.default_rng(0), (3, 2, 11), (3, 5, 4), (3, 2, 13), (3, 5, 6))
    bridge = nn.Linear(4, 6, bias=False).double()
    objective = MaskedLanguage(
        terms=[Loss(kind="soft", temperature=t), Loss(kind="hard"), Loss(kind="cosine")]
    )
    found = compare(objective, (s, h), (w, u), nn.ModuleDict({"2": bridge}))
    lifted = h.numpy() @ bridge.weight.detach().numpy().T
    soft, cosine = expected((s.numpy(), lifted), (w.numpy()[..., :11], u.numpy()), t)
    assert found.keys() == {0, 2}
    np.testing.assert_allclose(found[0], soft)
    np.testing.assert_allclose(found[2].detach(), cosine)


def test_their_gradients_are_those_of_their_values() -> None:
    s, h, w, u, m = drawn(np.random.default_rng(1), (2, 2, 5), (2, 3, 3), (2, 2, 5), (2, 3, 4), (4, 3))
    objective = MaskedLanguage(terms=TERMS)

    class Bridge(nn.Module):
        def __init__(self, matrix: Tensor) -> None:
            super().__init__()
            self.matrix = matrix

        def forward(self, states: Tensor) -> Tensor:
            return states @ self.matrix.T

    def both(logits: Tensor, states: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        found = compare(objective, (logits, states), (w, u), nn.ModuleDict({"2": Bridge(matrix)}))
        return found[0], found[2]

    assert torch.autograd.gradcheck(both, [part.requires_grad_() for part in (s, h, m)])


def test_both_models_read_the_same_masks_and_are_compared_where_the_paper_says(make: Make) -> None:
    pair = pair_of(make()).eval()
    recipe = make()
    windows = pretraining._pack(pair.student, data.load(recipe).splits["validation"], "x")
    batch = collate(windows, range(4))
    torch.manual_seed(7)
    hard, found = pair(batch, MaskedLanguage(terms=TERMS))
    torch.manual_seed(7)
    masked = pair.student.hide(batch)
    outputs = [
        one.model(input_ids=masked.token_ids, output_hidden_states=True)
        for one in (pair.student, pair.teacher)
    ]
    at = masked.positions.unsqueeze(2)
    logits = [
        out.logits.gather(1, at.expand(-1, -1, out.logits.shape[2])).detach()[..., :106] for out in outputs
    ]
    states = [out.hidden_states[-1].detach() for out in outputs]
    assert states[0].shape == (4, 16, 16), "all tokens of a window"
    lifted = pair.bridges["2"](states[0]).detach()
    soft, cosine = expected((logits[0].numpy(), lifted.numpy()), (logits[1].numpy(), states[1].numpy()), 2.0)
    np.testing.assert_allclose(found[0].detach(), soft, rtol=1e-4)
    np.testing.assert_allclose(found[2].detach(), cosine, rtol=1e-4)
    chosen = special.log_softmax(logits[0].numpy(), axis=2)
    target = np.take_along_axis(chosen, masked.targets.numpy()[..., None], 2)[..., 0]
    np.testing.assert_allclose(hard.detach(), -target.mean(1), rtol=1e-4)
    sum(value.sum() for value in (hard, *found.values())).backward()
    assert all(w.grad is None for w in pair.teacher.parameters())
    assert pair.train().teacher.training is False, "its dropout stays off"
    assert {n for n, _ in pair.named_parameters()} == {
        *(f"student.{n}" for n, _ in pair.student.named_parameters()), "bridges.2.weight",
    }  # fmt: skip


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(make: Make, teacher: Path) -> None:
    own = {"student.layers": [0, 1, 2, 3], "student.architecture": "teacher_layers", "student.config": {}}
    pair = pair_of(make(**own)).eval()
    assert not list(pair.bridges.parameters()), "as wide as its teacher"
    ids = torch.randint(5, 100, (3, 16))
    windows = pretraining._pack(pair.student, data.load(make()).splits["validation"], "x")
    with torch.no_grad():
        found = pair(collate(windows, range(3)), MaskedLanguage(terms=TERMS))[1]
    assert max(float(value.abs().max()) for value in found.values()) < 1e-5
    from transformers import AutoModelForMaskedLM

    theirs = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    torch.testing.assert_close(pair.student.model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_every_other_layer_of_the_teacher_is_a_student_to_begin_with(
    make: Make, runs: Path, teacher: Path
) -> None:
    own = {"student.layers": [0, 2], "student.architecture": "teacher_layers", "student.config": {}}
    student, pair = pretraining._with_teacher(make(**own))
    assert pair is not None
    ours, theirs = student.model.state_dict(), pair.teacher.model.state_dict()
    for name, weight in ours.items():
        place = name.replace("layer.1.", "layer.2.")
        assert torch.equal(weight, theirs[place][: len(weight)]), name  # of positions, those of its window
    assert len(models.layers(student.model)) == 2
    folder = pretrain(make(**own))
    again = recipes.load(
        str(folder.recipe),
        ["student={architecture: auto, max_length: 16}", f"student.checkpoint={folder.model}"],
    )
    assert models.build(again.student, "student", data.load(again).task, 0).parameters_count > 0


def test_a_run_beside_a_teacher_goes_on_to_the_same_bits_projection_included(runs: Path, make: Make) -> None:
    recipe = make()
    whole = pretrain(recipe, "whole")
    with power_cut(7):
        pretrain(recipe, "cut")
    (checkpoint,) = folders.find("cut").checkpoints.iterdir()
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        kept = file.get_tensor("bridges.2.weight")
    assert not torch.equal(kept, pair_of(recipe).bridges.state_dict()["2.weight"]), "it is trained"
    cut = pretrain(recipes.load(str(folders.find("cut").recipe)), resume="cut")
    one, two = ((f.model / "model.safetensors").read_bytes() for f in (whole, cut))
    assert one == two
    with safe_open(cut.model / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "bridge" in name], "and thrown away"  # noqa: SIM118
    assert whole.metrics()["validation"] == cut.metrics()["validation"]
    without = pretrain(make(**{"pretraining.teacher": None}), "without")
    assert (without.model / "model.safetensors").read_bytes() != one
    assert list(without.entries())[-2]["metrics"]["train/loss"] > 0


def test_another_teacher_is_no_way_to_go_on(
    tmp_path: Path, runs: Path, make: Make, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = masked_model(tmp_path / "beside", tokenizer_folder)
    recipe = make(**{"pretraining.teacher": str(beside)})
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "_record", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(recipe)
    masked_model(beside, tokenizer_folder, seed=2)
    with pytest.raises(DataError, match="cannot be resumed: live teacher's weights was"):
        pretrain(recipe, resume="p")


def test_the_figures_are_of_the_student_alone_and_its_terms_have_their_names(runs: Path, make: Make) -> None:
    moving = Schedule(start=4.0, end=1.0).model_dump()
    losses = [term.model_dump() for term in TERMS]
    losses[0]["temperature"] = moving
    recipe = make(**{"pretraining.losses": losses})
    folder = pretrain(recipe)
    held = pretraining._pack(pretraining.build(recipe), data.load(recipe).splits["validation"], "validation")
    own = [
        f"student={{architecture: auto, checkpoint: {folder.model}, max_length: 16}}",
        "pretraining.teacher=null", "pretraining.losses=[{kind: hard}]",
    ]  # fmt: skip
    alone = pretraining.build(recipes.load(str(folder.recipe), own))
    found = HeldOut(held, alone.masking).measure(alone, 4096, inference.make_accelerator("fp32"))
    assert folder.metrics()["validation"]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    told = [e["metrics"] for e in folder.entries() if "train/loss" in e["metrics"]]
    for line in told:
        parts = [line[f"train/loss_{name}"] for name in ("soft", "mlm", "cosine")]
        assert line["train/loss"] == pytest.approx(5 * parts[0] + 2 * parts[1] + parts[2], rel=1e-5)
    assert [line["train/temperature_soft"] for line in told] == pytest.approx([4 - 9 / 8, 4 - 21 / 8, 1.0])
    assert folder.read().teachers == [recipe.pretraining.teacher]


def test_the_published_weights_are_those_of_a_teacher_and_without_one_the_hard_term_is_alone(
    make: Make,
) -> None:
    assert make().pretraining.losses == TERMS
    assert make(**{"pretraining.teacher": None}).pretraining.losses == [Loss(kind="hard")]
    again = yaml.safe_load(make().dump())["pretraining"]
    assert make(**{"pretraining.losses": again["losses"]}).pretraining.losses == TERMS


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": None, "losses": [{"kind": "soft"}]}, "losses.0: soft needs a teacher; set pretraining.teacher"),
        ({"teacher": None, "losses": [{"kind": "cosine"}]}, "losses.0: cosine needs a teacher"),
        ({"losses": [{"kind": "hard"}]}, "no term of losses learns from the teacher; add soft or cosine"),
        ({"losses": []}, "pretraining.losses: must have at least 1 item"),
        *(
            ({"losses": [{"kind": "hard"}, {"kind": kind}]},
             f"losses.1: {kind} has no meaning for pretraining; take soft, hard or cosine")
            for kind in ("dkd", "relation", "attention", "hidden_mse", "mse_logits")
        ),
        ({"losses": [{"kind": "soft", "temprature": 2.0}]}, "did you mean 'temperature'"),
    ],
)  # fmt: skip
def test_terms_without_a_meaning_are_refused_when_the_recipe_is_read(
    changes: dict[str, Any], said: str, make: Make
) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        make(**{f"pretraining.{key}": value for key, value in changes.items()})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "error", "said"),
    [
        ("headless", {}, RecipeError, "has no masked-language-model head: cls.predictions.bias is missing; take a"),
        ("gpt2", {}, RecipeError, "has no masked-language-model head: it is a gpt2; take a checkpoint that has"),
        ("other words", {}, RecipeError,
         r"student and teacher must have one vocabulary, and theirs differ \('great' is 5, not 6\); set student.tok"),
        ("more words", {}, RecipeError, r"one vocabulary, and theirs differ \('unheard' is 106, not None\)"),
        ("fewer words", {}, RecipeError, r"one vocabulary, and theirs differ \(105 tokens, not 106\)"),
        ("fewer rows", {}, RecipeError, r"one vocabulary, and theirs differ \(100 rows for 106 tokens\)"),
        ("", {"student.max_length": 65}, RecipeError,
         "student.max_length is 65, and the teacher beside it reads 64 tokens; set student.max_length=64"),
        ("", {"pretraining.losses": [{"kind": "cosine", "project": False}]}, RecipeError,
         "pretraining.losses.0: the student's states are 16 wide and the teacher's 32; set project: true"),
        ("", {"pretraining.teacher": "/no/such/model"}, DataError, "pretraining.teacher: there is no folder"),
        ("", {"pretraining.teacher": "nobody"}, UsageError, "no run called 'nobody'"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_one_line_before_the_data_are_read(
    kind: str,
    changes: dict[str, Any],
    error: type[DistillError],
    said: str,
    tmp_path: Path,
    runs: Path,
    make: Make,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoTokenizer, BertModel, BertTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "teacher"
    if kind:
        masked_model(folder, tokenizer_folder, vocab_size=100 if kind == "fewer rows" else 120)
    if kind == "headless":
        BertModel.from_pretrained(folder).save_pretrained(folder)
    if kind == "gpt2":
        GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    if kind.endswith("words"):
        words = AutoTokenizer.from_pretrained(folder).get_vocab()
        if kind == "other words":
            words["good"], words["great"] = words["great"], words["good"]
        elif kind == "more words":
            words["unheard"] = len(words)
        else:
            words.pop(max(words, key=words.__getitem__))
        BertTokenizer(vocab=words).save_pretrained(folder)
    monkeypatch.setattr(pretraining, "read", lambda recipe: pytest.fail("the data were read"))
    keys = {
        "student.tokenizer": str(tokenizer_folder),
        **({"pretraining.teacher": str(folder)} if kind else {}),
    }
    with pytest.raises(error, match=said) as caught:
        pretrain(make(**{**keys, **changes}))
    assert "\n" not in str(caught.value)
    assert folders.every() == []


def test_roberta_keeps_its_first_positions_for_padding(
    tmp_path: Path, make: Make, roberta_tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

    words = AutoTokenizer.from_pretrained(roberta_tokenizer_folder)
    RobertaForMaskedLM(
        RobertaConfig(**TINY, vocab_size=len(words), max_position_embeddings=18, pad_token_id=1)
    ).save_pretrained(tmp_path / "roberta")
    words.save_pretrained(tmp_path / "roberta")
    keys = {"pretraining.teacher": str(tmp_path / "roberta")}
    pair = pair_of(make(**keys, **{"student.max_length": 16}))
    windows = pretraining._pack(pair.student, data.load(make()).splits["validation"], "x")
    assert torch.isfinite(pair(collate(windows, range(2)), MaskedLanguage(terms=TERMS))[1][0]).all()
    with pytest.raises(RecipeError, match="the teacher beside it reads 16 tokens"):
        pair_of(make(**keys, **{"student.max_length": 17}))


def test_the_command_teaches_a_student_by_a_run_of_pre_training(
    runs: Path, make: Make, recipe_file: Write
) -> None:
    from distill import cli

    pretrain(make(**{"pretraining.teacher": None, "student.config": TINY}), "t")
    keys = {f"pretraining.train.{key}": value for key, value in TRAIN.items()}
    file = recipe_file({**keys, "student.config": NARROW})
    done = distill("pretrain", "--recipe", str(file), "--teacher", "t", "--name", "s")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert folders.find("s").read().teachers == ["t"]
    lines = [entry["metrics"] for entry in folders.find("s").entries()]
    assert {"train/loss_soft", "train/loss_mlm", "train/loss_cosine"} <= lines[0].keys()
    with pytest.raises(UsageError, match="--resume goes on with what the run was asked for"):
        cli.pretrain(resume="s", teacher="t")
    folders.find("t").update(status="interrupted")
    with pytest.raises(
        UsageError, match=r"t has not finished .*; go on with it: distill pretrain --resume t"
    ):
        pretrain(make(**{"pretraining.teacher": "t"}))
