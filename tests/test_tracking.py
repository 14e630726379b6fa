from __future__ import annotations

import http.client
import json
import logging
import math
import shutil
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill import tracking, ui
from distill.errors import HubError, UsageError
from distill.files import read_json, write_json
from distill.runs import Run, RunFolder, create

RECIPE = """\
description: a test
data:
  source: package://reviews/train.csv
  where:
    "reader's (own)": [1, 2]
  label: ''
student:
  losses:
  - kind: soft
    temperature: 2.0
  max_steps: null
"""


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: Path) -> Iterator[Path]:
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(mlflow_store, folder / "mlflow.db")
    monkeypatch.setenv("DISTILL_RUNS", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in tracking._ENVIRONMENT.items():  # so that what sync sets is taken back
        monkeypatch.setenv(name, value)
    tracking._silent_until.clear()
    tracking._noticed.clear()
    yield folder
    tracking._clients.clear()


def new(name: str = "run1", **fields: Any) -> RunFolder:
    known: dict[str, Any] = {
        "role": "distilled",
        "group": "g1",
        "recipe": "imdb",
        "experiment": "reviews",
        "model": "bert_miniature",
        "seed": 3,
        "created": 1_700_000_000.25,
    }
    folder = create(Run(name=name, **(known | fields)), RECIPE)
    folder.log(1, {"train/loss": 0.9})
    folder.log(2, {"train/loss": 0.7, "eval/accuracy": 0.5})
    return folder


def finish(folder: RunFolder) -> None:
    folder.model.mkdir(exist_ok=True)
    (folder.model / "config.json").write_text('{"layers": 2}')
    (folder.model / "onnx").mkdir(exist_ok=True)
    (folder.model / "onnx" / "model.onnx").write_bytes(b"weights")
    folder.write_metrics(
        {
            "task": {"kind": "single_label", "labels": ["bad", "good"], "metric": "accuracy"},
            "test": {"accuracy": 0.8, "by_length": [{"words": 100, "accuracy": 0.9}], "best": True},
            "validation": {"accuracy": 0.9},
            "train": {"seconds": 1.0, "steps": 2},
            "model": {"parameters": 1000},
            "bench": {"ms": 2.5, "threads": {"1": 3}},
        }
    )
    folder.update(status="finished", finished=1_700_000_100.0)


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking.uri())


def note(folder: RunFolder) -> dict[str, Any]:
    result: dict[str, Any] = read_json(folder.path / "mlflow.json")
    return result


def there(folder: RunFolder) -> Any:
    """The MLflow run of a run folder."""
    return client().get_run(note(folder)["run_id"])


def history(folder: RunFolder, name: str) -> list[tuple[int, float]]:
    found = client().get_metric_history(note(folder)["run_id"], name)
    return [(metric.step, metric.value) for metric in found]


def number_of_runs() -> int:
    ids = [experiment.experiment_id for experiment in client().search_experiments()]
    return len(client().search_runs(ids))


def files(folder: RunFolder, path: str = "") -> set[str]:
    return {item.path for item in client().list_artifacts(note(folder)["run_id"], path)}


def dead_server() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


def test_a_running_run_arrives_with_its_figures_tags_and_parameters() -> None:
    folder = new(facts={"data": "d" * 64})
    assert tracking.sync(folder)
    run = there(folder)
    assert (run.info.status, run.info.run_name, run.info.start_time) == ("RUNNING", "run1", 1_700_000_000_250)
    assert client().get_experiment(run.info.experiment_id).name == "reviews"
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7)]
    assert history(folder, "eval/accuracy") == [(2, 0.5)]
    assert (
        run.data.tags.items()
        >= {
            "distill.role": "distilled",
            "distill.objective": "distilled",
            "distill.run": "run1",
            "distill.student": "bert_miniature",
            "distill.recipe": "imdb",
            "distill.group": "g1",
            "distill.seed": "3",
            "mlflow.source.name": "distill",
        }.items()
    )
    assert "mlflow.parentRunId" not in run.data.tags, "nested runs vanish from MLflow's charts"
    assert run.data.params == {
        "description": "a test",
        "data.source": "package://reviews/train.csv",
        "data.where.reader_s _own_": "[1, 2]",
        "data.label": "",
        "student.losses.0.kind": "soft",
        "student.losses.0.temperature": "2.0",
        "student.max_steps": "null",
    }
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("train.csv", "d" * 36)
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "train")]


