"""Files, names and folders made by somebody who means harm: none is run, none leads astray, each is told in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Write, distill, documents, small_disk, write_csv
from safetensors.numpy import load_file, save_file
from test_cli import Command

from distill import (
    catalog,
    checkpoint,
    hub,
    logits,
    masked_live,
    models,
    pretrained,
    pretraining,
    recipe,
    records,
    runs,
)
from distill.checkpoint import TrainState
from distill.errors import DataError, LogitsError, RecipeError
from distill.evaluation import Predictions
from distill.files import sha256_file, write_json
from distill.runs import Run, RunFolder
from distill.tasks import TaskSpec

TASK = TaskSpec("single_label", ("bad", "good"), "accuracy")
DEEP = "[" * 100_000


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 500
    return message


# Model folders


class Evil:
    """Unpickled, it makes the sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


@pytest.fixture
def sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run foreign code"))
    return tmp_path / "sentinel"


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A tiny BERT with a head, as the hub has them."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert") / "model"
    shutil.copytree(tokenizer_folder, folder)
    config = BertConfig(vocab_size=200, max_position_embeddings=64, **TINY)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(classifier: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier, tmp_path / "model"))


def settle(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reader_of(folder: Path, **fields: Any) -> Any:
    """The section of a recipe that names the folder."""
    values = {"architecture": "bert", "checkpoint": str(folder), "max_length": 16, **fields}
    return catalog.load("teacher", "bert").Config.model_validate(values)


def _masked(folder: Path) -> None:
    # The student is looked at when the teacher has been read.
    masked_live.load_teacher(folder, SimpleNamespace())  # type: ignore[arg-type]


def _head(folder: Path) -> None:
    from transformers import BertConfig

    pretraining._take_head(SimpleNamespace(config=BertConfig()), str(folder))


READERS: dict[str, Callable[[Path], object]] = {
    "a teacher that is given": lambda folder: models.load(folder),
    "a checkpoint of a recipe": lambda folder: models.build(reader_of(folder), "teacher", TASK, 0),
    "a backbone": lambda folder: pretrained.backbone(str(folder), "teacher.checkpoint"),
    "a table of embeddings": lambda folder: pretrained.word_embeddings(str(folder), "data.augment.checkpoint"),
    "a student's teacher": lambda folder: models.build(
        catalog.load("student", "teacher_layers").Config.model_validate(
            {"architecture": "teacher_layers", "layers": [0], "max_length": 16}
        ),
        "student", TASK, 0, folder,
    ),
    "a teacher of pre-training": _masked,
    "a head of pre-training": _head,
}  # fmt: skip


@pytest.mark.parametrize("form", ["pickle", "torch", "shards", "named safetensors"])
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_in_a_model_folder_is_never_run(
    reader: str, form: str, folder: Path, sentinel: Path
) -> None:
    (folder / "model.safetensors").unlink()
    evil = {"bert.embeddings.word_embeddings.weight": Evil(sentinel)}
    if form == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(evil, protocol=2))
    elif form == "torch":
        torch.save(evil, folder / "pytorch_model.bin")
    elif form == "shards":
        torch.save(evil, folder / "part.bin")
        write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": {"a": "part.bin"}})
    else:
        (folder / "model.safetensors").write_bytes(pickle.dumps(evil))
    with pytest.raises(DataError) as caught:
        READERS[reader](folder)
    assert not sentinel.exists()
    assert ("are a pickle" in one_line(caught.value)) == (form != "named safetensors")


def test_weights_in_torchs_own_format_are_read_where_they_are_tensors_alone(folder: Path) -> None:
    from safetensors.torch import load_file as load

    torch.save(load(folder / "model.safetensors"), folder / "pytorch_model.bin")
    expected = models.weights_hash(models.load(folder).model)
    (folder / "model.safetensors").unlink()
    assert models.weights_hash(models.load(folder).model) == expected


def test_pickles_that_lie_beside_a_model_are_not_opened(folder: Path, sentinel: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        torch.save(Evil(sentinel), folder / name)
    models.load(folder)
    models.build(reader_of(folder), "teacher", TASK, 0)
    assert not sentinel.exists()


@pytest.mark.parametrize("reader", READERS)
def test_code_in_a_model_folder_is_never_run(reader: str, folder: Path, sentinel: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(sentinel)!r})\nclass C: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM")
    settle(folder, model_type="evil", auto_map=dict.fromkeys(names, "evil.C"))
    with pytest.raises(DataError, match="wants to run Python code of its own, and none is run") as caught:
        READERS[reader](folder)
    one_line(caught.value)
    assert not sentinel.exists()


