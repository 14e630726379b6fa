"""Run folders: names, the journal, who may write, and how the work ended."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill import runs as folders
from distill.errors import Interrupted, UsageError
from distill.runs import Role, Run, RunFolder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))


def new(name: str, role: Role = "teacher", created: float = 0.0) -> RunFolder:
    run = Run(name, role, name, "recipe", "tests", "bigbird", seed=0, created=created)
    return folders.create(run, "description: x\n")


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "a/b", "/etc", ".hidden", "-x", "_logits", "a b", "a\n", "é", "x" * 65, "\x1b[2J"],
)
def test_a_name_that_could_leave_the_folder_or_disturb_a_terminal_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="run name ") as caught:
        folders.check_name(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["run1", "7", "run2-control-seed1", "a.b_c-D", "x" * 64])
def test_usual_names_are_taken(name: str) -> None:
    assert folders.check_name(name) == name


def test_names_are_counted_on_and_never_given_twice() -> None:
    assert [folders.next_name(), folders.next_name()] == ["run1", "run2"]
    new("run7")
    new("run9-control")
    assert folders.next_name() == "run10"


def test_processes_that_ask_at_once_get_names_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: folders.next_name(), range(40)))
    assert sorted(names) == sorted(f"run{n}" for n in range(1, 41))


def test_a_name_is_taken_by_the_first() -> None:
    new("mine")
    with pytest.raises(UsageError, match="run mine exists already"):
        new("mine")


def test_a_run_is_found_by_name_and_a_near_one_is_told() -> None:
    new("teacher-long")
    assert folders.find("teacher-long").read().role == "teacher"
    with pytest.raises(UsageError, match="did you mean 'teacher-long'"):
        folders.find("teacher-lang")


def test_runs_are_listed_oldest_first_and_caches_are_no_runs() -> None:
    new("b", created=2.0)
    new("a", created=3.0)
    new("c", created=1.0)
    (folders.runs_folder() / "_logits").mkdir()
    assert [run.name for run in folders.every()] == ["c", "b", "a"]


def test_the_journal_keeps_every_line_in_order() -> None:
    folder = new("x")
    folder.log(1, {"train/loss": 0.5})
    folder.log(2, {"train/loss": 0.25}, "finished")
    assert [(e["step"], e["event"], e["metrics"]) for e in folder.entries()] == [
        (1, "metrics", {"train/loss": 0.5}),
        (2, "finished", {"train/loss": 0.25}),
    ]


@pytest.mark.parametrize("torn", ['{"time": 1.0, "st', "\x00\x00\x00", '{"time": 1.0}}'])
def test_a_line_that_a_crash_cut_short_takes_no_other_with_it(torn: str) -> None:
    folder = new("x")
    folder.log(1, {"a": 1.0})
    with folder.journal.open("ab") as file:
        file.write(torn.encode())
    assert [e["step"] for e in folder.entries()] == [1]
    folder.log(2, {"a": 2.0})
    assert [e["step"] for e in folder.entries()] == [1, 2]


def test_a_second_worker_in_a_run_is_turned_away_and_changes_nothing() -> None:
    folder = new("x")
    outcome: list[str] = []

    def intrude() -> None:
        try:
            with RunFolder(folder.path).working():
                outcome.append("entered")
        except UsageError as error:
            outcome.append(str(error))

    with folder.working():
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        assert folder.read().status == "running"
    assert outcome == ["x: another process is working in this run; wait, or take another --name"]
    with folder.locked():  # free again
        assert folder.read().status == "finished"


def test_a_job_of_another_process_is_turned_away_until_that_one_ends_however_it_does() -> None:
    folder = new("x")
    hold = f"""
import pathlib, time
from distill.runs import RunFolder
with RunFolder(pathlib.Path({str(folder.path)!r})).working():
    print("held", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="x: another process is working in this run"), folder.working():
            pass
        assert folder.read().status == "running"
        other.kill()
    with folder.working():
        pass
    assert folder.read().status == "finished"


def test_a_clock_that_is_set_back_turns_no_order_and_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 900.0, 950.0, 1001.0])
    folder = new("x", created=1000.0)
    monkeypatch.setattr("time.time", lambda: next(clock))
    for step in range(4):
        RunFolder(folder.path).log(step, {"a": 1.0})
    assert [entry["time"] for entry in folder.entries()] == [1000.0, 1000.0, 1000.0, 1001.0]
    monkeypatch.setattr("time.time", lambda: 10.0)
    with folder.working():
        pass
    assert folder.read().finished == 1000.0
    new("later", created=folders.now())
    assert [run.name for run in folders.every()] == ["x", "later"]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), "interrupted", "stopped from outside"),
        (Interrupted("x"), "interrupted", "stopped from outside"),
        (ValueError("broken"), "failed", "ValueError: broken"),
        (ValueError("a\udcffb"), "failed", r"ValueError: a\udcffb"),
    ],
)
def test_how_the_work_ended_is_written_down(error: BaseException, status: str, said: str) -> None:
    folder = new("x")
    with pytest.raises(type(error)), folder.working():
        raise error
    assert (folder.read().status, folder.read().error) == (status, said)
    with folder.working():
        assert folder.read().error is None
    assert folder.read().status == "finished"
    assert folder.read().finished is not None


def test_a_run_says_what_it_is_after_a_round_trip() -> None:
    folder = new("x", "distilled")
    folder.update(teachers=["t"], facts={"data": "abc"})
    assert json.loads((folder.path / "run.json").read_text())["teachers"] == ["t"]
    assert RunFolder(folder.path).read().facts == {"data": "abc"}


def test_an_unfinished_teacher_is_refused_before_anything_is_read() -> None:
    folder = new("x")
    folder.update(status="failed")
    with pytest.raises(UsageError, match=r"x has not finished \(failed\); .*distill teacher --resume x"):
        folders.refuse_unfinished("x")
    folder.update(status="finished")
    folders.refuse_unfinished("x")
    folders.refuse_unfinished("org/model")