def test_figures_keep_the_journals_own_time() -> None:
    folder = new()
    times = [int(entry["time"] * 1000) for entry in folder.entries()]
    assert tracking.sync(folder)
    metrics = client().get_metric_history(note(folder)["run_id"], "train/loss")
    assert [metric.timestamp for metric in metrics] == times


def test_a_finished_run_brings_its_final_figures_and_files(runs: Path) -> None:
    cache = runs / "_logits" / "abc123"
    cache.mkdir(parents=True)
    (cache / "manifest.json").write_text("{}")
    folder = new(facts={"logits": [str(cache), str(runs / "_logits" / "gone")]})
    finish(folder)
    assert tracking.sync(folder)
    run = there(folder)
    assert (run.info.status, run.info.end_time) == ("FINISHED", 1_700_000_100_000)
    final = {
        name: value for name, value in run.data.metrics.items() if not name.startswith(("train/", "eval/"))
    }
    assert final == {"test/accuracy": 0.8, "model/parameters": 1000, "bench/ms": 2.5}
    assert files(folder) == {"recipe.yaml", "metrics.json", "model", "logits"}
    assert files(folder, "model") == {"model/config.json", "model/onnx"}
    assert files(folder, "logits/abc123") == {"logits/abc123/manifest.json"}


@pytest.mark.parametrize(("status", "expected"), [("failed", "FAILED"), ("interrupted", "KILLED")])
def test_a_run_that_ended_badly_is_told_as_such(status: str, expected: str) -> None:
    folder = new()
    folder.update(status=status)
    assert tracking.sync(folder)
    assert there(folder).info.status == expected
    assert files(folder) == set()


def test_syncing_twice_sends_nothing_twice() -> None:
    folder = new()
    for _ in range(2):
        assert tracking.sync(folder)
    folder.log(3, {"train/loss": 0.6})
    finish(folder)
    for _ in range(2):
        assert tracking.sync(folder)
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7), (3, 0.6)]
    assert history(folder, "test/accuracy") == [(3, 0.8)]
    assert number_of_runs() == 1


def test_with_nothing_new_mlflow_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new()
    assert tracking.sync(folder)
    monkeypatch.setattr(tracking, "client_of", lambda where: pytest.fail("asked"))
    assert tracking.sync(folder)


def test_a_journal_longer_than_one_batch_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_ENTRIES_AT_ONCE", 3)
    folder = new()
    for step in range(3, 9):
        folder.log(step, {"train/loss": step / 10})
    assert tracking.sync(folder)
    assert [step for step, _ in history(folder, "train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_crash_before_anything_was_noted_makes_no_second_run_and_no_second_figure() -> None:
    folder = new()
    finish(folder)
    assert tracking.sync(folder)
    first = note(folder)["run_id"]
    (folder.path / "mlflow.json").unlink()
    assert tracking.sync(folder)
    assert note(folder)["run_id"] == first
    assert number_of_runs() == 1
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7)]
    assert history(folder, "test/accuracy") == [(2, 0.8)]


def test_a_run_of_the_same_name_but_another_start_is_another_run() -> None:
    folder = new()
    assert tracking.sync(folder)
    first = note(folder)["run_id"]
    shutil.rmtree(folder.path)
    again = new(created=1_700_000_500.0)
    assert tracking.sync(again)
    assert note(again)["run_id"] != first