def test_code_of_a_tokenizer_is_never_run(folder: Path, sentinel: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(sentinel)!r})\nclass C: pass\n")
    settle(
        folder, "tokenizer_config.json", tokenizer_class="C", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]}
    )
    models.load(folder)  # with the tokenizer that its tokenizer.json describes
    models.load_tokenizer(reader_of(folder), "teacher")
    models.load_tokenizer(reader_of(folder, checkpoint=None), "student", folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(DataError) as caught:
        models.load_tokenizer(reader_of(folder), "teacher")
    one_line(caught.value)
    assert not sentinel.exists()


def test_attention_that_would_be_fetched_from_the_hub_is_refused(folder: Path) -> None:
    settle(folder, attn_implementation="somebody/attention")
    with pytest.raises(DataError, match=r"wants attention from the hub \(somebody/attention\)"):
        models.load(folder)


@pytest.mark.parametrize("field", ["attn_implementation", "trust_remote_code", "use_kernels"])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_recipe_has_no_code_fetched(checkpoint: bool, field: str, folder: Path) -> None:
    wanted = {"config": {**TINY, field: "somebody/code"}, "tokenizer": str(folder)}
    section = reader_of(folder, **wanted) if checkpoint else reader_of(folder, checkpoint=None, **wanted)
    with pytest.raises(RecipeError, match=f"teacher.config: {field} can have transformers fetch code"):
        models.build(section, "teacher", TASK, 0)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", DEEP), ("config.json", "[]"), ("config.json", "{"), ("config.json", "\xff"),
        ("config.json", {"hidden_size": "x"}), ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"id2label": [1]}), ("config.json", {"id2label": {"0": "a"}}),
        ("config.json", {"architectures": 3}), ("config.json", {"dtype": "os.system"}),
        ("config.json", {"quantization_config": 3}), ("config.json", {"model_type": ["bert"]}),
        ("config.json", {"hidden_size": 10**12}),
        ("tokenizer.json", DEEP), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[]"),
        ("distill.json", "{}"), ("distill.json", DEEP), ("distill.json", "[3]"), ("distill.json", "\xed\xa0\x80"),
        ("model.safetensors", "\x00" * 7 + "\x10{}"), ("model.safetensors", "\x80" + "\x00" * 7 + "{}"),
    ],
)  # fmt: skip
def test_a_damaged_model_folder_is_one_line(file: str, content: Any, folder: Path) -> None:
    if isinstance(content, dict):
        settle(folder, file, **content)
    else:
        (folder / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        models.load(folder)
    assert folder.name in one_line(caught.value)


@pytest.fixture
def ours(folder: Path) -> Path:
    """A model folder with a ``distill.json``."""
    found = models.build(reader_of(folder), "teacher", TASK, 0)
    found.save(folder.parent / "ours")
    return folder.parent / "ours"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"section": "../../teacher"}, "section: must be 'teacher' or 'student'"),
        ({"model": {"architecture": "../evil"}}, "no teacher called '../evil'"),
        ({"model": {"architecture": "bert", "max_length": -1}}, "max_length"),
        ({"task": {"kind": "evil", "labels": [], "metric": "x"}}, "task.kind"),
        ({"task": {"kind": "single_label", "labels": [1], "metric": "x"}}, "task.labels"),
        ({"task": {"kind": "single_label", "labels": ["a", "b", "c"], "metric": "accuracy"}}, "2 labels"),
        ({"task": {"kind": "multi_label", "labels": ["a", "b"], "metric": "x", "thresholds": {"a": 0.5}}}, "thresholds and labels differ (b)"),
        ({"task": {"kind": "multi_label", "labels": ["a", "b"], "metric": "x", "thresholds": [0.5]}}, "task.thresholds"),
    ],
)  # fmt: skip
def test_what_a_model_says_of_itself_is_checked(changes: dict[str, Any], said: str, ours: Path) -> None:
    settle(ours, "distill.json", **changes)
    with pytest.raises(DataError) as caught:
        models.load_predictor(ours)
    assert said in one_line(caught.value)


