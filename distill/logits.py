"""The logit cache: content-addressed, joined by row id, complete or absent, read row by row.

    <key>/key.json           what the logits depend on: weights, tokenizer, window, precision, labels
    <key>/<sha256[:32]>.safetensors    row_id (n,) int64 and logits (n, classes), named by their content;
                             of spans logits (units, 2), one row's after another's, and offsets (n + 1,) int64
    <key>/manifest.json      written last: every shard's full hash, and what the gate found

A shard whose name is not its hash is not a shard, so a pass that was killed goes on at the rows that are
missing. The key says nothing of the data: one cache serves every student, any tokenizer, and more text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from pydantic import ConfigDict
from typing_extensions import NotRequired, TypedDict

from distill import records
from distill.batching import deal
from distill.errors import LogitsError, nearest
from distill.files import replacing, sha256_file, sha256_json, write_json
from distill.ids import among
from distill.progress import say, track
from distill.runs import runs_folder
from distill.schema import Cache
from distill.spans import UNIT
from distill.tasks import UNREAD, Array, Floats, Kind, log_probabilities

if TYPE_CHECKING:
    from distill.encoding import Encoded
    from distill.models import Classifier

FORMAT = 1
NOT_READING = ("train", "checkpoint", "tokenizer", "config", "lengthen")
"""Recipe keys of a model that do not change what it says of a document once its weights are given."""
_CONFIG_NOISE = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")


class _Reading(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    max_length: int
    view: str


class Key(TypedDict):
    """What ``key.json`` holds."""

    format: int
    weights: str
    config: str
    tokenizer: str
    reading: _Reading
    precision: str
    dtype: str
    kind: Kind
    labels: list[str]
    units: NotRequired[str]


class _Shard(TypedDict):
    file: str
    rows: int
    sha256: str


class Manifest(TypedDict):
    """What ``manifest.json`` holds."""

    format: int
    rows: int
    shards: list[_Shard]
    gate: dict[str, Any]


def key_of(model: Classifier, precision: str, dtype: str) -> dict[str, Any]:
    """Say everything that a cached logit depends on."""
    from distill.models import weights_hash

    config = {k: v for k, v in model.model.config.to_dict().items() if k not in _CONFIG_NOISE}
    reading = {k: v for k, v in model.config.model_dump(mode="json").items() if k not in NOT_READING}
    backend = model.tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return {
        "format": FORMAT,
        "weights": weights_hash(model.model),
        "config": sha256_json(config),
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "reading": reading,
        "precision": precision,
        "dtype": dtype,
        "kind": model.task.kind,
        "labels": list(model.task.labels),
        **({"units": UNIT.pattern} if model.task.kind == "span" else {}),
    }


def folder_of(key: dict[str, Any]) -> Path:
    """Return where logits of this key are kept."""
    return runs_folder() / "_logits" / sha256_json(key)[:16]


def _shards(folder: Path) -> list[Path]:
    """List the shards whose content is what their name says."""
    return [p for p in sorted(folder.glob("*.safetensors")) if sha256_file(p).startswith(p.stem)]


def _tensors(shard: Path) -> dict[str, Array]:
    """Map a shard's tensors into memory; nothing is read before it is asked for.

    Raises:
        LogitsError: it is no safetensors file, or holds other tensors than a shard does.
    """
    from safetensors import SafetensorError, safe_open

    where = f"{shard.parent.name}: shard {shard.name}"
    try:
        with safe_open(shard, "pt") as file:  # "pt" maps the file
            found = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise LogitsError(f"{where} cannot be read: {error}") from None
    rows, offsets = found.get("row_id"), found.get("offsets")
    if (
        rows is None or rows.ndim != 1 or rows.dtype != np.int64
        or (offsets is not None and (offsets.dtype != np.int64 or offsets.shape != (len(rows) + 1,)))
        or "logits" not in found or found["logits"].ndim != 2 or found["logits"].dtype.kind != "f"
    ):  # fmt: skip
        raise LogitsError(f"{where} holds other tensors than a shard of logits; delete it")
    return found


def _ids(shard: Path) -> Array:
    return _tensors(shard)["row_id"].copy()


def _refuse_misshapen(arrays: dict[str, Array], key: Key, where: str) -> None:
    """Raise LogitsError when a shard's tensors do not fit each other, or the task."""
    offsets, height = arrays.get("offsets"), len(arrays["logits"])
    span = key["kind"] == "span"
    fits = (offsets is not None) == span and arrays["logits"].shape[1] == (2 if span else len(key["labels"]))
    if offsets is None:
        fits = fits and len(arrays["row_id"]) == height
    else:
        fits = fits and offsets[0] == 0 and offsets[-1] == height and bool((np.diff(offsets) >= 0).all())
    if not fits:
        raise LogitsError(
            f"{where} has another shape than its task; delete it, and distill cache computes it again"
        )


