"""The command line's door: exit codes, one line for a mistake, and answers that come at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
from conftest import Write, distill, documents, write_csv

from distill import catalog, runs
from distill.__main__ import main
from distill.cli import app


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """The command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *arguments: str) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["distill", *arguments])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = self.capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Done(end.value.code, out, err)

    def refuse(self, code: int, *arguments: str) -> str:
        """Run what must fail; return its one line."""
        done = self(*arguments)
        assert done.code == code, done.err
        assert done.out == ""
        *before, last = done.err.splitlines()
        assert last.startswith("distill: ")
        assert "Traceback" not in done.err
        assert all(not line.startswith("distill: ") for line in before)
        return last.removeprefix("distill: ")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def verbs() -> Iterator[tuple[str, ...]]:
    """Walk every command, groups too."""

    def walk(found: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for name, inner in sorted(getattr(found, "commands", {}).items()):
            yield from walk(inner, (*path, name))

    yield from walk(typer.main.get_command(app), ())


# Help


def test_the_verbs_are_those_that_are_promised() -> None:
    assert {path[0] for path in verbs() if path} >= {
        "teacher", "cache", "student", "compare", "predict", "validate", "recipes", "runs", "ui", "sync", "doctor"
    }  # fmt: skip


@pytest.mark.parametrize("path", list(verbs()), ids=" ".join)
def test_every_verb_has_help_with_an_example(command: Command, path: tuple[str, ...]) -> None:
    done = command(*path, "--help")
    assert (done.code, done.err) == (0, "")
    if path:
        assert f"Example: distill {' '.join(path)}" in " ".join(done.out.split())
    else:
        assert "distill teacher --recipe quickstart" in " ".join(done.out.split())


def test_help_and_mistakes_import_nothing_heavy() -> None:
    asked = [[*path, "--help"] for path in verbs()]
    asked += [
        ["recipes"], ["recipes", "show", "quickstart"], ["recipes", "show", "nope"],
        ["validate", "quickstart"], ["validate", "nope"], ["validate", "quickstart", "--set", "teacher.trian=1"],
        ["teacher", "--nope"], ["teacher", "--recipe", "nope"], ["teacher"], ["teachr"], ["predict", "--run"],
        ["teacher", "--resume", "nope"],
        ["student", "--recipe", "quickstart", "--student", "nope"], ["student", "--teacher", "nope"], ["runs", "--json"],
        ["student", "--recipe", "quickstart", "--teacher", "nope"], ["predict", "--run", "nope", "x.txt"], ["cache"],
    ]  # fmt: skip
    script = """
import json, sys
from distill.__main__ import main
heavy = ("torch", "transformers", "mlflow", "datasets", "sklearn", "accelerate", "scipy", "matplotlib")
for arguments in json.load(sys.stdin):
    sys.argv = ["distill", *arguments]
    try:
        main()
    except SystemExit as end:
        code = end.code
    print("@@", json.dumps([arguments, code, [name for name in heavy if name in sys.modules]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(asked), capture_output=True, text=True, timeout=100
    )
    found = [json.loads(line[3:]) for line in done.stdout.splitlines() if line.startswith("@@ ")]
    assert len(found) == len(asked), done.stderr
    for arguments, code, imported in found:
        assert imported == [], f"distill {' '.join(arguments)} imports {imported}"
        good = "--help" in arguments or arguments[:2] in (["recipes"], ["recipes", "show"], ["validate", "quickstart"], ["runs", "--json"])  # fmt: skip
        assert (code == 0) == (good and "nope" not in arguments and "--set" not in arguments), arguments


def test_an_installed_command_answers_like_the_module() -> None:
    module = distill("recipes")
    script = subprocess.run(
        [str(Path(sys.executable).with_name("distill")), "recipes"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (module.returncode, module.stdout) == (script.returncode, script.stdout)
    assert "quickstart" in script.stdout


# Usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teachr"], "no such command 'teachr'"),
        (["teacher", "--recpe", "x"], "no such option: --recpe"),
        (["teacher"], "give --recipe to begin a run, or --resume"),
        (["teacher", "--recipe", "a", "--resume", "b"], "give --recipe to begin a run, or --resume"),
        (["teacher", "--resume", "a", "--set", "b=c"], "--resume goes on with the run's own recipe"),
        (["student", "--resume", "a", "--seeds", "2", "--student", "x"], "--resume goes on"),
        (["student", "--seeds", "0", "--teacher", "a"], "invalid value for '--seeds'"),
        (["student", "--teacher", "google/bert"], "--recipe is missing"),
        (["predict", "--run"], "option '--run' requires an argument"),
        (["predict", "--run", "x"], "missing argument"),
        (["cache"], "--teacher is missing"),
        (["cache", "--teacher", "a", "--split", "test"], "--split: no split 'test' to cache"),
        (["ui", "--port", "abc"], "invalid value for '--port'"),
    ],
)  # fmt: skip
def test_a_usage_mistake_is_one_line_and_exit_code_2(
    command: Command, arguments: list[str], words: str
) -> None:
    assert words in command.refuse(2, *arguments)


def test_an_unknown_recipe_or_setting_is_exit_code_3(command: Command) -> None:
    assert command.refuse(3, "teacher", "--recipe", "quickstrt") == (
        "no recipe called 'quickstrt'; did you mean 'quickstart'?"
    )
    line = command.refuse(3, "validate", "quickstart", "--set", "teacher.train.lerning_rate=1e-5")
    assert line == "quickstart: unknown key teacher.train.lerning_rate; did you mean 'learning_rate'?"
    assert "must be a valid number" in command.refuse(
        3, "validate", "quickstart", "--set", "teacher.train.epochs='2'"
    )
    assert "no recipe file ./nope.yaml" in command.refuse(3, "recipes", "show", "./nope.yaml")


def test_an_unknown_student_is_exit_code_2(command: Command) -> None:
    line = command.refuse(
        2, "student", "--recipe", "quickstart", "--teacher", "run1", "--student", "bert_tinny"
    )
    assert line == "--student: no student called 'bert_tinny'; did you mean 'bert_tiny'?"


def test_debug_shows_the_traceback_of_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.errors import RecipeError

    monkeypatch.setattr(sys, "argv", ["distill", "validate", "nope", "--debug"])
    with pytest.raises(RecipeError):
        main()


def test_a_mistake_in_a_process_of_its_own_is_one_line() -> None:
    done = distill("validate", "quickstart", "--set", "student.losses=[{kind: soft, temprature: 2}]")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "distill: quickstart: unknown key student.losses.0.temprature; did you mean 'temperature'?\n"
    )


# Runs


def make_run(name: str, status: Any = "finished") -> None:
    run = runs.Run(
        name=name, role="teacher", group=name, recipe="r", experiment="e", model="bigbird", seed=0,
        created=time.time(), status=status,
    )  # fmt: skip
    runs.create(run, "")


def test_an_unknown_run_comes_with_the_nearest(command: Command) -> None:
    make_run("reviews-long")
    nearest = "no run called 'review-long' in runs/; did you mean 'reviews-long'?"
    assert command.refuse(2, "predict", "--run", "review-long", "x.txt") == nearest
    assert command.refuse(2, "teacher", "--resume", "review-long") == nearest
    assert command.refuse(2, "student", "--recipe", "quickstart", "--teacher", "review-long") == nearest
    assert command.refuse(2, "sync", "review-long") == nearest


def test_a_teacher_is_given_once_and_any_of_several_has_the_recipe(command: Command) -> None:
    make_run("run1")
    for verb in (["student"], ["sweep", "--students", "bert_tiny"], ["cache"]):
        assert command.refuse(2, *verb, "-t", "run1", "-t", "run1") == "--teacher: run1 stands twice"
    runs.find("run1").recipe.write_text("x")
    for verb in (["student"], ["sweep", "--students", "bert_tiny"], ["cache"]):
        line = command.refuse(3, *verb, "-t", "./some/model", "-t", "run1")
        assert line == "recipe.yaml: a recipe is a mapping of keys to values"


def test_a_report_is_not_written_onto_a_file(command: Command) -> None:
    Path("report.md").touch()
    assert (
        command.refuse(2, "compare", "--report", "report.md")
        == "--report: report.md is a file; give a folder"
    )


def test_a_run_that_has_not_finished_teaches_and_predicts_nothing(command: Command) -> None:
    make_run("run1", "interrupted")
    for arguments in (
        ["predict", "--run", "run1", "x.txt"],
        ["student", "--recipe", "quickstart", "--teacher", "run1"],
    ):
        assert command.refuse(2, *arguments) == (
            "run1 has not finished (interrupted); go on with it: distill teacher --resume run1"
        )


@pytest.mark.parametrize(
    "name",
    ["../..", "..", ".", "", "a/b", "/etc", "-x", "_logits", ".hidden", "\x1b[31mred", "[bold red]x[/]", "a" * 10_000,
     "run1\n", "ünï", "a b", "run1\x00"],
    ids=lambda name: ascii(name)[:20],
)  # fmt: skip
def test_a_run_name_that_could_do_harm_is_refused(command: Command, name: str, tmp_path: Path) -> None:
    for arguments in (
        ["predict", "--run", name, "x.txt"],
        ["teacher", "--recipe", "quickstart", "--name", name],
        ["teacher", "--resume", name],
    ):
        done = command(*arguments)
        assert done.code == 2
        assert "must be 1 to 64 letters, digits" in done.err
        assert len(done.err.splitlines()) == 1
        assert len(done.err) < 300
        assert all(c.isprintable() for c in done.err.strip())
    assert list(tmp_path.iterdir()) == []


# Recipes


def test_recipes_are_listed_with_their_descriptions(command: Command) -> None:
    done = command("recipes")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == sorted(catalog.recipes())


def test_a_recipe_is_shown_as_it_was_written(command: Command) -> None:
    done = command("recipes", "show", "quickstart")
    assert done.out == catalog.recipes()["quickstart"].read_text(encoding="utf-8")


def test_a_copied_recipe_is_the_same_and_overwrites_nothing(command: Command) -> None:
    assert command("recipes", "copy", "quickstart").code == 0
    own = Path("quickstart.yaml")
    assert own.read_text() == catalog.recipes()["quickstart"].read_text()
    assert command("validate", "quickstart.yaml").code == 0
    own.write_text("mine")
    assert "quickstart.yaml exists already" in command.refuse(2, "recipes", "copy", "quickstart")
    assert own.read_text() == "mine"
    assert "there is no folder no" in command.refuse(2, "recipes", "copy", "quickstart", "no/x.yaml")
    assert "did you mean 'quickstart'" in command.refuse(3, "recipes", "copy", "quickstrt")


# Data and checkpoints, from the outside


def test_wrong_data_is_one_line_and_exit_code_4(command: Command, recipe_file: Write) -> None:
    path = str(recipe_file({"data.text": "txt"}))
    assert command.refuse(4, "teacher", "--recipe", path) == "train: no column 'txt'; did you mean 'text'?"
    path = str(recipe_file({"data.source": str(write_csv(Path("odd.csv"), [*documents(160), ("more", "")]))}))
    assert command.refuse(4, "teacher", "--recipe", path).startswith("train, row 161: the label is missing")
    assert not Path("runs").exists() or not list(Path("runs").glob("run*")), "a refused run leaves no folder"


@pytest.mark.parametrize("section", ["teacher", "student"])
def test_a_checkpoint_out_of_reach_is_one_line_and_exit_code_4(
    command: Command, recipe_file: Write, section: str
) -> None:
    architecture, hub_id = {
        "teacher": ("bigbird", "google/bigbird-roberta-base"),
        "student": ("bert_miniature", "google/bert_uncased_L-2_H-128_A-2"),
    }[section]
    path = str(recipe_file({f"{section}.architecture": architecture, f"{section}.checkpoint": hub_id}))
    arguments = ["teacher", "--recipe", path]
    if section == "student":
        make_run("run1")
        arguments = ["student", "--recipe", path, "--teacher", "run1"]
    line = command.refuse(4, *arguments)
    assert line.startswith(f"{section}.checkpoint: checkpoint {hub_id} is not on this machine")
    assert f"hf download {hub_id} --local-dir DIR" in line
    assert f"--set {section}.checkpoint=DIR" in line


def test_a_shipped_recipe_without_hub_says_what_is_missing_and_how_to_point_to_a_copy(
    command: Command, tokenizer_folder: Path
) -> None:
    line = command.refuse(4, "teacher", "--recipe", "cola")
    assert line.startswith(
        "teacher.checkpoint: checkpoint google-bert/bert-base-uncased is not on this machine"
    )
    assert line.endswith("point the recipe to the copy (--set teacher.checkpoint=DIR)")
    settings = [*("--set", "teacher.checkpoint=null"), *("--set", f"teacher.tokenizer={tokenizer_folder}")]
    line = command.refuse(4, "teacher", "--recipe", "cola", *settings)
    assert line.startswith("data.source: nyu-mll/glue is no file here, and the hub cannot be reached")
    assert line.endswith(
        "(--set 'data.source={train: DIR/train.parquet, validation: DIR/validation.parquet}')"
    )
    line = command.refuse(4, "teacher", "--recipe", "toxic", *settings)
    assert line.startswith("data.source: there is no train.csv")
    assert line.endswith("--set data.source=PATH says where it is")


def test_a_data_set_out_of_reach_is_one_line_and_exit_code_4(command: Command, recipe_file: Write) -> None:
    line = command.refuse(4, "teacher", "--recipe", str(recipe_file({"data.source": "stanfordnlp/imdb"})))
    assert "hf download --repo-type dataset stanfordnlp/imdb" in line