def test_an_empty_folder_is_no_tokenizer_and_says_what_one_holds(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"student\.tokenizer: .* holds no tokenizer; there must be one of tokenizer\.json"
    ):
        models.load_tokenizer(reader_of(tmp_path, tokenizer=str(tmp_path)), "student")


def test_a_baseline_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    tfidf = catalog.load("student", "tfidf")
    config = tfidf.Config.model_validate({"architecture": "tfidf"})
    rows = documents(40)
    tfidf.fit(config, TASK, [(text, None) for text, _ in rows], np.array([label for _, label in rows])).save(
        tmp_path / "m"
    )
    terms = json.loads((tmp_path / "m" / "vocabulary.json").read_text())
    for wrong in (terms[1:], {"a": 1}, [1]):
        write_json(tmp_path / "m" / "vocabulary.json", wrong)
        with pytest.raises(DataError, match="damaged") as caught:
            models.load_predictor(tmp_path / "m")
        one_line(caught.value)


# Recipes and names


def test_of_a_recipe_of_100_megabytes_no_more_is_read_than_a_recipe_can_be(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError, match="larger than 1 MiB"):
            recipe.load(str(path))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "address",
    [
        "package://../../etc/passwd", "package://json/../../../../../etc/passwd", "package:///etc/passwd",
        "package://json//etc/passwd", "package://json/a\0b", "package://os.path/x", "package://json",
    ],
)  # fmt: skip
def test_a_package_address_leads_nowhere_else(address: str) -> None:
    with pytest.raises(DataError):
        hub.package_path(address)


def test_a_link_in_a_package_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_package").mkdir()
    (tmp_path / "evil_package" / "__init__.py").touch()
    (tmp_path / "evil_package" / "data").symlink_to("/etc")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="leaves the package"):
        hub.package_path("package://evil_package/data/passwd")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


