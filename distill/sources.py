"""Where rows come from: files, folders, packages and the hub, all opened through ``datasets``.

Knows formats and columns; knows no task.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import hub
from distill.errors import DataError, HubError, nearest
from distill.files import expanded
from distill.schema import Data
from distill.streams import Shards

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import datasets

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
PARQUET = ".parquet"
LINES = ".txt"
"""The ending of a file with one document a line: unlabelled text."""
SHOWN = 30
"""Characters of a column's name in a message: the header may be missing, and a document stand in its place."""


MAX_DEPTH = 100
"""Of brackets in a jsonl; documents and answers stand four deep at most."""
_DEEP = f"nested deeper than {MAX_DEPTH}; no document is"
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?')
_BRACKET = re.compile(rb"[\[\]{}]")
_QUOTE = "a text with the separator in it stands in quotes"


def _prepare() -> None:
    """Silence ``datasets``, and see to the place where it works."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are raised as well, and told once, by us
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise DataError(
            f"data sets are cached in {cache}, which cannot be written; set HF_HOME to a folder that can"
        )


def check_columns(
    dataset: datasets.Dataset | datasets.IterableDataset | Shards, columns: Sequence[str], where: str
) -> None:
    """Refuse a data set that lacks a column, with the nearest name that it has."""
    for column in columns:
        if column not in dataset.column_names:
            known = [" ".join(name.split())[:SHOWN] for name in dataset.column_names]
            fix = ""
            if len(known) == 1 and any(mark in known[0] for mark in ",;\t|"):
                fix = "; a csv has commas between its columns, a tsv tabs: convert it, or set data.format"
            elif any(len(name.split()) > 3 for name in known):
                fix = "; where there is no header line set data.columns"
            raise DataError(f"{where}: no column {column!r}{nearest(column, known)}{fix}")


def check_text(
    dataset: datasets.Dataset | datasets.IterableDataset | Shards, columns: Sequence[str], where: str
) -> None:
    """Refuse a text column that holds lists or mappings."""
    import datasets

    for column in columns:
        feature = dataset.features[column]
        if not isinstance(feature, datasets.Value):
            raise DataError(f"{where}: column {column!r} holds {type(feature).__name__.lower()}s, not text")


def as_text(dataset: datasets.Dataset) -> datasets.Dataset:
    """Make every column of values a string (a column of numbers is read as numbers by some formats)."""
    import datasets

    values = {n: f.dtype for n, f in dataset.features.items() if isinstance(f, datasets.Value)}
    if all(dtype in ("string", "large_string") for dtype in values.values()):
        return dataset
    text = dict.fromkeys(values, datasets.Value("string"))
    return dataset.cast(datasets.Features({**dataset.features, **text}))


def resolve(address: str, key: str = "data.source") -> Path | None:
    """Find a source on this machine; None when it can only be a hub id.

    Args:
        address: as in a recipe.
        key: the recipe's key that names it, for messages.

    Raises:
        DataError: a path or package that is not here.
    """
    if address.startswith("package://"):
        return hub.package_path(address)
    path = expanded(address)
    if path.exists() or parquet_files(path):
        return path
    endings = {*SUFFIXES, *([] if key == "data.source" else [LINES])}
    if hub.is_hub_id(address) and path.suffix not in endings:
        return None
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    known = [p.name for p in beside if p.suffix in endings or (p.is_dir() and not p.name.startswith("."))]
    fix = "; --set data.source=PATH says where it is" if key == "data.source" else ""
    raise DataError(f"{key}: there is no {address}{nearest(path.name, known)}{fix}")


def open_all(data: Data, names: Sequence[str]) -> dict[str, datasets.Dataset]:
    """Open the source's splits that a recipe uses.

    Args:
        data: the recipe's section.
        names: splits of the source. A single file is a source with the one split ``train``.

    Raises:
        DataError: a file is missing, unreadable, not UTF-8, or not of its format; no such split.
        HubError: a hub data set that is neither here nor reachable.
    """
    _prepare()
    if isinstance(data.source, dict):
        missing = [name for name in names if name not in data.source]
        if missing:
            raise DataError(f"data.source has no split {missing[0]!r}{nearest(missing[0], data.source)}")
        return {name: _open(data, data.source[name], name)["train"] for name in names}
    found = _open(data, data.source, data.source.rsplit("/", 1)[-1], names)
    for name in names:
        if name not in found:
            raise DataError(
                f"data.source has no split {name!r}{nearest(name, found)}; "
                f"to cut one off another: --set 'data.splits.{name}={{from: {next(iter(found))}, fraction: 0.2}}'"
            )
    return {name: found[name] for name in names}


def parquet_files(path: Path) -> list[str]:
    """List the .parquet files of a folder, that one, or those that a ``*`` in its name stands for, sorted by name."""
    folder, pattern = (path, "*") if path.is_dir() else (path.parent, path.name)
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    return [str(file) for file in found if file.suffix.lower() == PARQUET and file.is_file()]


def open_text(
    data: Data, address: str, key: str, *, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset | Shards:
    """Open a source of unlabelled text: every split of a folder, ``train`` of all else.

    Args:
        data: how files are read; its own source is not.
        address: a file (a .txt has one document a line), a folder of folders or of .parquet files,
            ``package://name/path`` or a hub id.
        key: the recipe's key that names it, for messages.
        streaming: leave it where it is: .parquet files and hub data sets.

    Raises:
        DataError: it is missing, unreadable, not UTF-8, or not of its format, or of one that is not streamed.
        HubError: a hub data set that is neither here nor reachable.
    """
    import datasets

    _prepare()
    path = resolve(address, key)
    if path is None:
        found = _open_hub(data, address, ["train"], key, streaming=streaming)
        return found["train"]
    if path.is_file() and path.suffix.lower() not in (*SUFFIXES, LINES):
        raise DataError(f"{key}: {path.name}: unknown ending; must be {LINES}, {', '.join(SUFFIXES)}")
    if streaming:
        if not (files := parquet_files(path)):
            raise DataError(
                f"{key}: {address}: only {PARQUET} files and hub data sets are streamed; convert it, or leave streaming out"
            )
        return _open_shards(files)
    if path.suffix.lower() != LINES:
        return datasets.concatenate_datasets(list(_open(data, str(path), address).values()))
    with _reading(path, "text"):
        refuse_not_utf8(path)
        lines: datasets.Dataset = datasets.load_dataset(
            "text", data_files=str(path), split="train", encoding="utf-8-sig"
        )
    return lines.rename_column("text", data.text) if data.text != "text" else lines


def _open_shards(files: Sequence[str]) -> Shards:
    """Open .parquet files; one that is none, or has other columns than the first, is named."""
    import datasets
    import pyarrow.parquet

    schemas = []
    for file in files:
        with _reading(Path(file), "parquet"):
            schemas.append(pyarrow.parquet.read_schema(file))
    for file, schema in zip(files, schemas, strict=True):
        if missing := set(schemas[0].names) - set(schema.names):
            raise DataError(f"{Path(file).name}: no column {min(missing)!r}, which {Path(files[0]).name} has")
    return Shards(tuple(files), datasets.Features.from_arrow_schema(schemas[0]))


def _open(
    data: Data, address: str, where: str, names: Sequence[str] = ("train",)
) -> dict[str, datasets.Dataset]:
    import datasets

    path = None if data.format == "hub" else resolve(address)
    if path is None:
        return _open_hub(data, address, names)
    form: str = data.format
    shards = parquet_files(path) if path.is_dir() or not path.exists() else []
    if form == "auto" and shards:
        form = "parquet"
    if form == "auto":
        form = "folder" if path.is_dir() else SUFFIXES.get(path.suffix.lower(), "auto")
    if form == "auto":
        raise DataError(
            f"{path.name}: unknown ending; set data.format to one of csv, tsv, jsonl, parquet, folder"
        )
    if form == "folder":
        return _open_folder(path)
    options: dict[str, Any] = {}
    if form in ("csv", "tsv"):
        # "NA" and "null" are words that people write: nothing is read as missing.
        options |= {"delimiter": "\t" if form == "tsv" else ",", "keep_default_na": False}
        if data.columns:
            options |= {"names": data.columns, "header": None}
        if not data.quotes:
            options["quoting"] = csv.QUOTE_NONE
    builder = {"csv": "csv", "tsv": "csv", "jsonl": "json", "parquet": "parquet"}[form]
    if shards:
        _open_shards(shards)  # of many files, the one that is none is named
    with _reading(path, form):
        if builder == "csv":
            if form == "tsv" and data.quotes:
                _refuse_loose_quotes(path)
            # All as text: types that are guessed from the first rows fail on a later one.
            columns = _csv_columns(path, options)
            options["features"] = datasets.Features({name: datasets.Value("string") for name in columns})
        files = shards or str(path)
        return {"train": datasets.load_dataset(builder, data_files=files, split="train", **options)}


def _refuse_loose_quotes(path: Path) -> None:
    """Raise DataError when a quote opens a tsv's field and does not end it: rows would be swallowed unseen."""
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t", strict=True)
        line = 1
        try:
            for _ in rows:
                line = rows.line_num + 1
        except csv.Error:
            raise DataError(
                f"{path.name}, line {line}: a quote opens a field and does not end it; "
                "where quotes are literal (as in GLUE's files) set data.quotes=false"
            ) from None