def test_a_run_interrupted_resumed_and_finished_is_one_mlflow_run() -> None:
    folder = new()
    seen = []
    for status in ("running", "interrupted", "running"):
        folder.update(status=status)
        folder.log(3, {"train/loss": 0.6})
        assert tracking.sync(folder)
        seen.append((note(folder)["run_id"], there(folder).info.status))
    finish(folder)
    assert tracking.sync(folder)
    seen.append((note(folder)["run_id"], there(folder).info.status))
    assert [status for _, status in seen] == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert len({run_id for run_id, _ in seen}) == number_of_runs() == 1


def test_a_finished_run_that_went_on_sends_its_new_model() -> None:
    folder = new()
    finish(folder)
    assert tracking.sync(folder)
    folder.update(status="running")
    assert tracking.sync(folder)
    finish(folder)
    (folder.model / "config.json").write_text('{"layers": 4}')
    assert tracking.sync(folder)
    got = client().download_artifacts(note(folder)["run_id"], "model/config.json")
    assert json.loads(Path(got).read_text()) == {"layers": 4}


def test_a_final_figure_that_the_journal_holds_too_arrives_once() -> None:
    folder = new()
    folder.log(2, {"test/accuracy": 0.8}, "finished")
    finish(folder)
    assert tracking.sync(folder)
    assert history(folder, "test/accuracy") == [(2, 0.8)]
    assert history(folder, "bench/ms") == [(2, 2.5)]


def test_a_student_is_tied_to_its_teachers() -> None:
    teacher = new("teacher", role="teacher")
    student = new("student", teachers=["teacher", "a" * 32, "somebody/on-the-hub"])
    assert tracking.sync(teacher)
    assert tracking.sync(student)
    tags = there(student).data.tags
    assert tags["distill.teacher"] == f"teacher, {'a' * 32}, somebody/on-the-hub"
    assert tags["distill.teacher_run_id"] == f"{note(teacher)['run_id']}, {'a' * 32}"


def test_a_teacher_that_arrives_later_is_tied_when_the_student_ends() -> None:
    teacher, student = new("teacher", role="teacher"), new("student", teachers=["teacher"])
    assert tracking.sync(student)
    assert "distill.teacher_run_id" not in there(student).data.tags
    assert tracking.sync(teacher)
    finish(student)
    assert tracking.sync(student)
    assert there(student).data.tags["distill.teacher_run_id"] == note(teacher)["run_id"]


def test_names_with_quotes_and_signs_arrive() -> None:
    folder = new(experiment='l\'essai "1"', recipe="it's", model="d'essai")
    folder.log(3, {"eval/precision@5": 0.25, "eval/f1/it's": 0.5, "eval/f1/a b-c.d:e": 0.75})
    assert tracking.sync(folder)
    run = there(folder)
    assert run.data.metrics["eval/precision_at_5"] == 0.25
    assert run.data.metrics["eval/f1/it_s"] == 0.5
    assert run.data.metrics["eval/f1/a b-c.d:e"] == 0.75
    assert run.data.tags["distill.recipe"] == "it's"
    assert tracking.sync(new("run2", experiment='l\'essai "1"'))


def test_a_value_longer_than_mlflow_takes_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # it would cut too, with a warning for each
    folder = new()
    folder.recipe.write_text(RECIPE.replace("a test", "x" * 9000))
    assert tracking.sync(folder)
    assert there(folder).data.params["description"] == "x" * 6000


def test_a_loss_that_is_not_a_number_arrives() -> None:
    folder = new()
    folder.log(3, {"train/loss": math.nan})
    assert tracking.sync(folder)
    assert math.isnan(history(folder, "train/loss")[-1][1])