NAMES = [
    "../..", "..", ".", "/etc", "~root", "a/../../b", "\x1b[2J\x1b[31mred", "[red]bold[/nonsense]", "x" * 10_000, "x/" * 5_000,
    "--name", "-rf", "_logits", ".lock", "mlflow.db/", "CON\n", "a\nb", "\u202eevil", "\u2028", "\udcff", "%s%n", "$(id)", "a\0b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_that_means_harm_is_one_harmless_line_wherever_it_stands(command: Command, name: str) -> None:
    own = runs.create(Run("own", "teacher", "own", "r", "e", "bert", 0, 1.0, "finished"), "description: x\n")
    before = sorted(Path.cwd().rglob("*"))
    for arguments in (
        ["teacher", "--recipe", "quickstart", f"--name={name}"], ["teacher", f"--resume={name}"],
        ["student", f"--teacher={name}"], ["student", f"--resume={name}"],
        ["student", "--teacher=own", "--recipe=quickstart", f"--name={name}", f"--logits={name}"],
        ["student", "--recipe=quickstart", f"--student={name}"], ["compare", "--", name], ["cache", "verify", "--", name],
        ["predict", f"--run={name}", "x.csv"], ["sync", "--", name], ["validate", "--", name], ["validate", f"{name}.yaml"],
        ["validate", "quickstart", f"--set={name}"], ["validate", "quickstart", f"--set={name}=1"],
        ["recipes", "show", "--", name], ["sweep", "--teacher=own", f"--students={name}"],
    ):  # fmt: skip
        done = command(*arguments)
        assert done.code in (1, 2, 3, 4), (arguments, done)
        *_, last, end = done.err.split("\n")
        assert last.startswith("distill: ")
        assert end == ""
        assert last.isprintable(), arguments
        assert len(last) < 1100
        assert "Traceback" not in done.err
    assert sorted(Path.cwd().rglob("*")) == before
    assert own.read().status == "finished"


# Run folders that somebody sent


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A finished run as it arrives from elsewhere."""
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    run = Run("sent", "teacher", "sent", "r", "e", "bert", 0, 1.0, "finished", 2.0, facts={"data": "d"})
    folder = runs.create(run, "description: x\n")
    folder.model.mkdir()
    found = Predictions(
        np.arange(4), np.eye(4, 2, dtype=np.float32), np.zeros(4, np.int64), np.ones(4, np.int32)
    )
    found.save(folder.predictions)
    figures = {"rows": 4, "accuracy": 0.5, "buckets": [{"words": "0+", "rows": 4, "accuracy": 0.5}]}
    task = {"kind": "single_label", "labels": ["a", "b"], "metric": "accuracy"}
    size = {"parameters": 10, "bytes": 20}
    folder.write_metrics(
        {
            "task": task,
            "test": figures,
            "validation": figures,
            "train": {"seconds": 1.0, "steps": 1},
            "model": size,
        }
    )
    return folder


BROKEN = {
    "no JSON": "{", "a list": "[]", "empty": "{}", "deep": DEEP, "no text": "\xff\xfe", "nothing": "", "a number": "1e999",
    "another shape": '{"name": 3, "task": [], "kind": {}, "shards": 3, "status": "evil", "labels": 1, "created": -1, "group": "../.."}',
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("file", ["run.json", "metrics.json"])
def test_a_run_folder_with_a_broken_file_is_one_line(
    file: str, how: str, sent: RunFolder, command: Command
) -> None:
    (sent.path / file).write_bytes(BROKEN[how].encode("latin-1"))
    for arguments in (["runs"], ["compare", "--no-bench"], ["compare", "sent", "--no-bench"]):
        said = command.refuse(4, *arguments)
        assert said.startswith(f"sent/{file}: damaged: ")
        assert len(said) < 300


def test_a_json_file_larger_than_any_of_ours_is_not_read(
    sent: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (sent.path / "run.json").open("ab") as file:
        file.truncate(records.MAX_BYTES + 1)
    with pytest.raises(DataError, match=r"sent/run\.json: larger than 64 MiB"):
        sent.read()


@pytest.mark.parametrize(
    "changes",
    [
        {"group": "../../outside"}, {"group": "a/b"}, {"role": "root"}, {"created": 1e300}, {"created": float("nan")}, {"seed": "0"},
        {"teachers": "t"}, {"finished": -1}, {"command": []},
    ],
)  # fmt: skip
def test_a_run_that_says_what_no_run_is_is_refused(changes: dict[str, Any], sent: RunFolder) -> None:
    settle(sent.path, "run.json", **changes)
    with pytest.raises(DataError, match=r"sent/run\.json: damaged: ") as caught:
        sent.read()
    one_line(caught.value)


def test_a_run_is_called_what_its_folder_is_called(sent: RunFolder) -> None:
    settle(sent.path, "run.json", name="../../etc")
    assert runs.find("sent").read().name == "sent"
    sent.path.rename(sent.path.parent / "\x1b[2J")
    assert runs.every() == []


def test_what_a_run_says_of_itself_cannot_paint_the_terminal(sent: RunFolder, command: Command) -> None:
    settle(
        sent.path,
        "run.json",
        model="\x1b[31m[/nonsense]$\\evil{$",
        recipe="[blink]\x07",
        experiment="$\\x{\x1b$",
    )
    for arguments in (["runs"], ["compare", "--no-bench"]):
        done = command(*arguments)
        assert done.code == 0
        assert "\x1b" not in done.out + done.err
        assert "\x07" not in done.out
        assert r"\x1b[31m[/no" in done.out


@pytest.mark.parametrize("changes", [{}, {"student": "tfidf"}, {"student": 3, "teachers": "x"}])
def test_a_resume_of_a_command_that_nobody_gave_is_one_line(
    changes: dict[str, Any], sent: RunFolder, command: Command
) -> None:
    settle(
        sent.path, "run.json", command={"student": "tfidf"} | changes, role="distilled", status="interrupted"
    )
    assert command.refuse(4, "student", "--resume", "sent").startswith("sent/run.json: damaged: ")


@pytest.mark.parametrize("name", ["journal.jsonl", "model/weights", "model", "checkpoints", "run.json"])
def test_a_link_out_of_a_run_folder_is_refused_before_anything_is_written_or_sent(
    name: str, sent: RunFolder, tmp_path: Path, command: Command
) -> None:
    outside = tmp_path / "outside"
    shutil.copy(sent.path / "run.json", outside)
    before = outside.read_bytes()
    path = sent.path / name
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    for arguments in (
        ["teacher", "--resume", "sent"],
        ["predict", "--run", "sent", "x.csv"],
        ["sync", "sent"],
    ):
        assert "a link out of the run's folder" in command.refuse(4, *arguments)
    assert outside.read_bytes() == before


def test_a_run_folder_on_another_disk_is_a_run(sent: RunFolder, tmp_path: Path) -> None:
    sent.path.rename(tmp_path / "other")
    sent.path.symlink_to(tmp_path / "other")
    assert runs.find("sent").read().group == "sent"


def test_lines_of_a_journal_that_are_no_figures_are_left_out(sent: RunFolder) -> None:
    sent.log(1, {"a": 1.0})
    with sent.journal.open("ab") as file:
        file.write(
            b"3\n[]\n" + DEEP.encode() + b'\n\xff\n{"time": 1, "step": -1, "metrics": {}}\n\n{"step": 2}\n'
        )
    sent.log(2, {"a": 2.0})
    assert [entry["step"] for entry in sent.entries()] == [1, 2]


@pytest.mark.parametrize("tensor", ["row_id", "logits", "labels", "words"])
def test_predictions_whose_parts_do_not_fit_are_refused(
    tensor: str, sent: RunFolder, command: Command
) -> None:
    arrays = load_file(sent.predictions)
    for wrong in (arrays[tensor][:2], np.zeros((4, 2, 2, 2), np.float32), None):
        changed = {**arrays, tensor: wrong}
        save_file({name: value for name, value in changed.items() if value is not None}, sent.predictions)
        assert command.refuse(4, "compare", "--no-bench").startswith(
            "sent/predictions.safetensors: damaged: "
        )


# Caches and checkpoints


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A whole cache of six rows in two shards."""
    folder = tmp_path / "cache"
    folder.mkdir()
    key = {
        "format": 1, "weights": "w", "config": "c", "tokenizer": "t", "reading": {"max_length": 8, "view": "head"}, "precision": "fp32",
        "dtype": "float32", "kind": "single_label", "labels": ["a", "b"],
    }  # fmt: skip
    write_json(folder / "key.json", key)
    for start in (0, 3):
        logits.write_shard(folder, np.arange(start, start + 3), np.ones((3, 2), np.float32), "float32")
    logits.write_manifest(folder, {})
    return folder


def reseal(folder: Path, arrays: dict[str, Any]) -> None:
    """Put a shard with these tensors, its name and its hash true, in the place of the first one."""
    manifest = json.loads((folder / "manifest.json").read_text())
    first = manifest["shards"][0]
    (folder / first["file"]).unlink()
    save_file(arrays, folder / "x")
    first["sha256"] = sha256_file(folder / "x")
    first["file"] = f"{first['sha256'][:32]}.safetensors"
    (folder / "x").rename(folder / first["file"])
    write_json(folder / "manifest.json", manifest)


IDS = np.arange(3)
ROWS = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    "arrays",
    [
        {"row_id": IDS}, {"logits": ROWS}, {"row_id": IDS[:2], "logits": ROWS[:2]}, {"row_id": IDS, "logits": ROWS[:2]},
        {"row_id": IDS, "logits": np.ones((3, 3), np.float32)}, {"row_id": IDS, "logits": np.ones(3, np.float32)},
        {"row_id": IDS.astype(np.float32), "logits": ROWS}, {"row_id": IDS[None], "logits": ROWS},
        {"row_id": IDS, "logits": ROWS.astype(np.int64)}, {"row_id": IDS, "logits": ROWS, "offsets": np.array([0, 1, 2, 3])},
    ],
)  # fmt: skip
def test_a_shard_that_lies_under_a_true_hash_is_refused(arrays: dict[str, Any], cache: Path) -> None:
    assert len(logits.Logits(cache)) == 6
    reseal(cache, arrays)
    for read in (lambda: logits.Logits(cache), lambda: logits.verify(cache)):
        with pytest.raises(LogitsError, match="shard") as caught:
            read()
        one_line(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8 + b"{}", (1 << 60).to_bytes(8, "little") + b"{}", b"\x80\x04N."]
)
def test_a_header_that_lies_under_a_true_name_is_refused(content: bytes, cache: Path) -> None:
    (cache / "x").write_bytes(content)
    (cache / "x").rename(cache / f"{sha256_file(cache / 'x')[:32]}.safetensors")
    with pytest.raises(LogitsError, match="cannot be read") as caught:
        logits.missing(cache, np.arange(9))
    one_line(caught.value)