def _csv_columns(path: Path, options: dict[str, Any]) -> list[str]:
    """Read the column names, and refuse rows of another width (pandas would shift or pad them)."""
    import pandas

    head = pandas.read_csv(path, dtype=str, nrows=1, **options)
    if "names" not in options:
        # pandas would rename the second of two equal names, and nobody would know which one is read.
        first = pandas.read_csv(path, dtype=str, nrows=1, header=None, **options).iloc[0]
        twice = first[first.duplicated() & first.astype(bool)]  # spreadsheets leave columns without a name
        if len(twice):
            raise DataError(f"{path.name}: two columns are called {twice.iloc[0]!r:.60}; rename one of them")
    if "names" in options:
        first = pandas.read_csv(path, dtype=str, nrows=1, **{**options, "names": None})
        if len(first.columns) != len(head.columns):
            raise DataError(
                f"{path.name}, line 1: {len(first.columns)} fields, and data.columns names {len(head.columns)}"
            )
    elif not isinstance(head.index, pandas.RangeIndex):
        raise DataError(
            f"{path.name}, line 2: more fields than the {len(head.columns)} of the header; {_QUOTE}"
        )
    return [str(name) for name in head.columns]


@contextlib.contextmanager
def _reading(path: Path, form: str) -> Iterator[None]:
    """Turn whatever a reader raises into one line that names the file, and the byte where it can."""
    from datasets.exceptions import DatasetGenerationError

    name = path.name or str(path)
    try:
        if path.is_file():
            if path.stat().st_size == 0:
                raise DataError(f"{name}: the file is empty")
            with path.open("rb"):
                pass
        if form == "jsonl":
            refuse_not_utf8(path)  # the JSON reader lets it pass, and the text breaks much later
            _refuse_deep(path)
        yield
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    except (DatasetGenerationError, ValueError, zipfile.BadZipFile) as error:
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[-1][:200]
        if isinstance(cause, UnicodeDecodeError) or "utf" in reason.lower():
            refuse_not_utf8(path)
        if "corresponds to no data" in reason:
            raise DataError(f"{name}: the file has no rows") from None
        wide = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", reason)
        if wide is not None:
            raise DataError(
                f"{name}, line {wide[2]}: {wide[3]} fields, and not {wide[1]}; {_QUOTE}"
            ) from None
        if form == "jsonl":
            _refuse_broken_line(path)
        raise DataError(f"{name}: cannot be read: {reason}") from None


