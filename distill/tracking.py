"""Carries the journal to MLflow: every figure arrives once, and no failure there stops a run.

The journal in the run folder is the truth; ``mlflow.json`` beside it says how far MLflow has got, so
that what a dead server missed is sent later. Runs are flat (nested ones vanish from MLflow's charts)
and tied together by ``distill.*`` tags. Knows no training, and reads a run only by its files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from distill import records, yaml_strict
from distill.errors import DataError, DistillError, HubError, UsageError
from distill.files import replacing_folder, write_json
from distill.runs import Run, RunFolder, every, runs_folder

_STATUS = {"running": "RUNNING", "finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_REFUSED = re.compile(r"[^/\w.\- :]")
"""Characters that MLflow takes in no metric's or parameter's name."""
_ENVIRONMENT = {
    # MLflow's own 7 retries of 120 seconds hold a run up for minutes when its server is dead.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # whose documents these are is nobody else's business
}
_ENTRIES_AT_ONCE = 500
_SILENT_FOR = 60.0  # seconds without another try after a failure
_HOLDS_UP = 20.0  # seconds at most that a run waits for its tracker while it goes on
_HOLDS_UP_AT_THE_END = 300.0  # and when nobody trains: a model may take long to send

_log = logging.getLogger("distill")
_clients: dict[str, Any] = {}
_silent_until: dict[str, float] = {}
_noticed: set[str] = set()


@dataclass
class _Sent:
    """How far MLflow has got with a run, as ``mlflow.json`` holds it."""

    uri: str
    run_id: str = ""
    status: str = ""
    entries: int = 0
    dataset: bool = False
    artifacts: list[str] = field(default_factory=list)

    def save(self, folder: RunFolder) -> None:
        write_json(folder.path / "mlflow.json", asdict(self))


def uri() -> str:
    """Say where MLflow's store is: ``$MLFLOW_TRACKING_URI``, else a database in the runs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(runs_folder() / 'mlflow.db').as_posix()}"


def public(where: str) -> str:
    """Leave out user and password: run folders get shared."""
    return re.sub(r"//[^/@]*@", "//", where, count=1)


def sqlite_file(where: str) -> Path | None:
    """Return the file of an ``sqlite:///`` URI, None for any other."""
    return (
        Path(where.removeprefix("sqlite:///").partition("?")[0]) if where.startswith("sqlite:///") else None
    )


def probe(where: str) -> None:
    """Fail at once where MLflow would go on trying to open a database for more than a minute.

    Raises:
        OSError: the database is damaged, cannot be written, or its server does not answer.
    """
    file, parts = sqlite_file(where), urlsplit(where)
    if file is not None and file.exists():
        try:
            with closing(sqlite3.connect(file, timeout=3)) as connection:
                connection.execute("PRAGMA schema_version")
        except sqlite3.Error as error:
            raise OSError(f"{file}: {error}") from None
    if file is not None and not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(f"{file} cannot be written")
    usual = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}.get(parts.scheme.partition("+")[0])
    if usual and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or usual), timeout=3).close()


def client_of(where: str) -> Any:
    """Return this process's MlflowClient; the first one of a new database makes its tables."""
    if where not in _clients:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        runs_folder().mkdir(parents=True, exist_ok=True)
        # Two processes that make the tables at the same time leave a half-made database behind.
        with FileLock(runs_folder() / ".mlflow.lock", timeout=60):
            probe(where)
            from mlflow import MlflowClient

            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.WARNING)
            logging.getLogger("urllib3.connectionpool").setLevel(
                logging.ERROR
            )  # each retry is a warning there
            _clients[where] = MlflowClient(tracking_uri=where)
    return _clients[where]


