"""Sweeps: what is trained and what is not, under which names, what is refused, and the table at the end."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, Write

from distill import catalog, comparison, fitting, logits, progress, recipe, stages, sweep, tracking, training
from distill import runs as folders
from distill import search as searching
from distill.__main__ import main
from distill.errors import DistillError, Diverged, RecipeError, UsageError

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

    def train(
        model: Any, rows: Any, objective: Any, settings: Any, evaluate: Any, *rest: Any, **more: Any
    ) -> Any:
        if len(trained) == stop_at:
            raise ValueError("power cut")
        trained.append(rest[1].name)
        return real(model, rows, objective, settings, evaluate, *rest, **more)

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


def test_a_sweep_tokenises_once_for_all_that_read_alike(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, str]] = []
    kept: list[int] = []
    real, splits = fitting.encode_rows, fitting.encode_splits

    def encode(model: Any, rows: Any) -> Any:
        if model.config.architecture == "bert_miniature":
            read.append((model.config.max_length, rows.name))
        return real(model, rows)

    def encode_splits(model: Any, corpus: Any, held: fitting.Kept) -> Any:
        found = splits(model, corpus, held)
        kept.append(len(held))
        fresh = splits(model, corpus, {})
        read[-len(fresh) :] = []
        for name, one in fresh.items():
            for field in (
                "token_ids",
                "segments",
                "windows",
                "documents",
                "full_length",
                "row_id",
                "labels",
                "labelled",
            ):
                np.testing.assert_array_equal(getattr(found[name], field), getattr(one, field))
        return found

    monkeypatch.setattr(fitting, "encode_rows", encode)
    monkeypatch.setattr(fitting, "encode_splits", encode_splits)
    swept(file, "one,two", "student.max_length=16,24")
    names = ["test", "validation", "train", "transfer"]
    assert read == [(length, name) for length in (16, 24) for name in names]
    assert kept == [1] * 8


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
    with pytest.raises(RecipeError, match=r"student\.config: .*hidden"):
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
        (["-t", "t", "--students", "one", "--trials", "3"], 2, "--trials: only a --search has them"),
        (
            ["-t", "t", "--students", "one", "-g", "student.view=head", "--search", "a=1..2"],
            2,
            "takes --grid or --search",
        ),
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


# A search


RATE = "student.train.learning_rate"
WIDE = [f"{RATE}=1e-4..1e-1:log", f"{TEMPERATURE}=1..8"]


def searched(file: str, axes: Sequence[str] = WIDE, **changes: Any) -> list[searching.Best]:
    given: dict[str, Any] = {"trials": 16, "seeds": 1, "control": True, **changes}
    asked = searching.Search(
        file, "tiny", [], ["one"], searching.read_axes(axes), ["t"], "g", **given
    )  # fmt: skip
    corpus, parts = searching.check(asked)
    return searching.run(asked, corpus, parts)


Trained = list[tuple[str, Any]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Runs that are done at once: validation likes a rate near 0.01 and a temperature near 4, and test the contrary."""
    done: Trained = []

    def train(job: stages.StudentJob, *given: Any) -> None:
        found = recipe.build(yaml.safe_load(job.recipe), "tiny")
        rate, temperature = found.student.train.learning_rate, found.student.losses[0].temperature
        assert job.only is not None
        assert isinstance(temperature, float)
        for number in range(job.seeds):
            name = stages.member(job.prefix or "", job.only, number)
            if (folders.runs_folder() / name).exists():
                continue
            done.append((name, (rate, temperature)))
            folder = fitting.new_run(
                name, job.only, found, "tiny", group="g", model=job.student, against=job.against, teachers=["t"]
            )  # fmt: skip
            folder.update(status="finished")
            value = (
                1
                - abs(math.log10(rate) + 2) / 8
                - (abs(temperature - 4) / 20 if job.only == "distilled" else 0)
            )
            figures = {"validation": {"accuracy": value}, "test": {"accuracy": 1 - value}}
            task = {"kind": "single_label", "labels": ["bad", "good"], "metric": "accuracy"}
            folder.write_metrics({**figures, "task": task, "train": {"seconds": 1.0, "steps": 1}})

    monkeypatch.setattr(stages, "train_students", train)
    return done


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ([f"{RATE}=1e-3..1e-4"], f"--search {RATE}: a range is two numbers, the lower one first"),
        ([f"{RATE}=low..high"], f"--search {RATE}: a range is two numbers"),
        ([f"{RATE}=0..1:log"], f"--search {RATE}: a range with :log begins above 0, not at 0"),
        ([f"{RATE}=1e-3..1e-3"], f"--search {RATE}: holds 0.001 twice"),
        ([f"{RATE}=1..2", f"{RATE}=3..4"], f"--search {RATE}: stands twice"),
        (["data.seed=1..2"], "--search data.seed: the rows must be the same for every run"),
        ([RATE], f"--search {RATE}: no values"),
    ],
)  # fmt: skip
def test_a_range_that_is_none_is_refused(axes: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        searching.read_axes(axes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranges_and_choices_are_read() -> None:
    choices = ["student.view=head,tail", "student.tokenizer=../a,../b"]
    assert searching.read_axes([*WIDE, *choices]) == {
        RATE: searching.Axis([1e-4, 1e-1], True, True),
        TEMPERATURE: searching.Axis([1, 8], True),
        "student.view": searching.Axis(["head", "tail"]),
        "student.tokenizer": searching.Axis(["../a", "../b"]),
    }


def test_validation_alone_chooses_and_the_control_searches_as_long(file: str, trained: Trained) -> None:
    control, distilled = searched(file, seeds=3)
    for best, role in ((control, "control"), (distilled, "distilled")):
        assert (best.part.role, best.trials) == (role, 16)
        tried = [folder for folder in folders.every() if folder.read().role == role]
        figures = {folder.name: folder.metrics()["validation"]["accuracy"] for folder in tried}
        assert best.value == max(figures.values()) == figures[best.part.names[0]]
        assert best.part.names == [
            stages.member(best.part.job.prefix or "", best.part.role, n) for n in range(3)
        ]
        assert len(tried) <= 16 + 2
        assert len({folder.read().model for folder in tried}) > 10
        assert all(1e-4 <= values[0] <= 1e-1 for name, values in trained)
    assert {values[1] for name, values in trained if "control" not in name} <= set(range(1, 9))
    assert {folders.find(name).read().against for name in distilled.part.names} == {control.part.label}
    late = [values[0] for name, values in trained if "control" in name][10:16]
    assert all(1e-3 < rate < 1e-1 for rate in late), (
        "after ten random trials it stays where validation is good"
    )


def test_a_search_that_was_killed_goes_on_to_the_same_trials(
    file: str, runs: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched(file, trials=12, control=False)
    whole = list(trained)
    for path in runs.glob("g-*"):
        shutil.rmtree(path)
    trained.clear()
    real = stages.train_students

    def killed(*given: Any) -> Any:
        if len(trained) == 11:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(stages, "train_students", killed)
    with pytest.raises(KeyboardInterrupt):
        searched(file, trials=12, control=False)
    monkeypatch.setattr(stages, "train_students", real)
    searched(file, trials=12, control=False)
    assert trained == whole
    searched(file, trials=13, control=False)
    assert trained[: len(whole)] == whole
    assert len(trained) <= len(whole) + 1, "more trials begin with those that there are"


def test_a_trial_that_diverges_is_passed_over_and_not_tried_again(
    file: str, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages.train_students
    fell: list[str] = []

    def diverging(job: stages.StudentJob, *given: Any) -> Any:
        found = recipe.build(yaml.safe_load(job.recipe), "tiny")
        if found.student.train.learning_rate > least and job.only != "baseline":
            name = stages.member(job.prefix or "", job.only or "control", 0)
            fell.append(name)
            folder = fitting.new_run(name, job.only or "control", found, "tiny", teachers=["t"])
            with folder.working():
                raise Diverged("the loss is not finite")
        return real(job, *given)

    least = 0.01
    monkeypatch.setattr(stages, "train_students", diverging)
    best = searched(file, trials=6)
    assert len(fell) == len(set(fell)) > 1
    count = len(fell)
    assert searched(file, trials=6) == best
    assert len(fell) == count
    least = 0.0
    with pytest.raises(DistillError, match="one control: every trial diverged"):
        searched(file, trials=6, axes=[f"{RATE}=0.3..0.5"])


def test_what_changes_a_controls_steps_is_not_searched(file: str, trained: Trained) -> None:
    kinds = ["student.losses=[{kind: soft}],[{kind: dkd}]"]
    with pytest.raises(UsageError, match="reads other rows than without"):
        searched(file, kinds)
    assert searched(file, kinds, control=False)[0].trials == 16


def test_a_control_that_no_key_touches_is_trained_once(file: str, trained: Trained) -> None:
    axes = [f"{TEMPERATURE}=1.0..8.0"]
    control, distilled = searched(file, axes, trials=4)
    assert (control.trials, distilled.trials) == (1, 4)
    assert [name for name, _ in trained if "control" in name] == ["g-one-control"]
    assert all(len(str(values[1])) <= 4 for name, values in trained if "control" not in name)
    best = folders.find(distilled.part.names[0])
    best.update(against="one learning_rate=0.3")  # as an earlier search left it
    searched(file, axes, trials=4)
    assert best.read().against == "one"


def test_an_end_of_a_range_that_does_not_fit_is_told_before_anything_is_trained(
    file: str, trained: Trained
) -> None:
    with pytest.raises(RecipeError, match=r"student\.train\.label_smoothing: must be less than 1"):
        searched(file, ["student.train.label_smoothing=0.0..1.5"])
    assert trained == []


def test_a_search_ends_in_the_table_of_its_best_with_the_figures_that_chose_them(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.out, "width", 120)
    asked = ["sweep", "-t", "t", "--students", "one", "--search", f"{RATE}=1e-4..1e-1:log", "--trials", "2"]
    asked += ["--no-bench", "--name", "s"]
    assert command(monkeypatch, *asked, "--dry-run") == 0
    assert "1 student, 2 trials each, 2 of its control" in capsys.readouterr().out
    assert [folder.name for folder in folders.every()] == ["t"]
    assert command(monkeypatch, *asked) == 0
    out = capsys.readouterr().out
    names = re.findall(r"best of 2 by validation: accuracy (\d\.\d+) \((s-one-\S+)\)$", out, re.MULTILINE)
    assert len(names) == 2
    for value, name in names:
        assert value == f"{folders.find(name).metrics()['validation']['accuracy']:.3f}"
    lines = re.findall(r"^(one \S+ (?:distilled|control)) +\d\.\d+", out, re.MULTILINE)
    assert len(lines) == 2 * 2, "the best alone, in the table of quality and that of lengths"
    assert "gap" in out


def test_without_optuna_a_search_says_how_to_install_it(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert command(monkeypatch, "sweep", "-t", "t", "--students", "one", "--search", f"{RATE}=1..2") == 2
    assert capsys.readouterr().err == (
        "distill: --search needs Optuna, which is not installed: pip install optuna, or -e '.[search]' in a checkout\n"
    )