def missing(folder: Path, row_ids: Array) -> Array:
    """Return where in ``row_ids`` those stand that no complete shard holds: each once, in the order of the ids."""
    have = np.sort(np.concatenate([np.zeros(0, np.int64), *(_ids(shard) for shard in _shards(folder))]))
    order = np.argsort(row_ids, kind="stable")
    ids = row_ids[order]
    first = np.concatenate([[True], ids[1:] != ids[:-1]])
    return order[first & ~among(ids, have)]


def write_shard(folder: Path, row_ids: Array, logits: Floats, dtype: str, units: Array | None = None) -> Path:
    """Write one shard, complete or not at all.

    Args:
        folder: of the cache.
        row_ids: ``(n,)``.
        logits: as in tasks.py.
        dtype: in which they are written.
        units: of spans, ``(n,)``: how many each row has.

    Raises:
        LogitsError: a logit is not finite; the row is named.
    """
    from safetensors.numpy import save_file

    with np.errstate(over="ignore"):  # an infinity is told below, with its row
        stored = logits.astype(dtype)
    bad = ~np.isfinite(stored.reshape(len(stored), -1)).all(axis=1)
    if bad.any():
        fix = "cache.precision=fp32" if not np.isfinite(logits).all() else "cache.dtype=float32"
        raise LogitsError(
            f"the teacher's logits of row {int(row_ids[bad][0])} are not finite in {dtype}; try {fix}"
        )
    arrays = {"row_id": np.ascontiguousarray(row_ids), "logits": np.ascontiguousarray(stored)}
    if units is not None:
        arrays["logits"] = np.concatenate([row[:count] for row, count in zip(stored, units, strict=True)])
        arrays["offsets"] = np.concatenate([[0], np.cumsum(units, dtype=np.int64)])
    staged = folder / f"{int(row_ids[0])}.part"
    with replacing(staged) as aside:
        save_file(arrays, aside)
    shard = folder / f"{sha256_file(staged)[:32]}.safetensors"
    staged.replace(shard)
    return shard


def fill(
    folder: Path,
    key: dict[str, Any],
    model: Classifier,
    data: Encoded,
    settings: Cache,
    accelerator: Any,
    title: str,
) -> int:
    """Compute and write the logits that are missing; each process writes shards of its own.

    Args:
        folder: of this key.
        key: what :func:`key_of` says.
        model: the teacher, in evaluation mode, on its device.
        data: all rows that are needed.
        settings: the recipe's.
        accelerator: Accelerate's.
        title: for the progress bar.

    Returns:
        Rows that had to be computed, over all processes.
    """
    from distill.inference import predict
    from distill.memory import release_memory

    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            write_json(folder / "key.json", key)
            for leftover in [*folder.glob("*.part"), *folder.glob(".*.tmp")]:
                leftover.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        rows = missing(folder, data.row_id)
        accelerator.wait_for_everyone()
        if not len(rows):
            return 0
        # Documents of like length share a shard, and so a batch: little padding. The longest come first, as a
        # lack of memory does then.
        rows = rows[np.argsort(-data.longest_window[rows], kind="stable")].astype(np.int32)
        most = settings.tokens_per_shard, settings.rows_per_shard
        shares = deal(data.tokens[rows], *most, accelerator.num_processes)
        mine = [rows[piece] for piece in shares[accelerator.process_index]]  # slices, without a copy
        # Documents would make the first estimates of the time left wrong: the longest come first.
        with track(title, sum(int(data.tokens[piece].sum()) for piece in mine), "tokens") as progress:
            for piece in mine:
                logits = predict(model, data, piece, settings.tokens_per_batch, key["precision"], progress)
                units = None if data.units is None else data.units[piece]
                write_shard(folder, data.row_id[piece], logits, settings.dtype, units)
                release_memory()
        accelerator.wait_for_everyone()
        return len(rows)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the cache; wait where another process does.

    Two would compute the same rows, and sweep up each other's unfinished files.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{folder.name}: another process is caching these logits; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_manifest(folder: Path, gate: dict[str, Any]) -> None:
    """Write the manifest: from now on the cache counts as whole."""
    sizes = {path: len(_ids(path)) for path in _shards(folder)}
    shards = [{"file": path.name, "rows": rows, "sha256": sha256_file(path)} for path, rows in sizes.items()]
    manifest = {"format": FORMAT, "rows": sum(sizes.values()), "shards": shards, "gate": gate}
    write_json(folder / "manifest.json", manifest)