def _experiment(client: Any, where: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        ours = not os.environ.get("MLFLOW_TRACKING_URI")
        place = (runs_folder() / "mlartifacts").as_uri() if ours else None
        return str(client.create_experiment(name, artifact_location=place))
    if found.lifecycle_stage == "deleted":
        raise LookupError(f"experiment {name!r} was deleted on {public(where)}; restore it there")
    return str(found.experiment_id)


def _sent(folder: RunFolder, where: str) -> _Sent:
    """Read how far MLflow has got; another store, or a database made anew, has got nowhere."""
    file, state = sqlite_file(where), _note(folder) or _Sent("")
    lost = file is not None and not file.exists()
    return _Sent(public(where)) if lost or state.uri != public(where) else state


def _note(folder: RunFolder) -> _Sent | None:
    """Read ``mlflow.json``; a damaged one is as good as none, for what is sent again changes nothing there."""
    try:
        return records.read(folder.path / "mlflow.json", _Sent)
    except (DataError, FileNotFoundError):
        return None


def _name(name: str) -> str:
    return _REFUSED.sub("_", name.replace("@", "_at_"))[:250]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Write nested mappings, and lists of them, as ``a.b.0.c``."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for part, inner in value.items():
            yield from _flat(inner, f"{key}.{part}" if key else str(part))
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tags(run: Run, where: str) -> dict[str, str]:
    local = [name for name in run.teachers if "/" not in name]
    teachers = [_sent(RunFolder(runs_folder() / name), where).run_id or name for name in local]
    tags = {
        "distill.role": run.role,
        "distill.objective": run.role,
        "distill.run": run.name,
        "distill.teacher": ", ".join(run.teachers),
        "distill.teacher_run_id": ", ".join(id_ for id_ in teachers if _RUN_ID.fullmatch(id_)),
        "distill.student": run.model,
        "distill.recipe": run.recipe,
        "distill.group": run.group,
        "distill.seed": str(run.seed),
        "mlflow.source.name": "distill",
    }
    return {key: value for key, value in tags.items() if value}


def _find(client: Any, run_id: str) -> Any:
    """Return the MLflow run of this id, None where the store has none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _begin(client: Any, folder: RunFolder, run: Run, where: str) -> _Sent:
    from mlflow.entities import Param

    experiment, start = _experiment(client, where, run.experiment), int(run.created * 1000)
    # A crash between the creation there and the note of it here must not make a second run.
    there = client.search_runs([experiment], f"tags.`distill.run` = '{run.name}'")
    mine = [found for found in there if found.info.start_time == start]
    made = mine[0] if mine else client.create_run(experiment, start, _tags(run, where), run.name)
    recipe = yaml_strict.read(folder.recipe)
    # 6,000 characters are what MLflow takes in a parameter.
    params = [Param(_name(key), value[:6000]) for key, value in _flat(recipe)]
    client.log_batch(made.info.run_id, params=params)
    sent = _Sent(public(where), made.info.run_id)
    sent.save(folder)
    return sent


def _send_metrics(client: Any, folder: RunFolder, sent: _Sent, entries: list[dict[str, Any]]) -> None:
    """Send what is new.

    MLflow's store keys a figure by run, name, step, time and value, and the time is the journal's. So a
    batch that arrived but was not noted here (a crash, a lost answer) is sent again and changes nothing.
    """
    from mlflow.entities import Metric

    while new := entries[sent.entries : sent.entries + _ENTRIES_AT_ONCE]:
        metrics = [
            Metric(_name(name), value, int(entry["time"] * 1000), entry["step"])
            for entry in new
            for name, value in entry["metrics"].items()
            if _number(value)
        ]
        client.log_batch(sent.run_id, metrics=metrics)
        sent.entries += len(new)
        sent.save(folder)


def _send_dataset(client: Any, folder: RunFolder, sent: _Sent, digest: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    recipe = yaml_strict.read(folder.recipe)
    source = recipe["data"]["source"]
    name = Path(source if isinstance(source, str) else source.get("train", "data")).name
    data = Dataset(name[:500], digest[:36], "distill", json.dumps({"uri": source})[:65535])
    client.log_inputs(sent.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "train")])])
    sent.dataset = True
    sent.save(folder)


@contextmanager
def _patience() -> Iterator[None]:
    """Give files a minute: the figures have just arrived, so the server lives, and training is over."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    short = os.environ[name]
    os.environ[name] = str(max(int(short), 60))
    try:
        yield
    finally:
        os.environ[name] = short


def _send_result(
    client: Any, folder: RunFolder, sent: _Sent, run: Run, entries: list[dict[str, Any]]
) -> None:
    """Send the final figures that the journal did not hold, then the files that are not there yet."""
    from mlflow.entities import Metric

    figures, time_ms = folder.metrics(), int((run.finished or run.created) * 1000)
    step, told = (
        entries[-1]["step"] if entries else 0,
        {name for entry in entries for name in entry["metrics"]},
    )
    final = [
        Metric(_name(f"{part}/{name}"), value, time_ms, step)
        for part in ("test", "bench", "model")
        for name, value in figures.get(part, {}).items()
        if _number(value) and f"{part}/{name}" not in told
    ]
    client.log_batch(sent.run_id, metrics=final)
    manifests = [Path(cache) / "manifest.json" for cache in run.facts.get("logits", [])]
    files = {folder.recipe: "", folder.path / "metrics.json": "", folder.model: "model"}
    files |= {manifest: f"logits/{manifest.parent.name}" for manifest in manifests}
    with _patience():
        for path, place in files.items():
            key = f"{place}/{path.name}"
            if key not in sent.artifacts and path.exists():
                log = client.log_artifacts if path.is_dir() else client.log_artifact
                log(sent.run_id, str(path), place or None)
                sent.artifacts.append(key)
                sent.save(folder)


def _send(folder: RunFolder, where: str) -> None:
    folder.refuse_links()
    run, entries, sent = folder.read(), list(folder.entries()), _sent(folder, where)
    status, digest = _STATUS[run.status], str(run.facts.get("data", ""))
    if sent.status == status and sent.entries >= len(entries) and (sent.dataset or not digest):
        return
    client = client_of(where)
    there = _find(client, sent.run_id)
    if there is None:
        sent = _begin(client, folder, run, where)
    elif there.info.lifecycle_stage == "deleted":
        return  # somebody threw it away in MLflow: it is not ours to bring back
    _send_metrics(client, folder, sent, entries)
    if digest and not sent.dataset:
        _send_dataset(client, folder, sent, digest)
    if status == "FINISHED":
        _send_result(client, folder, sent, run, entries)
    else:
        sent.artifacts = []  # a run that goes on has other files when it ends
    if status == "RUNNING":
        client.update_run(sent.run_id, status)
    else:
        from mlflow.entities import RunTag

        # The teachers' MLflow ids may have become known only now.
        client.log_batch(sent.run_id, tags=[RunTag(*tag) for tag in _tags(run, where).items()])
        ended = run.finished or (entries[-1]["time"] if entries else run.created)
        client.set_terminated(sent.run_id, status, int(ended * 1000))
    sent.status = status
    sent.save(folder)


def sync(folder: RunFolder, *, patient: bool = False) -> bool:
    """Send MLflow what it does not have of a run yet: figures, and at the end files and status.

    Call it as often as wanted: nothing is sent twice, and after a failure MLflow is left alone for a
    minute. It comes back after 20 seconds whatever the store does, or after 5 minutes where nobody trains meanwhile; what
    hangs is left behind in a thread. A run that is resumed goes on in the same MLflow run.

    Args:
        folder: the run.
        patient: whether nobody trains meanwhile; so it is anyhow when the run has finished.

    Returns:
        Whether MLflow now has all of it.
    """
    where = uri()
    if time.monotonic() < _silent_until.get(where, 0):
        return False
    patient = patient or folder.read().status == "finished"
    limit = _HOLDS_UP_AT_THE_END if patient else _HOLDS_UP
    outcome: list[Exception | None] = []

    def send() -> None:
        try:
            with FileLock(folder.path / ".mlflow.lock", timeout=limit if patient else 3):
                _send(folder, where)
            outcome.append(None)
        # Stores and artifact stores fail in their own ways (requests, SQLAlchemy, boto3, ...), and hours of
        # training must not end because a tracker is down: the journal has every figure.
        except Exception as error:
            outcome.append(error)

    # A database driver may wait for ever; a daemon thread is one that the process does not wait for when it ends.
    worker = threading.Thread(target=send, daemon=True)
    worker.start()
    worker.join(limit)
    error = outcome[0] if outcome else TimeoutError(f"no answer in {limit:g} seconds")
    if error is None:
        return True
    if isinstance(error, Timeout):
        return False  # another process is sending this run, or a thread that was left behind
    # What held a run up is left alone for as long again.
    _silent_until[where] = time.monotonic() + (_SILENT_FOR if outcome else max(limit, _SILENT_FOR))
    if not _noticed:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        text = "MLflow cannot be reached (%s): figures stay in the journal; `distill sync` sends them later"
        _log.warning(text, reason)
        _noticed.add(where)
    _log.debug("MLflow at %s failed", public(where), exc_info=error)
    return False


def find_run(mlflow_run_id: str) -> RunFolder | None:
    """Find the run on this machine that has this MLflow run id."""
    for folder in every():
        note = _note(folder)
        if note is not None and note.run_id == mlflow_run_id:
            return folder
    return None


def download(mlflow_run_id: str, into: Path) -> Path | None:
    """Fetch the model that a run left on the tracking server.

    Args:
        mlflow_run_id: 32 hexadecimal digits.
        into: the folder in which one of that id is made, complete or not at all.

    Returns:
        The model's folder; None when the server has no such run.

    Raises:
        UsageError: not an MLflow run id.
        HubError: the server does not answer, or the run has no model there.
    """
    if not _RUN_ID.fullmatch(mlflow_run_id):
        raise UsageError(f"{mlflow_run_id[:80]!a}: an MLflow run id is 32 hexadecimal digits, in lower case")
    where = uri()
    try:
        client = client_of(where)
        if _find(client, mlflow_run_id) is None:
            return None
        if not client.list_artifacts(mlflow_run_id, "model"):
            raise HubError(
                f"MLflow run {mlflow_run_id} has no model on {public(where)}; is it finished and sent?"
            )
        with _patience(), replacing_folder(into / mlflow_run_id) as aside:
            fetched = Path(client.download_artifacts(mlflow_run_id, "model", str(aside)))
            for path in list(fetched.iterdir()):
                path.rename(aside / path.name)
            fetched.rmdir()
    except DistillError:
        raise
    # As many kinds of failure as there are artifact stores; to the user they are one.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise HubError(
            f"MLflow run {mlflow_run_id}: cannot be fetched from {public(where)}: {reason}"
        ) from error
    return into / mlflow_run_id