def refuse_not_utf8(path: Path, shown: str | None = None) -> None:
    """Raise DataError with the first line of a file that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise DataError(
                    f"{shown or path.name}, line {number}: not UTF-8; convert it (iconv -f LATIN1 -t UTF-8)"
                ) from None


def _refuse_broken_line(path: Path) -> None:
    """Raise DataError with the first line that is no JSON object."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                json_object(line, f"{path.name}, line {number}")


def json_object(line: str, where: str) -> dict[str, Any]:
    """Parse a line of a jsonl.

    Raises:
        DataError: it is no JSON object, has a key twice, is nested too deep, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(line, object_pairs_hook=_unique)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from None
    except KeyError as error:
        raise DataError(f"{where}: key {error.args[0]!r:.60} twice") from None
    except RecursionError:
        raise DataError(f"{where}: {_DEEP}") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    if not isinstance(value, dict):
        raise DataError(f'{where}: must be an object, as in {{"text": "…"}}')
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(key)
        result[key] = value
    return result


def _refuse_deep(path: Path) -> None:
    """Raise DataError where brackets stand too deep: Arrow's reader would overflow the stack, and the process end."""
    depth = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            bare = line.strip()
            if bare[:1] == b"{" and bare[-1:] == b"}" and sum(map(bare.count, (b"{", b"[", b"]", b"}"))) == 2:
                continue  # as most lines are; a string that is still open would be no JSON
            for bracket in _BRACKET.findall(_STRING.sub(b"", line)):
                depth = depth + 1 if bracket in b"[{" else max(0, depth - 1)
                if depth > MAX_DEPTH:
                    raise DataError(f"{path.name}, line {number}: {_DEEP}")