class _Stored:
    """The logits of a shard, read from the disk and not mapped: a mapped file's pages count as the process's memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(size))["logits"]
        self._path = path
        self._dtype = np.dtype({"F32": np.float32, "F16": np.float16}[about["dtype"]])
        self._width = int(about["shape"][1])
        self._start = 8 + size + int(about["data_offsets"][0])

    def rows(self, rows: Array) -> Array:
        """Read some rows, ``(n,)`` to ``(n, width)``."""
        each = self._width * self._dtype.itemsize
        with self._path.open("rb") as file:
            handle = file.fileno()
            found = b"".join(os.pread(handle, each, self._start + row * each) for row in rows.tolist())
        return np.frombuffer(found, self._dtype).reshape(-1, self._width)

    def between(self, first: int, end: int) -> Array:
        """Read the rows from one on to before another."""
        each = self._width * self._dtype.itemsize
        with self._path.open("rb") as file:
            found = os.pread(file.fileno(), (end - first) * each, self._start + first * each)
        return np.frombuffer(found, self._dtype).reshape(-1, self._width)


class Logits:
    """Cached logits, read by row id.

    Args:
        folder: the cache's.
        expected: what the key must be; a difference is named. None: whatever is there.
        verify: compare every shard's hash and look for NaN.

    Raises:
        LogitsError: no whole cache, a damaged shard, another key.
        DataError: its key or its manifest is damaged.
    """

    def __init__(self, folder: Path, expected: dict[str, Any] | None = None, *, verify: bool = True) -> None:
        if not (folder / "key.json").is_file():
            raise LogitsError(f"{folder}: no cached logits here (key.json is missing)")
        self.folder = folder
        self.key = records.read(folder / "key.json", Key)
        if expected is not None:
            refuse_difference(self.key, expected, folder.name)
        names: list[Path]
        if verify:
            if not (folder / "manifest.json").is_file():
                raise LogitsError(
                    f"{folder.name}: the caching pass has not finished; distill cache goes on with it"
                )
            _verify(folder)
            names = [folder / Path(shard["file"]).name for shard in manifest_of(folder)["shards"]]
        else:
            names = _shards(folder)
        ids = [np.zeros(0, np.int64)]
        self._stored: list[_Stored] = []
        self._offsets: list[Array] = []
        """Of spans: where each row's units begin in a shard."""
        for path in names:
            arrays = _tensors(path)
            _refuse_misshapen(arrays, self.key, f"{folder.name}: shard {path.name}")
            ids.append(arrays["row_id"].copy())  # a view would keep all of the file mapped
            self._stored.append(_Stored(path))
            if "offsets" in arrays:
                self._offsets.append(arrays["offsets"].copy())
        self._starts = np.cumsum([0, *map(len, ids[1:])])
        """Where each shard's rows begin among all."""
        everything = np.concatenate(ids)
        del ids
        self._order = np.argsort(everything, kind="stable").astype(np.uint32)
        self._ids = everything[self._order]

    def __len__(self) -> int:
        return len(self._ids)

    def require(self, row_ids: Array) -> None:
        """Raise LogitsError unless every row is here."""
        absent = ~among(row_ids, self._ids)
        if absent.any():
            raise LogitsError(
                f"{self.folder.name}: {int(absent.sum()):,} of {len(row_ids):,} rows have no cached logits (the first is row id "
                f"{int(row_ids[absent][0])}); they were cached from other data"
            )

    def __call__(self, row_ids: Array) -> Floats:
        """Look rows up: ``(n,)`` row ids to ``(n, classes)`` float32, or as in tasks.py."""
        at = np.minimum(np.searchsorted(self._ids, row_ids), max(len(self._ids) - 1, 0))
        if not len(self._ids) or not (self._ids[at] == row_ids).all():
            self.require(row_ids)
        places = self._order[at].astype(np.int64)
        shards = np.searchsorted(self._starts, places, side="right") - 1
        rows = places - self._starts[shards]
        if self._offsets:
            return self._units(shards, rows)
        result = np.empty((len(row_ids), len(self.key["labels"])), np.float32)
        for shard in np.unique(shards):
            mask = shards == shard
            result[mask] = self._stored[shard].rows(rows[mask])
        return result

    def _units(self, shards: Array, rows: Array) -> Floats:
        """Lay rows of different numbers of units out as a rectangle, ``(n, units, 2)``."""
        found = [
            self._stored[shard].between(*self._offsets[shard][row : row + 2].tolist())
            for shard, row in zip(shards, rows, strict=True)
        ]
        result = np.full((len(found), max(map(len, found), default=1), 2), UNREAD, np.float32)
        for at, one in enumerate(found):
            result[at, : len(one)] = one
        return result


