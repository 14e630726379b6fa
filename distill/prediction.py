"""Classify a file of documents, or find answers in them, with a finished run. Knows no architecture."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from distill import models, spans, thresholds, yaml_strict
from distill.errors import DataError, UsageError, nearest
from distill.files import replacing
from distill.progress import track
from distill.runs import RunFolder
from distill.sources import SUFFIXES, json_object, refuse_not_utf8
from distill.tasks import predictions, probabilities

AT_ONCE = 256


def read(
    file: Path, text: str, text_pair: str | None, quotes: bool = True
) -> Iterator[tuple[str, str | None]]:
    """Read documents from lines of text, a csv (by its header) or a jsonl; ``-`` is standard input.

    Args:
        file: what to read.
        text: the column.
        text_pair: the second text's, where there is one.
        quotes: whether quotes in a csv or tsv have a meaning.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON, or has no such column.
    """
    try:
        with ExitStack() as stack:
            stream: TextIO = sys.stdin
            if str(file) != "-":
                # A byte order mark, as spreadsheets write one, is no part of the first column's name.
                stream = stack.enter_context(file.open(encoding="utf-8-sig", newline=""))
            elif isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the locale says
            yield from _rows(stream, file, text, text_pair, quotes)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    except csv.Error as error:
        hint = "; where quotes are literal add --no-quotes" if quotes and file.suffix == ".tsv" else ""
        raise DataError(f"{file}: cannot be read: {error}{hint}") from None
    except UnicodeDecodeError:
        if str(file) != "-":
            refuse_not_utf8(file)
        raise DataError(f"{file}: not UTF-8; convert it (iconv -f LATIN1 -t UTF-8)") from None


def _rows(
    stream: TextIO, file: Path, text: str, text_pair: str | None, quotes: bool
) -> Iterator[tuple[str, str | None]]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        raise DataError(f"{file.name}: no parquet is read here; write a csv or a jsonl of it")
    if suffix not in SUFFIXES:
        for line in stream:
            yield line.rstrip("\r\n"), None
        return
    records: Iterator[tuple[int, dict[str, Any]]]
    if suffix in (".csv", ".tsv"):
        csv.field_size_limit(1 << 30)
        tabs = suffix == ".tsv"
        reader = csv.DictReader(
            stream,
            delimiter="\t" if tabs else ",",
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            strict=tabs and quotes,  # a quote that opens a field and does not end it would swallow rows
        )
        header = reader.fieldnames or []
        twice = next((name for name in (text, text_pair) if name and list(header).count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{file.name}: two columns are called {twice!r:.60}; rename one of them")
        records = enumerate(reader, start=2)
    else:
        records = _json_lines(stream, file)
    for number, record in records:
        for column in (text, text_pair):
            if column is not None and not isinstance(record.get(column), str):
                hint = "" if column in record else nearest(column, map(str, record))
                raise DataError(f"{file.name}, line {number}: no text in column {column!r}{hint}")
        yield record[text], record[text_pair] if text_pair else None


def _json_lines(stream: TextIO, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        yield number, json_object(line, f"{file.name}, line {number}")


def predict(
    folder: RunFolder,
    file: Path,
    text: str,
    text_pair: str | None,
    output: Path | None,
    quotes: bool = True,
) -> None:
    """Write a line of JSON for each document: ``label`` (or ``labels``, ``value``) and ``probabilities``.

    Of spans: ``answer``, the characters where it begins (``start``) and ends (``end``), null where there is none, and
    ``score``, its probability as that of its first unit times that of its last.

    The labels of a multi-label task are those above the model's thresholds, one half where it has none.
    """
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UsageError(f"--output: {output} is no file in a folder that exists")
    asked = yaml_strict.read(folder.recipe)
    trained = asked.get("data") if isinstance(asked, dict) else None
    if isinstance(trained, dict) and (trained.get("text_pair") is None) != (text_pair is None):
        wants = "single texts; leave out --text-pair"
        if text_pair is None:
            columns = f"{trained.get('text')} and {trained['text_pair']}"
            wants = f"pairs of texts; add --text and --text-pair (there the columns {columns})"
        raise UsageError(f"{folder.name} was trained on {wants}")
    rows = list(read(file, text, text_pair, quotes))
    predictor = models.load_predictor(folder.model)
    about = models.read_settings(folder.model)
    assert about is not None, "every model of a run has been saved by one of ours"
    task = about["task"]
    kind = task["kind"]
    fitted = [task["thresholds"][name] for name in predictor.labels] if "thresholds" in task else None
    with ExitStack() as stack:
        target = stack.enter_context(replacing(output)) if output else None
        stream = stack.enter_context(target.open("w", encoding="utf-8")) if target else sys.stdout
        progress = stack.enter_context(track("predicting", len(rows), "documents"))
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            logits = predictor.logits(part)
            chances = probabilities(kind, logits)
            answers = thresholds.given(logits, fitted) if fitted else predictions(kind, logits)
            for (_, context), answer, chance in zip(part, answers, chances, strict=True):
                line = (
                    _found(context or "", answer, chance)
                    if kind == "span"
                    else _line(kind, predictor.labels, answer, chance)
                )
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            progress.advance(len(part))


def _found(context: str, answer: Any, chance: Any) -> dict[str, Any]:
    start, end = spans.place(context, answer) or (None, None)
    score = float(chance[answer[0], 0] * chance[answer[1], 1])
    text = "" if start is None else context[start:end]
    return {"answer": text, "start": start, "end": end, "score": round(score, 6)}


def _line(kind: str, labels: list[str], answer: Any, chance: Any) -> dict[str, Any]:
    if kind == "regression":
        return {"value": round(float(answer), 6)}
    scores = {name: round(float(p), 6) for name, p in zip(labels, chance, strict=True)}
    if kind == "multi_label":
        return {
            "labels": [name for name, yes in zip(labels, answer, strict=True) if yes],
            "probabilities": scores,
        }
    return {"label": labels[int(answer)], "probabilities": scores}