@pytest.mark.parametrize("file", ["key.json", "manifest.json"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_cache_with_a_broken_file_is_one_line(file: str, how: str, cache: Path, command: Command) -> None:
    home = Path(os.environ["DISTILL_RUNS"]) / "_logits" / "cache"
    shutil.copytree(cache, home)
    (home / file).write_bytes(BROKEN[how].encode("latin-1"))
    for arguments in (["cache", "ls"], ["cache", "verify"]):
        assert command.refuse(4, *arguments).startswith(f"cache/{file}: damaged: ")


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../etc/passwd", "..", ""])
def test_a_manifest_names_no_file_outside_its_folder(name: str, cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    write_json(cache / "manifest.json", manifest)
    with pytest.raises(LogitsError, match="is missing"):
        logits.verify(cache)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.nn.Module, torch.optim.Optimizer]:
    """A checkpoint of a tiny model."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return (
        checkpoint.save(tmp_path / "checkpoints", model, optimizer, None, TrainState(step=1)),
        model,
        optimizer,
    )


def rehash(path: Path, **more: str) -> None:
    files = {file.name: sha256_file(file) for file in path.iterdir() if file.name != checkpoint.MANIFEST}
    write_json(path / checkpoint.MANIFEST, files | more)


@pytest.mark.parametrize(
    "manifest",
    [
        "{}",
        "[]",
        "3",
        DEEP,
        '{"model.safetensors": 3}',
        '{"/etc/passwd": "x"}',
        '{"../state.json": "x"}',
        "\xff",
    ],
)
def test_a_checkpoint_whose_manifest_says_nothing_is_not_whole(manifest: str, saved: Any) -> None:
    path, *_ = saved
    (path / checkpoint.MANIFEST).write_bytes(manifest.encode("latin-1"))
    with pytest.raises(DataError, match="is damaged"):
        checkpoint.latest(path.parent)


def test_a_checkpoints_manifest_names_no_file_outside_it(saved: Any) -> None:
    path, *_ = saved
    shutil.copy(path / "state.json", path.parent / "outside.json")
    rehash(path, **{"../outside.json": sha256_file(path / "state.json")})
    with pytest.raises(DataError, match="is damaged"):
        checkpoint.latest(path.parent)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "{}x"), ("state.json", '{"step": "1"}'), ("state.json", '{"meaning": []}'),
        ("model.safetensors", {"weight": np.ones(3, np.float32)}), ("model.safetensors", {}),
        ("optimizer.safetensors", {"a.exp_avg": IDS}), ("optimizer.safetensors", {"9.exp_avg": IDS}),
        ("optimizer.safetensors", {"0.exp_avg": np.ones((7, 7), np.float32)}),
        ("model.safetensors", "\x80\x04N."), ("optimizer.safetensors", "PK\x03\x04"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_something_else_under_true_hashes_is_one_line(
    file: str, content: Any, saved: Any
) -> None:
    path, model, optimizer = saved
    if isinstance(content, str):
        (path / file).write_bytes(content.encode("latin-1"))
    else:
        save_file(content, path / file)
    rehash(path)
    whole = checkpoint.latest(path.parent)
    assert whole is not None
    with pytest.raises(DataError) as caught:
        checkpoint.load(whole, model, optimizer, {})
    one_line(caught.value)


# Data


def test_two_columns_of_one_name_are_refused(tmp_path: Path, command: Command) -> None:
    from distill import sources
    from distill.prediction import read
    from distill.schema import Data

    file = write_csv(tmp_path / "twice.csv", [("a", "b", 0)], ("text", "text", "label"))
    with pytest.raises(DataError, match=r"twice\.csv: two columns are called 'text'"):
        sources.open_all(Data(source=str(file)), ["train"])
    with pytest.raises(DataError, match=r"twice\.csv: two columns are called 'text'"):
        list(read(file, "text", None))


def test_a_cell_of_50_megabytes_is_read_whole(tmp_path: Path) -> None:
    from distill import sources
    from distill.prediction import read
    from distill.schema import Data

    long = "word " * (10 << 20)
    file = write_csv(tmp_path / "long.csv", [(long, 0), ("short", 1)])
    assert [len(text) for text, _ in read(file, "text", None)] == [len(long), 5]
    found = sources.open_all(Data(source=str(file)), ["train"])["train"]
    assert [len(text) for text in found["text"]] == [len(long), 5]


def test_letters_that_are_no_letters_are_kept_as_they_are(tmp_path: Path) -> None:
    from distill import sources
    from distill.prediction import read
    from distill.schema import Data

    odd = ["a\0b", "\u202edrow", "\x1b[31m", "\ufeff", "\u2028", "[red]", "=1+1"]
    file = write_csv(tmp_path / "odd.csv", [(text, 0) for text in odd])
    assert [text for text, _ in read(file, "text", None)] == odd
    assert list(sources.open_all(Data(source=str(file)), ["train"])["train"]["text"]) == odd


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r'{"text": "a\ud800b"}', "half of a surrogate pair"),
        ('{"text": "a", "text": "b"}', "key 'text' twice"),
        (DEEP, "nested deeper than 100"),
        ('{"text": "a", "more": ' + DEEP + "]" * 100_000 + "}", "nested deeper than 100"),
    ],
)
def test_a_line_of_json_that_breaks_its_readers_is_named(line: str, said: str, tmp_path: Path) -> None:
    """Arrow's reader takes brackets as deep as the stack is, and the process ends there."""
    from distill import sources
    from distill.prediction import read
    from distill.schema import Data

    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "first"}\n' + line + "\n")
    for reader in (
        lambda: list(read(file, "text", None)),
        lambda: sources.open_all(Data(source=str(file)), ["train"]),
    ):
        with pytest.raises(DataError, match=f"line 2: {said}"):
            reader()


def test_brackets_that_are_opened_on_many_lines_are_counted(tmp_path: Path) -> None:
    from distill import sources

    file = tmp_path / "rows.jsonl"
    file.write_text('{"}":\n' * 200)
    with pytest.raises(DataError, match="line 101: nested deeper"):
        sources._refuse_deep(file)
    file.write_text('{"text": "[[[[ {{{ \\\\"}\n' * 200)
    sources._refuse_deep(file)


def test_labels_and_files_that_paint_are_shown_harmless(
    recipe_file: Write, command: Command, tmp_path: Path
) -> None:
    odd = tmp_path / "evil\x1b[2J\u202e.csv"
    names = ["\x1b[31mbad[/x]", "go\u202eod"]
    write_csv(odd, [(text, names[label]) for text, label in documents(160)])
    file = recipe_file({"data.source": str(odd)})
    done = command("teacher", "--recipe", str(file), "--dry-run", "--set", f"task.labels={json.dumps(names)}")
    assert done.code == 0, done.err
    assert r"\x1b[31mbad[/x]" in " ".join(done.out.split())
    assert not {"\x1b", "\u202e"} & {*done.out, *done.err}
    said = command.refuse(4, "teacher", "--recipe", str(file), "--set", "data.label=labl")
    assert said.isprintable()


# Machines


def test_a_home_that_cannot_be_written_is_told_with_the_way_around(recipe_file: Write) -> None:
    elsewhere = {name: value for name, value in os.environ.items() if name != "HF_DATASETS_CACHE"}
    asked = [sys.executable, "-m", "distill", "teacher", "--recipe", str(recipe_file()), "--dry-run"]
    done = subprocess.run(
        asked, capture_output=True, text=True, timeout=300, env=elsewhere | {"HOME": "/dev/null/home"}
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 4
    assert line.startswith("distill: data sets are cached in /dev/null/home/")
    assert line.endswith("which cannot be written; set HF_HOME to a folder that can")


def works_with(tmp: Path, recipe_file: Write) -> None:
    asked = ["teacher", "--recipe", str(recipe_file({"teacher.train.max_steps": 1})), "--name", "t"]
    done = distill(*asked, TMPDIR=str(tmp), DISTILL_RUNS=str(recipe_file().parent / "runs"))
    assert done.returncode == 0, done.stderr


def test_a_missing_tmp_stops_nothing(recipe_file: Write) -> None:
    works_with(Path("/dev/null/tmp"), recipe_file)


def test_a_full_tmp_stops_nothing(recipe_file: Write, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "64k") as tmp:
        (tmp / "ballast").write_bytes(b"x" * shutil.disk_usage(tmp).free)
        works_with(tmp, recipe_file)
