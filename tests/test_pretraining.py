"""Pre-training: what is masked, what is trained on, that a stop costs nothing, and that a student takes it up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import BAD, GOOD, Write, distill, documents, power_cut, write_csv

from distill import comparison, data, models, pretraining, show, stages, tracking, training
from distill import recipe as recipes
from distill import runs as folders
from distill.errors import DataError, DistillError, HubError, RecipeError, UsageError
from distill.masking import HeldOut, MaskedLanguage, MaskedModel, Masking, pack
from distill.models import weights_hash
from distill.runs import RunFolder
from distill.schema import Model, Recipe, Train

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
FNET = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
STUDENTS = {"bert_miniature": {"intermediate_size": 64}, "distilbert": DISTILBERT, "fnet": FNET}
TRAIN = {
    "epochs": 1.0, "batch_size": 16, "tokens_per_batch": 256, "learning_rate": 3e-3, "precision": "fp32",
    "warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "sync", lambda folder: None)


@pytest.fixture
def make(recipe_file: Write) -> Callable[..., Recipe]:
    """A recipe whose student is of an architecture, and pre-trained with ``changes``."""

    def build(architecture: str = "bert_miniature", **changes: Any) -> Recipe:
        student: dict[str, Any] = {"architecture": architecture, "config": STUDENTS.get(architecture, {})}
        keys: dict[str, Any] = {f"student.{key}": value for key, value in student.items()}
        if architecture == "tfidf":
            keys |= {"student.checkpoint": None}
        keys |= {f"pretraining.train.{key}": value for key, value in TRAIN.items()}
        return recipes.load(str(recipe_file({**keys, **changes})))

    return build


Make = Callable[..., Recipe]


def pretrain(recipe: Recipe, name: str = "p", resume: str | None = None) -> RunFolder:
    return pretraining.pretrain(recipe, "tiny", "x", None if resume else name, resume)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_of_the_chosen_tokens_eight_in_ten_are_masked_one_is_another_and_one_stays(tokenizer: Any) -> None:
    ids = torch.randint(5, len(tokenizer), (2000, 100))
    ids[:, 0], ids[:, 50], ids[:, 99] = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.sep_token_id
    masked = Masking(tokenizer, 0.15)(ids)
    assert masked.positions.shape == (2000, 15)
    assert all(len(set(row.tolist())) == 15 for row in masked.positions[:50])
    assert torch.equal(ids.gather(1, masked.positions), masked.targets)
    assert not torch.isin(masked.positions, torch.tensor([0, 50, 99])).any(), (
        "special tokens are never chosen"
    )
    chosen = torch.zeros(ids.shape, dtype=torch.bool).scatter(1, masked.positions, True)
    assert torch.equal(ids[~chosen], masked.token_ids[~chosen]), "nothing else is touched"
    assert chosen[:, 1:50].float().mean() == pytest.approx(15 / 97, abs=0.003), "every place is as likely"
    shown = masked.token_ids.gather(1, masked.positions)
    others = len(tokenizer) - 5
    assert (shown == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == masked.targets).float().mean() == pytest.approx(0.1 + 0.1 / others, abs=0.006)
    replaced = shown[(shown != tokenizer.mask_token_id) & (shown != masked.targets)]
    assert not torch.isin(replaced, torch.tensor(tokenizer.all_special_ids)).any()
    assert len(set(replaced.tolist())) == others, "any word may take the place"


def test_the_draws_are_those_of_the_seed(tokenizer: Any) -> None:
    ids, masking, found = torch.randint(5, len(tokenizer), (4, 60)), Masking(tokenizer, 0.15), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(masking(ids).token_ids)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_windows_are_full_and_hold_the_documents_one_after_another(tokenizer: Any) -> None:
    texts = [text for text, _ in documents(30)]
    windows = pack(tokenizer, [[(t, None) for t in texts[:7]], [(t, None) for t in texts[7:]]], 32, "x")
    rows = windows.token_ids.reshape(-1, 32)
    assert (rows[:, 0] == tokenizer.cls_token_id).all()
    assert (rows[:, -1] == tokenizer.sep_token_id).all()
    stream = [
        i
        for t in texts
        for i in (*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id)
    ]
    assert rows[:, 1:-1].ravel().tolist() == stream[: len(rows) * 30]
    assert len(stream) - len(rows) * 30 < 30, "less than a window is left out"
    assert windows.tokens.tolist() == [32] * len(rows)


@pytest.mark.parametrize("architecture", STUDENTS)
def test_the_head_gives_the_logits_that_transformers_gives_at_the_masked_places(
    architecture: str, make: Make
) -> None:
    model = pretraining.build(make(architecture)).eval()
    masked = model.masking(torch.randint(5, len(model.tokenizer), (3, 16)))
    with torch.no_grad():
        whole = model.model(input_ids=masked.token_ids).logits
        found = model.predict(masked)
    places = masked.positions.unsqueeze(2).expand(-1, -1, whole.shape[2])
    torch.testing.assert_close(found, whole.gather(1, places), rtol=1e-5, atol=1e-5)
    assert model.model(input_ids=masked.token_ids).logits.shape == whole.shape, "nothing of it stays behind"


@pytest.mark.parametrize("architecture", STUDENTS)
def test_a_student_begins_with_the_weights_of_its_pre_training(
    architecture: str, runs: Path, make: Make
) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = pretrain(make(architecture))
    run, found = folder.read(), folder.metrics()
    assert (run.status, run.role) == ("finished", "pretrained")
    assert not folder.checkpoints.exists()
    lines = [e["metrics"] for e in folder.entries() if "eval/perplexity" in e["metrics"]]
    assert found["validation"]["perplexity"] == min(line["eval/perplexity"] for line in lines)
    assert found["validation"]["perplexity"] < 0.8 * 108, "of random weights it is the vocabulary's size"
    assert found["validation"]["perplexity"] == pytest.approx(np.exp(found["validation"]["nll"]))
    saved = AutoModelForMaskedLM.from_pretrained(folder.model)
    recipe = make(architecture, **{"student.checkpoint": str(folder.model), "student.config": {}})
    corpus = data.load(recipe)
    student = models.build(recipe.student, "student", corpus.task, 0)
    expected = saved.base_model.state_dict()
    ours = student.model.base_model.state_dict()
    assert all(torch.equal(expected[name], ours[name]) for name in expected if "pooler" not in name)
    assert len(expected) > 10
    assert student.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder.model).get_vocab()
    # And it can be pre-trained further, from there.
    again = pretraining.build(recipe)
    assert weights_hash(again.model) == weights_hash(saved)


def test_no_row_of_validation_or_test_is_trained_on_and_the_user_is_told(
    tmp_path: Path, runs: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make()
    splits = data.load(recipe).splits
    held = [text for name in ("validation", "test") for text, _ in splits[name].texts()]
    fresh = [f"{text} fresh" for text, _ in documents(40, seed=9)]
    lines = tmp_path / "more.txt"
    own = [text for text, _ in splits["train"].texts()][:3]
    lines.write_text("\n".join([*held, "", *own, *fresh, fresh[0]]) + "\n", encoding="utf-8")
    rows, _ = pretraining.read(make(**{"pretraining.corpus": [str(lines)]}))
    texts = [text for text, _ in rows.texts()]
    assert not set(texts) & set(held)
    assert sorted(texts) == sorted(
        [t for name in ("train", "transfer") for t, _ in splits[name].texts()] + fresh
    )
    told = " ".join(capsys.readouterr().err.split())
    assert f"{lines}: 1 repeated documents left out" in told
    assert f"{lines}: {len(held)} documents dropped that stand in validation or test as well" in told
    assert f"{lines}: 3 documents dropped that stand in the text before it as well" in told
    assert f"{lines}: 40 documents" in told


def test_held_out_text_stays_held_out_where_the_recipe_keeps_repeats(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = documents(80)
    files = {
        "train": str(write_csv(tmp_path / "a.csv", rows[:60])),
        "test": str(write_csv(tmp_path / "b.csv", rows[50:70])),
        "validation": str(write_csv(tmp_path / "c.csv", rows[70:])),
    }
    splits = {name: {"from": name} for name in files}
    recipe = make(**{"data.source": files, "data.splits": splits, "data.deduplicate": False})
    found, _ = pretraining.read(recipe)
    assert [text for text, _ in found.texts()] == [text for text, _ in rows[:50]]
    assert "train: 10 documents dropped that stand in validation or test" in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on_to_the_same_bits(runs: Path, make: Make) -> None:
    recipe = make(**{"pretraining.train.evaluate_every": 4, "pretraining.train.max_steps": 9})
    whole = pretrain(recipe, "whole")
    with power_cut(7):
        pretrain(recipe, "cut")
    assert [p.name for p in folders.find("cut").checkpoints.iterdir()] == ["step-000000004"]
    cut = pretrain(recipes.load(str(folders.find("cut").recipe)), resume="cut")
    one, two = ((f.model / "model.safetensors").read_bytes() for f in (whole, cut))
    assert one == two
    assert whole.metrics()["validation"] == cut.metrics()["validation"]
    other = pretrain(make(**{"pretraining.train.seed": 1, "pretraining.train.max_steps": 9}), "other")
    assert (other.model / "model.safetensors").read_bytes() != one


def test_masks_are_drawn_anew_at_each_step_and_are_the_same_at_each_evaluation(
    runs: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[bool, list[bytes]] = {True: [], False: []}
    real = MaskedModel.predict

    def predict(self: MaskedModel, masked: Any) -> Any:
        shown[self.training].append(masked.token_ids.numpy().tobytes())
        return real(self, masked)

    monkeypatch.setattr(MaskedModel, "predict", predict)
    keys = {"tokens_per_batch": 4096, "batch_size": 300, "epochs": 4.0}
    pretrain(make(**{f"pretraining.train.{key}": value for key, value in keys.items()}))
    assert len(set(shown[True])) == len(shown[True]) == 4 * 2, "four steps of two micro-batches"
    assert len(shown[False]) == 5, "four epochs, and the best one at the end"
    assert len(set(shown[False])) == 1


def test_a_figure_does_not_depend_on_how_held_out_windows_are_cut_into_batches(make: Make) -> None:
    from distill.inference import make_accelerator

    recipe = make()
    model = pretraining.build(recipe).train()
    windows = pretraining._pack(model, data.load(recipe).splits["validation"], "validation")
    held_out = HeldOut(windows, model.masking)
    one, two = (held_out.measure(model, tokens, make_accelerator("fp32")) for tokens in (64, 100_000))
    assert one == pytest.approx(two, rel=1e-5)
    assert one["perplexity"] == pytest.approx(len(model.tokenizer), rel=0.3), (
        "of random weights: the vocabulary"
    )
    assert model.training, "as it was before"


@pytest.mark.parametrize(
    ("architecture", "changes", "error", "said"),
    [
        ("tfidf", {}, RecipeError, "student.architecture: tfidf has no masked-language-model head"),
        ("teacher_layers", {"student.config": {}}, RecipeError, "teacher_layers needs a teacher"),
        ("fnet", {"pretraining.corpus": ["somebody/reviews"]}, HubError, "pretraining.corpus.0: somebody/reviews is no file here"),
        ("fnet", {"pretraining.corpus": ["/no/such/file.txt"]}, DataError, "pretraining.corpus.0: there is no"),
        ("fnet", {"pretraining.corpus": ["{lines}"]}, DataError, "every one of its 1 documents stands in"),
        ("fnet", {"pretraining.corpus": ["{blank}"]}, DataError, "blank.txt: no rows left of 2: 2 blank"),
        ("fnet", {"pretraining.corpus": ["{latin}"]}, DataError, "latin.txt, line 2: not UTF-8"),
        ("fnet", {"pretraining.corpus": ["{odd}"]}, DataError, "odd.md: unknown ending; must be .txt, .csv"),
        ("fnet", {"student.max_length": 5000}, DataError, "one window takes 4,998; give more text"),
        ("fnet", {"data.text_pair": "label", "student.view": "head"}, RecipeError, "pre-training reads single"),
        ("fnet", {"pretraining.train.label_smoothing": 0.1}, RecipeError, "label_smoothing has no meaning"),
        ("fnet", {"pretraining.masked": 0.9}, RecipeError, "pretraining.masked: must be less than"),
        ("fnet", {"pretraining.mask": 0.1}, RecipeError, "did you mean 'masked'"),
        ("fnet", {"student.checkpoint": "/no/such/model"}, DataError, "student.checkpoint: there is no folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_pre_trained_is_said_in_a_line_and_leaves_no_run(
    architecture: str,
    changes: dict[str, Any],
    error: type[DistillError],
    said: str,
    tmp_path: Path,
    runs: Path,
    make: Make,
) -> None:
    files = {name: tmp_path / f"{name}.txt" for name in ("lines", "blank", "latin")}
    files["odd"] = tmp_path / "odd.md"
    held = data.load(make()).splits["test"].texts()[0][0]
    files["lines"].write_text(held)
    files["blank"].write_text("\n \n")
    files["latin"].write_bytes(b"a\ncaf\xe9\n")
    files["odd"].write_text("x")
    where = {name: str(path) for name, path in files.items()}
    corpus = [one.format(**where) for one in changes.get("pretraining.corpus", [])]
    wished = {**changes, **({"pretraining.corpus": corpus} if corpus else {})}
    with pytest.raises(error, match=said) as caught:
        pretrain(make(architecture, **wished))
    assert "\n" not in str(caught.value)
    assert folders.every() == []


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.mask_token = None
    with pytest.raises(RecipeError, match="it has no mask token"):
        Masking(tokenizer, 0.15)


def test_the_command_makes_a_checkpoint_that_the_students_command_takes(
    tmp_path: Path, runs: Path, recipe_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more.txt"
    more.write_text("\n".join(f"{text} again" for text, _ in documents(20, seed=5)))
    keys: dict[str, Any] = {f"pretraining.train.{key}": value for key, value in TRAIN.items()}
    keys |= {"student.architecture": "fnet", "student.config": FNET}
    keys |= {"teacher.train.max_steps": 2, "student.train.max_steps": 2}
    file = str(recipe_file(keys))
    done = distill("pretrain", "--recipe", file, "--corpus", str(more), "--name", "p")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert f"{more}: 20 documents" in done.stderr.replace("\n", " ")
    assert "--set student.checkpoint=" in done.stderr
    assert yaml.safe_load((runs / "p" / "recipe.yaml").read_text())["pretraining"]["corpus"] == [str(more)]
    stages.train_teacher(recipes.load(file), "tiny", "t")
    taught = recipes.load(file, [f"student.checkpoint={runs / 'p' / 'model'}"])
    stages.train_students(stages.StudentJob(["t"], taught.dump(), "tiny", "fnet", "s", 1, control=False))
    assert folders.find("s").read().status == "finished"
    show.runs_table()
    assert "perplexity" in capsys.readouterr().out
    assert [f.name for f in comparison.collect()] == ["t", "s", "s-tfidf"], "pre-trained is no classifier yet"


def test_a_plan_says_what_a_run_would_do_and_begins_none(runs: Path, make: Make) -> None:
    recipe = make("fnet")
    found = pretraining.plan(recipe)
    assert found.title == "pre-training fnet"
    assert found.cost.steps == -(-found.splits["corpus"]["rows"] // 16)
    assert set(found.splits) == {"corpus", "validation"}
    assert folders.every() == []


def test_a_pre_training_is_neither_taught_by_nor_resumed_as_something_else(runs: Path, make: Make) -> None:
    from distill import cli

    folder = pretrain(make(**{"pretraining.train.max_steps": 2}))
    with pytest.raises(DataError, match="not a fine-tuned classifier"):
        models.load(folder.model)
    stages.train_teacher(make(**{"teacher.train.max_steps": 2}), "tiny", "t")
    with pytest.raises(UsageError, match="--resume: t is a teacher run, and no pre-training"):
        cli.pretrain(resume="t")
    with pytest.raises(UsageError, match="distill pretrain --resume p"):
        cli.student(resume="p")
    with pytest.raises(UsageError, match="p has finished already"):
        cli.pretrain(resume="p")
    folder.update(status="interrupted")
    with pytest.raises(UsageError, match=r"p has not finished .interrupted.; .*distill pretrain --resume p"):
        folders.refuse_unfinished("p")


def test_a_checkpoint_without_a_head_gets_a_new_one_and_the_user_is_told(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make("fnet")
    student = models.build(
        recipe.student, "student", data.load(recipe).task, 0, Path(str(recipe.teacher.tokenizer))
    )
    student.save(tmp_path / "classifier")
    keys = {"student.checkpoint": str(tmp_path / "classifier"), "student.config": {}}
    model = pretraining.build(make("fnet", **keys))
    assert "has no masked-language-model head; a new one is trained" in " ".join(
        capsys.readouterr().err.split()
    )
    ours, expected = model.model.base_model.state_dict(), student.model.base_model.state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_words_are_predicted_from_those_around_them(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import FNetConfig, FNetForMaskedLM

    from distill.inference import make_accelerator

    words = GOOD + BAD
    starts = np.random.default_rng(0).integers(0, len(words), 300)
    texts = [(" ".join(words[(start + at) % len(words)] for at in range(30)), None) for start in starts]
    windows, held_out = pack(tokenizer, [texts], 16, "x"), pack(tokenizer, [texts[:20]], 16, "y")
    torch.manual_seed(0)
    model = MaskedModel(
        FNetForMaskedLM(FNetConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, **FNET)),
        Model(architecture="fnet", max_length=16),
        tokenizer,
        Masking(tokenizer, 0.15),
    )
    settings = Train(
        batch_size=64, learning_rate=1e-2, precision="fp32", max_steps=300, epochs=200.0, evaluate_every=300
    )
    measured, accelerator = HeldOut(held_out, model.masking), make_accelerator("fp32")
    training.train(
        model, windows, MaskedLanguage(), settings, lambda m: measured.measure(m, 4096, accelerator), "nll",
        RunFolder(tmp_path), accelerator, {"recipe": "a"},
    )  # fmt: skip
    found = measured.measure(model, 4096, accelerator)
    assert found["perplexity"] < len(words) / 3, "without the words around it, each is as likely"
    assert found["accuracy"] > 0.3
