"""Sweeps: what is trained and what is not, under which names, what is refused, and the table at the end."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, Write

from distill import catalog, comparison, fitting, logits, progress, recipe, stages, sweep, tracking, training
from distill import runs as folders
from distill.__main__ import main
from distill.errors import DistillError, RecipeError, UsageError

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

TEMPERATURE = "student.losses.0.temperature"


@pytest.fixture(autouse=True)
def _untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracker has tests of its own, and takes longer than all else here."""
    monkeypatch.setattr(tracking, "sync", lambda folder: None)
    monkeypatch.setattr(training, "release_memory", lambda: None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "runs"


@pytest.fixture
def file(runs: Path, recipe_file: Write, kept: Path) -> str:
    """The recipe of the teacher ``t``, which has finished."""
    path = recipe_file({"student.train.batch_size": 16})
    if not kept.exists():
        stages.train_teacher(recipe.load(str(path)), "tiny", "t")
        shutil.copytree(runs, kept)
    else:
        shutil.copytree(kept, runs, dirs_exist_ok=True)
    return str(runs / "t" / "recipe.yaml")


@pytest.fixture(autouse=True)
def _small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names of students from scratch."""
    small = {"architecture": "bert_miniature", "checkpoint": None}
    names = {
        "one": {**small, "config": TINY},
        "two": {**small, "config": {**TINY, "num_hidden_layers": 1}},
        "tfidf": {"architecture": "tfidf"},
        "fnet": {"architecture": "fnet", "checkpoint": None},
    }
    monkeypatch.setattr(catalog, "presets", lambda: names)


def listed(file: str, students: str, *grid: str, control: bool = True) -> list[sweep.Combination]:
    return sweep.combinations(file, [], students.split(","), sweep.read_grid(grid), "g", control=control)


def swept(file: str, students: str, *grid: str, seeds: int = 1) -> list[sweep.Part]:
    corpus, parts = sweep.plan(listed(file, students, *grid), "tiny", ["t"], "g", seeds)
    sweep.run(parts, corpus)
    return parts


def refusal(file: str, students: str, *grid: str, of: type[DistillError] = UsageError) -> str:
    with pytest.raises(of) as caught:
        listed(file, students, *grid)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_control_is_listed_once_for_all_that_it_cannot_tell_apart(file: str) -> None:
    found = listed(file, "one,two", f"{TEMPERATURE}=1,4", "student.train.learning_rate=1e-3,1e-2")
    controls = [one for one in found if one.role == "control"]
    assert sorted(one.label for one in controls) == [
        f"{name} learning_rate={rate}" for name in ("one", "two") for rate in ("0.001", "0.01")
    ]
    distilled = [one for one in found if one.role == "distilled"]
    assert len(distilled) == 8
    for one in distilled:
        assert one.against == one.label.replace("temperature=1 ", "").replace("temperature=4 ", "")
    assert [one.label for one in found if one.role == "baseline"] == ["tfidf"]


def test_a_control_that_makes_other_steps_is_another(file: str) -> None:
    found = listed(file, "one", "student.losses=[{kind: soft}],[{kind: mse_logits}],[{kind: dkd}]")
    assert [one.label for one in found if one.role == "control"] == ["one", 'one losses=[{"kind": "dkd"}]']
    assert [one.against for one in found if one.role == "distilled"] == [
        "one",
        "one",
        'one losses=[{"kind": "dkd"}]',
    ]


def test_without_control_there_is_none(file: str) -> None:
    assert {one.role for one in listed(file, "one", control=False)} == {"baseline", "distilled"}


def test_the_values_of_the_grid_reach_the_recipe(file: str) -> None:
    found = listed(file, "one", f"{TEMPERATURE}=1,4", "student.view=head,tail", control=False)[1:]
    assert [(x.recipe.student.losses[0].temperature, x.recipe.student.view) for x in found] == [
        (1.0, "head"), (1.0, "tail"), (4.0, "head"), (4.0, "tail")
    ]  # fmt: skip


def test_names_are_runs_names_and_differ(file: str) -> None:
    long = "student.train.weight_decay=" + ",".join(f"0.{'1' * n}" for n in (1, 9, 14, 15))
    found = listed(file, "one,two", long, "student.losses=[{kind: soft}],[{kind: mse_logits}]")
    names = [stages.member(one.prefix, one.role, 99) for one in found]
    assert len(set(names)) == len(names)
    assert all(folders.check_name(name) for name in names)
    plain = listed(file, "one", f"{TEMPERATURE}=2", "student.losses.1.weight=0.5")
    assert plain[1].prefix == "g-one-temperature-2-weight-0.5"
    both = listed(file, "one", "student.losses.0.weight=2", "student.losses.1.weight=0.5")
    assert both[1].label == "one losses.0.weight=2 losses.1.weight=0.5"


@pytest.mark.parametrize(
    ("students", "grid", "words"),
    [
        ("one,one", [], "--students: one stands twice"),
        ("one,to", [], "no student called 'to'; did you mean 'two'?"),
        ("", [], "no student called ''"),
        ("one,tfidf", [], "--students: tfidf is trained beside every sweep; leave it out"),
        ("one", [f"{TEMPERATURE}="], "--grid student.losses.0.temperature=: no values"),
        ("one", [TEMPERATURE], "--grid student.losses.0.temperature: no values"),
        ("one", [f"{TEMPERATURE}=1,2,1"], "--grid student.losses.0.temperature: holds 1 twice"),
        ("one", ["student.view=head", "student.view=tail"], "--grid student.view: stands twice"),
        ("one", ["data.seed=1,2"], "--grid data.seed: the rows must be the same for every run"),
        ("one", ["data.splits.train.rows=1,2"], "--grid data.splits.train.rows: the rows must be the same"),
        ("one", ["teacher.max_length=64"], "--grid teacher.max_length: must be a key under student."),
        ("one", ["student.architecture=fnet"], "--grid student.architecture: students are named by --students"),
        ("one", ["student.train.seed=1,2"], "--grid student.train.seed: seeds are counted by --seeds"),
    ],
)  # fmt: skip
def test_a_sweep_that_makes_no_sense_is_refused(
    file: str, students: str, grid: list[str], words: str
) -> None:
    assert words in refusal(file, students, *grid)


@pytest.mark.parametrize(
    ("students", "grid", "words"),
    [
        ("one", "student.train.lerning_rate=1", "unknown key student.train.lerning_rate; did you mean 'learning_rate'?"),
        ("one", "student.losses.0.temprature=1", "unknown key student.losses.0.temprature; did you mean 'temperature'?"),
        ("one", "student.train.epochs=-1", "student.train.epochs: must be greater than 0, not -1"),
        ("one,fnet", "student.width=128", "unknown key student.width"),
        ("one", "student.view=head,,tail", "--grid student.view"),
    ],
)  # fmt: skip
def test_a_key_or_a_value_that_a_student_has_not_is_refused(
    file: str, students: str, grid: str, words: str
) -> None:
    assert words in refusal(file, students, grid, of=RecipeError)


def test_the_groups_name_is_the_teachers_and_never_a_runs(file: str) -> None:
    assert sweep.group_name(None, "t") == "t-sweep"
    assert re.fullmatch(r"my-model-sweep", sweep.group_name(None, "some/where/my-model/"))
    assert sweep.group_name("mine", "t") == "mine"
    with pytest.raises(UsageError, match="--name t: a run has this name"):
        sweep.group_name("t", "t")
    with pytest.raises(UsageError, match="run name"):
        sweep.group_name("a/b", "t")


def test_a_sweep_trains_each_once_from_one_cache_and_goes_on_where_it_stopped(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    real = training.train
    stop_at = 4

    def train(model: Any, rows: Any, objective: Any, settings: Any, evaluate: Any, *rest: Any) -> Any:
        if len(trained) == stop_at:
            raise ValueError("power cut")
        trained.append(rest[1].name)
        return real(model, rows, objective, settings, evaluate, *rest)

    monkeypatch.setattr(fitting, "train", train)
    with pytest.raises(ValueError, match="power cut"):
        swept(file, "one,two", f"{TEMPERATURE}=1,4", seeds=2)
    stop_at = 100
    parts = swept(file, "one,two", f"{TEMPERATURE}=1,4", seeds=2)
    expected = [
        f"g-{name}{rest}{seed}"
        for name in ("one", "two")
        for rest in ("-temperature-1", "-control", "-temperature-4")
        for seed in ("", "-seed1")
    ]
    assert trained == expected
    assert {name for part in parts for name in part.names} == {*expected, "g-tfidf"}
    assert all(part.finished == part.names for part in parts)
    assert len(logits.every()) == 1
    assert "cached logits of" in capsys.readouterr().err
    swept(file, "one,two", f"{TEMPERATURE}=1,4", seeds=2)
    assert trained == expected, "nothing is trained again"
    assert "cached logits of" not in capsys.readouterr().err

    for part in parts:
        for name in part.names:
            assert folders.find(name).metrics()["train"]["steps"] == part.steps
    found = comparison.compare(comparison.collect(["g"]))
    lines = {row.label: row for row in found.rows}
    assert set(lines) == {
        "teacher bigbird",
        "tfidf",
        *(f"{n} temperature={t} distilled" for n in ("one", "two") for t in (1, 4)),
        "one control",
        "two control",
    }
    for name in ("one", "two"):
        control = lines[f"{name} control"]
        for t in (1, 4):
            mine = lines[f"{name} temperature={t} distilled"]
            assert mine.margin is not None
            assert mine.margin.mean == pytest.approx(mine.quality.mean - control.quality.mean)
    order = [row.label for row in found.rows if row.label.startswith("one")]
    assert order[2] == "one control", "each control stands below all that are held against it"
    alone = comparison.collect(["g-one-temperature-4"])
    assert {folder.name for folder in alone} == {"t", "g-tfidf", "g-one-temperature-4", "g-one-control"}


def test_a_run_of_another_recipe_is_not_taken_for_one_of_the_sweeps(file: str) -> None:
    swept(file, "one")
    for setting, name in (("student.max_length=24", "g-one"), ("evaluation.length_buckets=[9]", "g-tfidf")):
        other = sweep.combinations(file, [setting], ["one"], {}, "g", control=True)
        with pytest.raises(UsageError, match=f"{name} exists already, with another recipe or teacher"):
            sweep.plan(other, "tiny", ["t"], "g", 1)
    _, parts = sweep.plan(listed(file, "two,one"), "tiny", ["t"], "g", 2)
    assert [part.finished for part in parts if part.finished] == [["g-tfidf"], ["g-one"], ["g-one-control"]]


def test_settings_are_for_the_students_that_are_swept_and_not_for_the_recipes_own(file: str) -> None:
    raw = yaml.safe_load(Path(file).read_text())
    raw["student"] = {"architecture": "teacher_layers", "losses": raw["student"]["losses"]}
    Path(file).write_text(yaml.safe_dump(raw))
    found = sweep.combinations(file, ["student.width=256"], ["one"], {}, "g", control=False)
    assert [one.recipe.student.model_dump()["width"] for one in found] == [256, 256]


def test_a_model_that_cannot_be_built_is_told_before_anything_is_trained(file: str) -> None:
    found = listed(file, "one", 'student.config={"hidden_size": 32},{"hidden_size": 33}')
    with pytest.raises(ValueError, match="hidden"):
        sweep.plan(found, "tiny", ["t"], "g", 1)
    assert [folder.name for folder in folders.every()] == ["t"]


def test_the_time_left_is_that_of_the_students_that_have_been_timed(file: str) -> None:
    corpus, parts = sweep.plan(listed(file, "one,two"), "tiny", ["t"], "g", 2)
    assert sweep.time_left(parts) == "time of one, two known after its first run"
    sweep.run(parts[:2], corpus)
    for name in parts[1].names:
        folder = folders.find(name)
        figures = folder.metrics()
        figures["train"] |= {"seconds": 60.0, "steps": 1}
        folder.write_metrics(figures)
    left = 2 * parts[2].steps
    assert (
        sweep.time_left(parts)
        == f"about {left} min 0 s of training left, time of two known after its first run"
    )


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["distill", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_command_shows_its_plan_trains_and_ends_in_the_table(
    file: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "sweep",
        "-t",
        "t",
        "--students",
        "one,two",
        "-g",
        f"{TEMPERATURE}=1,4",
        "--no-bench",
        "--name",
        "s",
    ]
    monkeypatch.setattr(progress.out, "width", 120)
    assert command(monkeypatch, *asked, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "7 runs, 0 of them finished; 42 steps to make; time of one, two known after its first run" in shown
    assert [path.name for path in runs.glob("*/run.json")] == ["run.json"], "nothing but the teacher"
    assert command(monkeypatch, *asked) == 0
    table = capsys.readouterr().out.partition("steps to make")[2]
    for label in (f"{name} temperature={t} distilled" for name in ("one", "two") for t in (1, 4)):
        assert re.search(rf"^{label} +\d\.\d+", table, re.MULTILINE), label
    assert command(monkeypatch, *asked, "--dry-run") == 0
    assert "7 runs, 7 of them finished; 0 steps to make; nothing left to train" in capsys.readouterr().out
    assert (runs / "s" / "report").is_dir()
    assert folders.find("s-one-temperature-4").read().command["only"] == "distilled"
    assert command(monkeypatch, "student", "--resume", "s-one-temperature-4") == 0, "a run alone goes on too"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--students", "one"], 2, "--teacher is missing"),
        (["-t", "nope", "--students", "one"], 2, "no run called 'nope'"),
        (["-t", "t"], 2, "--students"),
        (["-t", "t", "--students", "one", "--name", "t"], 2, "a run has this name"),
        (["-t", "t", "--students", "one,one"], 2, "one stands twice"),
        (["-t", "t", "--students", "one", "-g", "student.trian.epochs=1"], 3, "did you mean 'train'?"),
        (["-t", "some/model", "--students", "one"], 2, "--recipe is missing"),
    ],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str], code: int, words: str, file: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert command(monkeypatch, "sweep", *arguments) == code
    done = capsys.readouterr()
    assert done.out == ""
    assert words in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_students_of_every_beginning_are_swept_together(
    file: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    BertModel(BertConfig(**TINY, vocab_size=len(words))).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    from_bert = {"checkpoint": str(tmp_path / "bert"), "config": {}}
    names = catalog.presets() | {
        "minilm": {"architecture": "auto", **from_bert},
        "fourier": {"architecture": "fnet_from_bert", **from_bert},
        "narrow": {**catalog.presets()["one"], "init": "teacher_embeddings"},
    }
    names["narrow"] |= {"config": {**TINY, "hidden_size": 16}}
    monkeypatch.setattr(catalog, "presets", lambda: names)
    swept(file, "minilm,fourier,narrow")
    found = comparison.compare(comparison.collect(["g"]))
    assert {row.label: row.agreement is not None for row in found.rows if row.role == "distilled"} == {
        "minilm distilled": True, "fourier distilled": True, "narrow distilled": True
    }  # fmt: skip