def opened(folder: Path, key: dict[str, Any], row_ids: Array) -> Logits | None:
    """Open a cache that holds all these rows; None when a pass has still to compute some of them.

    Raises:
        LogitsError: a shard is damaged. (One that is gone is computed again, as the message of a damaged
            one tells the user to bring about.)
    """
    try:
        shards = manifest_of(folder)["shards"]
    except FileNotFoundError:
        return None
    if not all((folder / Path(shard["file"]).name).is_file() for shard in shards):
        return None
    cache = Logits(folder, key)
    return cache if among(row_ids, cache._ids).all() else None


def refuse_difference(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raise LogitsError that names the first thing in which two keys differ."""
    words = {
        "weights": "another teacher's weights",
        "config": "another configuration of the teacher",
        "tokenizer": "another tokenizer",
        "labels": "another label order",
        "precision": "another precision",
        "dtype": "another dtype",
        "kind": "another kind of task",
        "units": "units by another rule",
        "format": "another format of the cache",
    }
    for name in expected:
        was, wanted = found.get(name), expected[name]
        if was == wanted:
            continue
        if name == "reading" and isinstance(was, dict):
            part = next(k for k in {*was, *wanted} if was.get(k) != wanted.get(k))
            raise LogitsError(
                f"{where}: these logits were read with {part}={was.get(part)}, and {wanted.get(part)} is wanted"
            )
        shown = f" ({was}, not {wanted})" if name not in ("weights", "config", "tokenizer") else ""
        raise LogitsError(f"{where}: these logits are of {words.get(name, name)}{shown}")


def _verify(folder: Path) -> int:
    """Check a whole cache against its manifest; return its rows."""
    key, rows = records.read(folder / "key.json", Key), 0
    for shard in manifest_of(folder)["shards"]:
        path = folder / Path(shard["file"]).name
        if not path.is_file():
            raise LogitsError(f"{folder.name}: shard {path.name} is missing; distill cache computes it again")
        if sha256_file(path) != shard["sha256"]:
            raise LogitsError(
                f"{folder.name}: shard {path.name} is damaged (its hash differs); delete it, and distill cache computes it again"
            )
        arrays = _tensors(path)
        _refuse_misshapen(arrays, key, f"{folder.name}: shard {path.name}")
        if len(arrays["row_id"]) != shard["rows"] or not np.isfinite(arrays["logits"]).all():
            raise LogitsError(
                f"{folder.name}: shard {path.name} holds NaN or too few rows; delete it, and distill cache computes it again"
            )
        rows += len(arrays["row_id"])
    return rows


def manifest_of(folder: Path) -> Manifest:
    """Read a whole cache's manifest.

    Raises:
        DataError: it is damaged.
        FileNotFoundError: the cache is not whole.
    """
    return records.read(folder / "manifest.json", Manifest)


def every() -> list[Path]:
    """List the caches of the runs folder."""
    return sorted(p.parent for p in (runs_folder() / "_logits").glob("*/key.json"))


def find(name: str) -> Path:
    """Find a cache by its name in the runs folder, or by its path.

    Raises:
        LogitsError: there is none.
    """
    path = Path(name)
    if (path / "key.json").is_file():
        return path
    known = {p.name: p for p in every()}
    if name not in known:
        raise LogitsError(f"no cached logits called {name!r}{nearest(name, known)}")
    return known[name]


def verify(folder: Path) -> int:
    """Check every shard of a cache.

    Returns:
        Its rows.

    Raises:
        LogitsError: it is not whole, or a shard is damaged.
    """
    if not (folder / "manifest.json").is_file():
        raise LogitsError(f"{folder.name}: the caching pass has not finished; distill cache goes on with it")
    return _verify(folder)


def mean(kind: Kind, stack: Sequence[Floats], how: str) -> Floats:
    """Make one target of several teachers' logits, ``(documents, classes)`` or as in tasks.py each.

    ``mean_log_probs`` averages log softmax (a geometric mean of the probabilities); for multi-label and
    regression tasks the mean of the logits, which are log-odds or the predictions themselves.
    """
    if how == "mean_log_probs" and kind in ("single_label", "span"):
        stack = [log_probabilities(kind, logits).astype(np.float32) for logits in stack]
    return np.asarray(np.mean(stack, axis=0, dtype=np.float32))