def _open_hub(
    data: Data, address: str, names: Sequence[str], key: str = "data.source", *, streaming: bool = False
) -> dict[str, Any]:
    online = hub.reachable()
    import datasets

    try:
        return {
            name: datasets.load_dataset(address, data.config, split=name, streaming=streaming)
            for name in names
        }
    except ValueError as error:
        raise DataError(f"{key} {address}: {str(error).splitlines()[0][:200]}") from None
    except (ConnectionError, FileNotFoundError) as error:
        if online:
            raise DataError(f"{key} {address}: {str(error).splitlines()[0][:200]}") from None
        files = f"--set {_pointer(names)}" if key == "data.source" else "DIR/file.parquet"
        raise HubError(
            f"{key}: {address} is no file here, and the hub cannot be reached; fetch it where it can "
            f"(hf download --repo-type dataset {address} --local-dir DIR) "
            f"and point the recipe to the files ({files})"
        ) from None


def _pointer(names: Sequence[str]) -> str:
    """Write the setting that names a local file for each split that a recipe uses."""
    if len(names) == 1:
        return "data.source=DIR/file.parquet"
    return f"'data.source={{{', '.join(f'{name}: DIR/{name}.parquet' for name in sorted(names))}}}'"


def _open_folder(root: Path) -> dict[str, datasets.Dataset]:
    """Open ``root/split/class/*.txt`` or ``root/class/*.txt``; ``unsup`` has no label (aclImdb)."""
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    nested = [p for p in folders if any(q.is_dir() for q in p.iterdir())]
    layout: dict[str, list[tuple[str, str]]] = {}
    for split in nested or [root]:
        for group in sorted(p for p in split.iterdir() if p.is_dir()):
            unlabelled = group.name in ("unsup", "unlabeled", "unlabelled")
            name = "unsupervised" if unlabelled else (split.name if nested else "train")
            files = [(str(f), "" if unlabelled else group.name) for f in sorted(group.glob("*.txt"))]
            layout.setdefault(name, []).extend(files)
    layout = {name: files for name, files in layout.items() if files}
    if not layout:
        raise DataError(f"{root.name}: no class/*.txt or split/class/*.txt in this folder")
    return {name: _from_files(files) for name, files in layout.items()}


def _from_files(files: list[tuple[str, str]]) -> datasets.Dataset:
    import datasets

    texts = []
    for name, _ in files:
        try:
            texts.append(Path(name).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            refuse_not_utf8(Path(name), "/".join(Path(name).parts[-2:]))
        except OSError as error:
            raise DataError(f"{Path(name).name}: cannot be read: {error.strerror}") from None
    return datasets.Dataset.from_dict({"text": texts, "label": [label for _, label in files]})