def test_a_dead_server_costs_nothing_but_a_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = new()
    finish(folder)
    journal = folder.journal.read_bytes()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server())
    with caplog.at_level(logging.WARNING, logger="distill"):
        assert [tracking.sync(folder), tracking.sync(folder)] == [False, False]
        tracking._silent_until.clear()  # a minute later
        assert not tracking.sync(new("run2"))
    (notice,) = [record.getMessage() for record in caplog.records if record.name == "distill"]
    assert "figures stay in the journal" in notice
    assert folder.journal.read_bytes() == journal
    assert not (folder.path / "mlflow.json").exists()

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.sync(folder)
    assert there(folder).info.status == "FINISHED"
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7)]
    assert "model" in files(folder)


def test_after_a_failure_the_server_is_left_alone_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, now, asked = new(), [1000.0], []

    def fail(where: str) -> None:
        asked.append(now[0])
        raise ConnectionError("down")

    monkeypatch.setattr(tracking, "client_of", fail)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for now[0] in (1000.0, 1059.0, 1061.0):
        assert not tracking.sync(folder)
    assert asked == [1000.0, 1061.0]


def test_a_failure_in_the_middle_is_made_good_by_the_next_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new()
    finish(folder)
    real = tracking.client_of(tracking.uri())

    class NoDisk:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def log_artifacts(self, *args: object) -> None:
            raise OSError("no space left there")

    with monkeypatch.context() as broken:
        broken.setattr(tracking, "client_of", lambda where: NoDisk())
        assert not tracking.sync(folder)
    assert there(folder).info.status == "RUNNING", "not finished before its model is there"
    tracking._silent_until.clear()
    assert tracking.sync(folder)
    assert there(folder).info.status == "FINISHED"
    assert files(folder) == {"recipe.yaml", "metrics.json", "model"}
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7)]


def test_another_database_at_the_same_place_gets_the_whole_journal() -> None:
    folder = new()
    state = {"uri": tracking.uri(), "run_id": "0" * 32, "status": "RUNNING", "entries": 2}
    write_json(folder.path / "mlflow.json", state)
    folder.log(3, {"train/loss": 0.6})
    assert tracking.sync(folder)
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7), (3, 0.6)]


def test_a_deleted_database_is_made_anew_from_the_journal(runs: Path) -> None:
    folder = new()
    state = {"uri": tracking.uri(), "run_id": "0" * 32, "status": "RUNNING", "entries": 2}
    write_json(folder.path / "mlflow.json", state)
    (runs / "mlflow.db").unlink()
    assert tracking.sync(folder)
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7)]
    assert client().get_experiment_by_name("reviews").artifact_location == (runs / "mlartifacts").as_uri()


def test_a_run_thrown_away_in_mlflow_stays_thrown_away() -> None:
    folder = new()
    assert tracking.sync(folder)
    client().delete_run(note(folder)["run_id"])
    folder.log(3, {"train/loss": 0.6})
    assert tracking.sync(folder)
    assert number_of_runs() == 0


