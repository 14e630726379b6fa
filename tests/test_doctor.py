from __future__ import annotations

import os
import shutil
import socket
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from distill import doctor, hub
from distill.doctor import Check


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # No test asks the network: the hub is a closed port of this machine.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed_port())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "runs"


def closed_port() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


def found(name: str) -> Check:
    return next(check for check in doctor.checks() if check.name == name)


def test_every_check_that_fails_says_how_to_mend_it_and_no_other_does() -> None:
    for check in doctor.checks():
        assert check.found, check
        assert bool(check.fix) != check.ok, check


def test_the_installed_packages_are_held_against_pyproject() -> None:
    assert {check.name: check.found for check in doctor.checks() if check.name in doctor.PACKAGES} == {
        name: metadata.version(name) for name in doctor.PACKAGES
    }


def version(monkeypatch: pytest.MonkeyPatch, package: str, answer: Callable[[], str]) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: answer() if name == package else real(name))


def test_a_package_that_is_too_old_is_named_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version(monkeypatch, "mlflow", lambda: "3.9.0")
    check = found("mlflow")
    assert (check.ok, check.found) == (False, "3.9.0")
    assert check.fix.startswith('pip install "mlflow')
    assert ">=3.11.1" in check.fix


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise metadata.PackageNotFoundError("accelerate")

    version(monkeypatch, "accelerate", missing)
    check = found("accelerate")
    assert (check.ok, check.found) == (False, "not installed")


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100 << 30, 99 << 30, 1 << 30))
    check = found("disk")
    assert not check.ok
    assert "1.0 GiB" in check.found
    assert "DISTILL_RUNS" in check.fix


def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "total available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(8 << 30, 1 << 30))
    check = found("memory")
    assert (check.ok, check.found) == (False, "1.0 of 8.0 GiB free")


def test_a_gpu_that_torch_does_not_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    check = found("devices")
    assert not check.ok
    assert "CUDA build" in check.fix


def test_a_runs_folder_that_cannot_be_written_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**where: Any) -> None:
        raise PermissionError(13, "Permission denied")  # root writes everywhere, so a chmod would not do

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    check = found("runs folder")
    assert (check.ok, check.found) == (False, f"{runs}: Permission denied")


def test_looking_makes_neither_the_runs_folder_nor_a_database(runs: Path) -> None:
    assert found("tracker") == Check("tracker", True, f"{runs}/mlflow.db (will be made)")
    assert found("runs folder").ok
    assert not runs.exists()


def test_a_damaged_database_is_told(runs: Path) -> None:
    runs.mkdir()
    (runs / "mlflow.db").write_text("not a database" * 100)
    check = found("tracker")
    assert not check.ok
    assert "not a database" in check.found
    assert "distill sync" in check.fix


def test_a_database_that_cannot_be_written_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.mkdir()
    (runs / "mlflow.db").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check = found("tracker")
    assert not check.ok
    assert "cannot be written" in check.found


def test_a_dead_server_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", closed_port().replace("//", "//me:secret@"))
    check = found("tracker")
    assert not check.ok
    assert "secret" not in check.found
    assert "training goes on" in check.fix


@pytest.fixture
def server() -> Iterator[tuple[str, list[int]]]:
    """A server that answers every request with the code in the list."""
    code = [200]

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(code[0])
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", code
        served.shutdown()


@pytest.mark.parametrize(("code", "ok"), [(200, True), (401, True), (404, True), (503, False), (407, False)])
def test_a_server_is_there_when_it_answers_itself_and_not_when_a_gateway_does(
    server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch, code: int, ok: bool
) -> None:
    address, answers = server
    answers[0] = code
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    assert (found("tracker").ok, found("hub").ok) == (ok, ok)


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither is an earlier answer remembered, nor this one; and the clients' switches are put back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


@pytest.mark.parametrize("code", [200, 401, 404, 503])
@pytest.mark.usefixtures("asked_anew")
def test_a_hub_that_answers_with_an_error_is_reachable(
    server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    address, answers = server
    answers[0] = code
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert hub.reachable()
    assert os.environ["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize("address", [closed_port(), "no address"], ids=["closed port", "no URL"])
@pytest.mark.usefixtures("asked_anew")
def test_a_hub_that_does_not_answer_switches_its_client_off(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert not hub.reachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_that_is_out_of_reach_is_told_with_the_ways_around_it() -> None:
    check = found("hub")
    assert not check.ok
    assert "package://" in check.fix


def test_a_hub_that_was_switched_off_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert found("hub") == Check("hub", True, "not asked: HF_HUB_OFFLINE is set")
