"""``--processes``: what is started, what is told, which exit code it ends in, and how it is stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Write, distill

from distill import launching
from distill.errors import UsageError
from distill.runs import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Take back what launching changes in its process, which otherwise ends with it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.disable(logging.NOTSET)


def run(count: int, script: str) -> int:
    """Run a few lines of Python, which know their ``rank``, in several processes."""
    head = "import json, os, signal, sys, time; rank = int(os.environ['RANK'])\n"
    return launching.run(count, ["-c", head + script])


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0, 0], 0),
        ([3, 3, 3], 3),
        ([75, 75, 75], 75),
        ([0, 4, 0], 4),
    ],
)
def test_the_exit_code_is_the_processes_own(codes: list[int], expected: int) -> None:
    assert run(3, f"sys.exit({codes}[rank])") == expected


@pytest.mark.parametrize("codes", [(75, 4), (4, 75)])
def test_the_exit_code_is_that_of_the_failure_and_not_of_those_that_it_takes_along(
    codes: tuple[int, int], tmp_path: Path
) -> None:
    script = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit({codes[1]}))
if rank == 1:
    open('{tmp_path}/ready', 'w').close()
    time.sleep(60)
while not os.path.exists('{tmp_path}/ready'):
    time.sleep(0.01)
sys.exit({codes[0]})
"""
    assert run(2, script) == 4


def test_a_job_that_is_killed_can_be_resumed_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(2, "os.kill(os.getpid(), signal.SIGKILL)") == 75
    assert capsys.readouterr().err.count("\n") == 1


def test_each_process_knows_its_rank_and_shares_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    assert run(3, f"json.dump(dict(os.environ), open(f'{tmp_path}/{{rank}}', 'w'))") == 0
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [one["LOCAL_RANK"] for one in found] == ["0", "1", "2"]
    assert {one["WORLD_SIZE"] for one in found} == {"3"}
    assert {one["OMP_NUM_THREADS"] for one in found} == {"2"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [75, 1])
def test_a_wish_to_stop_reaches_every_process_and_is_waited_for(
    number: int, code: int, tmp_path: Path
) -> None:
    script = f"""
def save(*_):
    time.sleep(1)
    open(f'{tmp_path}/saved{{rank}}', 'w').close()
    sys.exit({code})
signal.signal(signal.SIGTERM, save)
open(f'{tmp_path}/ready{{rank}}', 'w').close()
time.sleep(60)
"""

    def stop() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run(2, script) == code
    thread.join()
    assert len(list(tmp_path.glob("saved*"))) == 2


def test_a_process_that_hears_nothing_is_killed_the_third_time(tmp_path: Path) -> None:
    script = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f'{tmp_path}/ready{{rank}}', 'w').close()
time.sleep(60)
"""

    def stop() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.05)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run(2, script) == 75
    thread.join()


def test_inside_a_launcher_nothing_is_started_and_the_number_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    launching.launch(2)
    launching.launch(None)
    with pytest.raises(UsageError, match="--processes 3: this job was started with 2, by a launcher"):
        launching.launch(3)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP is for distill teacher"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "take FSDP2"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "would divide the gradients: leave it at 1"),
    ],
)
def test_what_a_launcher_is_configured_to_do_to_weights_or_gradients_is_refused(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=said):
        launching.launch(None)


def test_a_mistake_is_told_once_and_the_exit_code_is_kept(runs: Path, recipe_file: Write) -> None:
    recipe = str(recipe_file({"data.source": "nowhere.csv"}))
    done = distill("teacher", "--recipe", recipe, "--processes", "2")
    assert done.returncode == 4
    assert done.stderr.startswith("distill: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_accelerate_that_starts_one_process_for_two_is_noticed() -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, "-m", "distill", "demo"], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert "distill: accelerate launch was asked for 2 processes and starts one" in done.stderr
    assert "--processes 2" in done.stderr


def test_any_processes_is_for_a_run_that_is_gone_on_with() -> None:
    done = distill("teacher", "--recipe", "quickstart", "--any-processes")
    assert done.returncode == 2
    assert "--resume" in done.stderr


def test_a_job_that_is_stopped_or_loses_a_process_says_so_once_and_goes_on(
    runs: Path, recipe_file: Write
) -> None:
    recipe = str(recipe_file({"teacher.train.epochs": 60.0, "teacher.train.evaluate_every": 5}))
    folder = RunFolder(runs / "t")

    def start(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "distill", "teacher", *more, "--processes", "2"]
        before = len(list(folder.entries()))
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(list(folder.entries())) == before and job.poll() is None:
            time.sleep(0.05)
        return job

    job = start("--recipe", recipe, "--name", "t")
    job.send_signal(signal.SIGTERM)
    told = job.communicate(timeout=120)[1]
    assert job.returncode == 75, told
    assert told.count("distill: ") == told.count("distill: t: stopped at step") == 1
    assert folder.read().status == "interrupted"
    job = start("--resume", "t")
    ranks = {process.environ()["RANK"]: process for process in psutil.Process(job.pid).children()}
    ranks["1"].kill()
    told = job.communicate(timeout=120)[1]
    assert job.returncode == 75, told
    assert told.count("distill: ") == told.count("distill: another process of this job died") == 1
    assert folder.read().status == "interrupted"
    assert "Traceback" not in told


def test_the_processes_of_a_machine_find_each_other_by_way_of_that_machine_alone() -> None:
    store = launching.meeting_place()
    heard = psutil.Process().net_connections("tcp")
    assert {one.laddr.ip for one in heard if one.laddr.port == store.port} == {"127.0.0.1"}
