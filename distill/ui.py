"""MLflow's pages on this machine: a server on loopback, and the address of the charts. Knows no run's content."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time

from distill import tracking
from distill.errors import DistillError, HubError, UsageError
from distill.runs import runs_folder

_HOSTS = ("localhost", "127.0.0.1", "localhost:*", "127.0.0.1:*")
"""By what names a browser may ask; with any port, for one may be forwarded."""


def _is_free(port: int) -> bool:
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)  # a proxy has no part in this
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def start(port: int = 5000) -> tuple[subprocess.Popen[bytes] | None, int]:
    """Serve MLflow's pages to this machine alone, and wait until they answer.

    Args:
        port: the one to take, or the next free one of the 20 after it.

    Returns:
        The server, which ``terminate()`` ends with its worker, and its port. None in the server's place
        where ``$MLFLOW_TRACKING_URI`` is one already: nothing is started then.

    Raises:
        UsageError: none of the ports is free.
        DistillError: the server did not come up; its log is named.
    """
    where = tracking.uri()
    if where.startswith(("http://", "https://")):
        return None, port
    free = next((number for number in range(port, port + 21) if _is_free(number)), None)
    if free is None:
        raise UsageError(f"ports {port} to {port + 20} are all taken; give another --port")
    tracking.client_of(where)  # the tables are made here, under the lock, and not by the server
    files, log = str(runs_folder() / "mlartifacts"), runs_folder() / "mlflow-server.log"
    # Job execution is for language-model judges: without it 2 processes and 0.5 GB do, not 10 and 2.3.
    # The store goes by the environment: its address may hold a password, and everybody sees arguments.
    # MLflow's own list of hosts has 10.* in it, and so 10.evil.example, which a page from there can have lead here.
    environment = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": where,
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(_HOSTS),
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",
    }
    command = [sys.executable, *f"-m mlflow server --host 127.0.0.1 --port {free} --workers 1".split()]
    command += ["--default-artifact-root", files, "--artifacts-destination", files]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, cwd=runs_folder(), stdout=output, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 90
    try:
        while not _is_up(free):
            if process.poll() is not None or time.monotonic() > deadline:
                raise DistillError(f"MLflow's server did not come up on port {free}; {log} says why")
            time.sleep(0.3)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return process, free


def deep_link(port: int, experiment: str) -> str:
    """Return the address of an experiment's charts (MLflow's front page is about language models).

    Raises:
        HubError: the store does not answer.
    """
    where = tracking.uri()
    remote = where.startswith(("http://", "https://"))
    base = tracking.public(where).rstrip("/") if remote else f"http://127.0.0.1:{port}"
    try:
        found = tracking.client_of(where).get_experiment_by_name(experiment)
    except Exception as error:  # of as many kinds as there are stores
        raise HubError(f"MLflow at {tracking.public(where)} does not answer: {error}") from error
    if found is None:
        return f"{base}/#/experiments"
    return (
        f"{base}/#/experiments/{found.experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    )
