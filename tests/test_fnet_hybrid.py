"""FNet with attention in its last layers: what it computes, who can read it, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Write, distill, documents, power_cut, write_csv
from safetensors.torch import load_file
from test_architectures import LENGTHS, TASK, packed, read, spread

from distill import catalog, inference, live, models, stages, tracking
from distill import recipe as recipes
from distill import runs as folders
from distill.batching import collate
from distill.encoding import Encoded
from distill.errors import DataError, RecipeError
from distill.models import Classifier, weights_hash
from distill.packed import Taps
from distill.schema import Loss

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

Make = Callable[..., Classifier]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A BERT of four layers with its tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(5)
    fields = {**TINY, "num_hidden_layers": 4, "vocab_size": len(words), "max_position_embeddings": 96}
    model = BertModel(BertConfig(**fields))
    spread(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def make(bert: Path) -> Make:
    """Build a classifier of that BERT, in evaluation mode."""

    def build(attention_layers: int | None = None, seed: int = 0, **fields: Any) -> Classifier:
        architecture = "auto" if attention_layers is None else "fnet_from_bert"
        own = {} if attention_layers is None else {"attention_layers": attention_layers}
        base = {"architecture": architecture, "checkpoint": str(bert), "max_length": 96, **own, **fields}
        config = catalog.load("student", architecture).Config.model_validate(base)
        return models.build(config, "student", TASK, seed).eval()

    return build


def everything(model: Classifier, data: Encoded) -> torch.Tensor:
    return read(model, data, range(len(data)))


@pytest.mark.parametrize("attention_layers", [1, 2, 4])
def test_a_documents_logits_are_the_same_alone_and_in_any_batch(attention_layers: int, make: Make) -> None:
    model, data = make(attention_layers), packed(LENGTHS)
    alone = torch.cat([read(model, data, [at]) for at in range(len(data))])
    torch.testing.assert_close(everything(model, data), alone, atol=1e-5, rtol=1e-5)
    backwards = read(model, data, range(len(data))[::-1]).flip(0)
    torch.testing.assert_close(backwards, alone, atol=1e-5, rtol=1e-5)
    assert float(alone.std(0).min()) > 0.01, "the documents differ at all"


def test_with_no_attention_it_is_the_fnet_and_with_all_of_it_the_bert(make: Make) -> None:
    from transformers import FNetForSequenceClassification

    data = packed(LENGTHS)
    assert type(make(0).model) is FNetForSequenceClassification
    hybrids = [everything(make(layers), data) for layers in range(5)]
    torch.testing.assert_close(hybrids[4], everything(make(), data), atol=1e-5, rtol=1e-5)
    for one, other in pairwise(hybrids):
        assert float((one - other).abs().max()) > 1e-3


def test_it_is_the_papers_layer_by_layer_over_the_checkpoints_own_modules(bert: Path, make: Make) -> None:
    from transformers import AutoModel

    theirs, model, data = AutoModel.from_pretrained(bert).eval(), make(2), packed([17])
    ids = torch.from_numpy(data.token_ids.astype(np.int64))[None]
    taps = Taps(range(5), (1, 2, 3, 4))
    with torch.inference_mode():
        expected = [theirs.embeddings(ids)]
        for number, layer in enumerate(theirs.encoder.layer):
            states = expected[-1]
            if number < 2:
                mixed = torch.fft.fft2(states, dim=(1, 2)).real
                states = layer.attention.output.LayerNorm(states + mixed)
            else:
                states = layer.attention(states)[0]
            expected.append(layer.output(layer.intermediate(states), states))
        logits = model.model.classifier(theirs.pooler(expected[-1]))
        found = model(collate(data, [0]), taps)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    for number, states in enumerate(expected):
        torch.testing.assert_close(taps.states[number], states[0], atol=1e-4, rtol=1e-4)
    assert set(taps.heads) == {3, 4}, "the layers that have queries and keys"


def test_its_weights_are_the_berts_without_the_attention_that_is_left_out(make: Make) -> None:
    whole, ours = make().model.state_dict(), make(1).model.state_dict()
    assert all(torch.equal(weight, whole[name]) for name, weight in ours.items())
    left = {f"bert.encoder.layer.{at}.attention.{part}.{kind}" for at in range(3) for kind in ("weight", "bias")
            for part in ("self.query", "self.key", "self.value", "output.dense")}  # fmt: skip
    assert whole.keys() - ours.keys() == left


def test_a_saved_one_comes_back_the_same_and_plain_transformers_refuses_it(
    tmp_path: Path, make: Make
) -> None:
    model, data = make(2), packed(LENGTHS)
    model.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    assert torch.equal(everything(again, data), everything(model, data))
    assert weights_hash(again.model) == weights_hash(model.model)
    assert again.config == model.config
    (tmp_path / "model" / models.ABOUT).unlink()
    script = tmp_path / "plain.py"
    script.write_text(
        "import sys\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification\n"
        "from distill import models\n"
        "for load in (AutoConfig, AutoModel, AutoModelForSequenceClassification):\n"
        "    try:\n        load.from_pretrained(sys.argv[1])\n"
        "    except ValueError as error:\n        print(str(error)[:80])\n"
        "models.load(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("has model type `fnet_hybrid`") == 3
    assert done.stderr.splitlines()[-1].startswith("distill.errors.DataError"), (
        "without its distill.json we do, too"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"engine": "stock"},
            "attention_layers: transformers has no FNet with attention; take engine: packed",
        ),
        (
            {"transform": "max_length"},
            "attention_layers: attention reads no padding as text; take transform: doc",
        ),
        ({"attention_layers": 5}, "student.attention_layers is 5, and .* has 4 layers"),
        ({"attention_layers": -1}, "greater than or equal to 0"),
    ],
)
def test_what_there_is_not_is_refused_in_a_line(
    fields: dict[str, Any], said: str, bert: Path, recipe_file: Write
) -> None:
    student = {"architecture": "fnet_from_bert", "checkpoint": str(bert), "config": {}, "attention_layers": 2}
    keys = {f"student.{key}": value for key, value in {**student, **fields}.items()}
    with pytest.raises(RecipeError, match=said) as caught:
        models.build(recipes.load(str(recipe_file(keys))).student, "student", TASK, 0)
    assert "\n" not in str(caught.value)


def test_its_layers_are_compared_with_a_teachers(make: Make) -> None:
    terms = [Loss(kind="hidden_mse"), Loss(kind="relation", relation_heads=2), Loss(kind="cosine"),
             Loss(kind="attention", layer_map="last")]  # fmt: skip
    pair = live.Pair(make(1), make(), terms, 0)
    found = pair(collate(packed(LENGTHS), range(4)))[1]
    assert found.keys() == {0, 1, 2, 3}
    assert all(torch.isfinite(value).all() and float(value.detach().min()) > 0 for value in found.values())
    with pytest.raises(RecipeError, match="the student has no queries and keys to compare"):
        live.Pair(make(1), make(), [Loss(kind="attention")], 0)


def test_a_killed_student_goes_on_to_the_same_bits_and_predicts_in_a_process_of_its_own(
    tmp_path: Path, runs: Path, bert: Path, recipe_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "sync", lambda folder: None)
    student = {"architecture": "fnet_from_bert", "checkpoint": str(bert), "config": {}, "attention_layers": 2}
    keys: dict[str, Any] = {f"student.{key}": value for key, value in student.items()}
    keys |= {"teacher.train.max_steps": 1, "student.train.max_steps": 9, "student.train.evaluate_every": 4}
    keys["student.train.gradient_checkpointing"] = True
    recipe = recipes.load(str(recipe_file(keys)))
    stages.train_teacher(recipe, "tiny", "t")

    def run(group: str) -> Path:
        job = stages.StudentJob(["t"], recipe.dump(), "tiny", "fnet_from_bert", group, 1, control=False)
        stages.train_students(job)
        return folders.find(group).model / "model.safetensors"

    whole = run("whole")
    with power_cut(7):
        run("cut")
    assert run("cut").read_bytes() == whole.read_bytes()
    assert not [name for name in load_file(whole) if "layer.1.attention.self" in name]
    rows = documents(6)
    done = distill("predict", "--run", "cut", str(write_csv(tmp_path / "new.csv", rows)))
    assert done.returncode == 0, done.stderr
    ours = models.load_predictor(folders.find("whole").model).logits([(text, None) for text, _ in rows])
    chances = np.exp(ours) / np.exp(ours).sum(1, keepdims=True)
    told = [float(line.split('"bad": ')[1].split(",")[0]) for line in done.stdout.splitlines()]
    np.testing.assert_allclose(told, chances[:, 0], atol=1e-5)


def test_a_student_cannot_be_cut_out_of_one(tmp_path: Path, make: Make) -> None:
    make(2).save(tmp_path / "model")
    cut = catalog.load("student", "teacher_layers").Config(architecture="teacher_layers", max_length=32)
    with pytest.raises((RecipeError, DataError), match="fnet_hybrid") as caught:
        models.build(cut, "student", TASK, 0, tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_precision_of_16_bits_reads_it_too(make: Make) -> None:
    model, data = make(2), packed([30, 20])
    low = inference.predict(model, data, np.arange(2), 4096, "bf16")
    np.testing.assert_allclose(low, everything(model, data), atol=0.3)