def test_a_damaged_database_fails_before_mlflow_tries_for_minutes(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.MlflowClient", lambda **where: pytest.fail("tried"))
    (runs / "mlflow.db").write_text("not a database" * 100)
    assert not tracking.sync(new())


def test_a_password_is_not_written_into_the_run_folder() -> None:
    assert tracking.public("postgresql://me:secret@db.example/mlflow") == "postgresql://db.example/mlflow"
    assert tracking.public("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert "secret" not in str(tracking._sent(new(), "https://me:secret@mlflow.example"))


def test_a_run_is_found_by_its_mlflow_id() -> None:
    new("other")
    folder = new()
    assert tracking.sync(folder)
    found = tracking.find_run(note(folder)["run_id"])
    assert found is not None
    assert found.name == "run1"
    assert tracking.find_run("0" * 32) is None


def test_a_model_is_fetched_by_its_mlflow_id(tmp_path: Path) -> None:
    folder = new()
    finish(folder)
    assert tracking.sync(folder)
    fetched = tracking.download(note(folder)["run_id"], tmp_path / "elsewhere")
    assert fetched is not None
    assert (fetched / "config.json").read_text() == '{"layers": 2}'
    assert (fetched / "onnx" / "model.onnx").read_bytes() == b"weights"
    assert list((tmp_path / "elsewhere").iterdir()) == [fetched], "nothing half-made stays behind"


def test_two_fetched_models_do_not_overwrite_each_other(tmp_path: Path) -> None:
    fetched = []
    for name in ("run1", "run2"):
        folder = new(name)
        finish(folder)
        (folder.model / "config.json").write_text(name)
        assert tracking.sync(folder)
        fetched.append(tracking.download(note(folder)["run_id"], tmp_path / "elsewhere"))
    assert [(path / "config.json").read_text() for path in fetched if path] == ["run1", "run2"]


def test_what_cannot_be_fetched_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new()
    assert tracking.sync(folder)
    assert tracking.download("0" * 32, tmp_path / "x") is None
    with pytest.raises(HubError, match="has no model"):
        tracking.download(note(folder)["run_id"], tmp_path / "x")
    for wrong in ("run1", "../" + "0" * 29, "0" * 33, "0" * 32 + "\n"):
        with pytest.raises(UsageError, match="32 hexadecimal digits"):
            tracking.download(wrong, tmp_path / "x")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server())
    with pytest.raises(HubError, match="cannot be fetched"):
        tracking.download("0" * 32, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_with_a_server_of_ones_own_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert ui.start(5000) == (None, 5000)


def test_the_link_leads_to_the_experiments_charts() -> None:
    folder = new()
    assert tracking.sync(folder)
    number = there(folder).info.experiment_id
    assert ui.deep_link(5001, "reviews") == (
        f"http://127.0.0.1:5001/#/experiments/{number}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    )
    assert ui.deep_link(5001, "not yet") == "http://127.0.0.1:5001/#/experiments"


def test_the_pages_are_served_to_this_machine_on_the_next_free_port() -> None:
    folder = new()
    finish(folder)
    assert tracking.sync(folder)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        taken = held.getsockname()[1]
        server, port = ui.start(taken)
    assert server is not None
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    try:
        assert taken < port <= taken + 20
        open_ = {c.laddr for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        assert open_ == {("127.0.0.1", port)}
    finally:
        server.terminate()
        server.wait(20)
    assert not ui._is_up(port)
    assert not any(process.is_running() for process in family)


def test_a_page_from_elsewhere_reads_and_changes_nothing_on_the_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither by a name of its own that leads to this machine (DNS rebinding), nor across origins."""
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "*")
    monkeypatch.setenv("MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", "true")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        free = held.getsockname()[1]
    server, port = ui.start(free)
    assert server is not None

    def ask(host: str, origin: str | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        headers = {"Host": host, "Content-Type": "application/json"} | ({"Origin": origin} if origin else {})
        connection.request("POST", "/api/2.0/mlflow/experiments/search", '{"max_results": 1}', headers)
        try:
            return connection.getresponse().status
        finally:
            connection.close()

    try:
        own = f"127.0.0.1:{port}"
        assert [ask(own), ask(f"localhost:{port}"), ask("localhost:8888"), ask(own, f"http://{own}")] == [
            200
        ] * 4
        foreign = (
            "evil.example",
            f"evil.example:{port}",
            "10.evil.example",
            "192.168.evil.example",
            "10.0.0.1",
        )
        assert [ask(host) for host in foreign] == [403] * 5
        assert [
            ask(own, origin) for origin in ("https://evil.example", "http://localhost.evil.example", "null")
        ] == [403] * 3
    finally:
        server.terminate()
        server.wait(20)


def test_a_server_that_accepts_and_never_answers_holds_a_run_up_for_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = new()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as mute, caplog.at_level(logging.WARNING, logger="distill"):
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert not tracking.sync(folder)
    assert "figures stay in the journal" in caplog.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.sync(folder)
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7)]


def test_a_store_that_hangs_for_ever_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a database's driver may, which knows no time limit."""
    folder, other, answers = new(), new("run2"), threading.Event()
    real = tracking.client_of

    def hangs(where: str) -> Any:
        assert answers.wait(60)
        return real(where)

    monkeypatch.setattr(tracking, "client_of", hangs)
    monkeypatch.setattr(tracking, "_HOLDS_UP", 0.05)
    with caplog.at_level(logging.WARNING, logger="distill"):
        assert not tracking.sync(folder)
        assert not tracking.sync(other), "nor is it asked for another run"
    assert "no answer in 0.05 seconds" in caplog.text
    monkeypatch.undo()
    answers.set()
    monkeypatch.setenv("DISTILL_RUNS", str(folder.path.parent))
    tracking._silent_until.clear()
    for each in (folder, other):
        finish(each)
        assert tracking.sync(each), "the end waits for what was left behind"
        assert history(each, "train/loss") == [(1, 0.9), (2, 0.7)]
    assert number_of_runs() == 2


class Dies:
    """A client whose n-th writing call is the last: what was sent may have arrived (``late``), or not."""

    def __init__(self, real: Any, left: int, late: bool) -> None:
        self.real, self.left, self.late = real, left, late

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.real, name)
        if name.split("_")[0] not in ("log", "create", "update", "set"):
            return call

        def dying(*arguments: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                if self.late:
                    call(*arguments, **more)
                raise ConnectionError("gone")
            return call(*arguments, **more)

        return dying


@pytest.mark.parametrize("late", [True, False])
def test_a_sync_that_dies_at_any_call_is_made_good_with_every_figure_once(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_ENTRIES_AT_ONCE", 1)
    real = tracking.client_of(tracking.uri())
    for left in range(30):
        folder = new(f"run{left}", facts={"data": "d" * 64})
        finish(folder)
        with monkeypatch.context() as broken:
            broken.setattr(tracking, "client_of", lambda where, left=left: Dies(real, left, late))
            died = not tracking.sync(folder)
        tracking._silent_until.clear()
        assert tracking.sync(folder)
        assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7)]
        assert history(folder, "test/accuracy") == [(2, 0.8)]
        assert there(folder).info.status == "FINISHED"
        assert len(there(folder).inputs.dataset_inputs) == 1
        assert "model" in files(folder)
        assert number_of_runs() == left + 1
        if not died:
            break
    assert 5 < left < 29, "the calls of a whole sync were tried one by one"


def test_a_database_that_another_process_has_locked_is_waited_for_or_left_for_later(runs: Path) -> None:
    folder, other = new(), new("run2")
    assert tracking.sync(folder)
    folder.log(3, {"train/loss": 0.6})
    with closing(sqlite3.connect(runs / "mlflow.db", check_same_thread=False)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.5, holder.rollback)
        timer.start()
        assert tracking.sync(folder)
        timer.join()
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracking, "_HOLDS_UP", 0.3)
            assert not tracking.sync(other)
        holder.rollback()
    tracking._silent_until.clear()
    finish(other)
    assert tracking.sync(other)
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7), (3, 0.6)]
    assert history(other, "train/loss") == [(1, 0.9), (2, 0.7)]


@pytest.mark.parametrize("damage", ["{", "[]", '{"uri": 3}', '{"uri": "x", "entries": "9"}', "\x00"])
def test_a_damaged_note_of_what_was_sent_costs_no_figure_and_doubles_none(damage: str) -> None:
    folder = new()
    assert tracking.sync(folder)
    run_id = note(folder)["run_id"]
    (folder.path / "mlflow.json").write_text(damage)
    assert tracking.find_run("0" * 32) is None
    assert tracking.sync(folder)
    assert note(folder)["run_id"] == run_id
    assert history(folder, "train/loss") == [(1, 0.9), (2, 0.7)]
