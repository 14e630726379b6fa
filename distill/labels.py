"""Labels: from a column of names, numbers, lists or zeros and ones to arrays of numbers. Knows no text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import spans
from distill.errors import DataError, nearest
from distill.schema import Data, Task
from distill.tasks import Array

if TYPE_CHECKING:
    import datasets

MAX_CLASSES = 10_000
"""More names than this in a column are not classes but texts or numbers."""
MISSING = "the label is missing; fill it in, or leave the row out with data.where"


@dataclass(frozen=True)
class Labels:
    """How a source's label columns are read."""

    names: tuple[str, ...]
    task: Task
    data: Data

    def numbers(self, dataset: datasets.Dataset, index: Array, where: str) -> Array:
        """Read the labels of some rows.

        Args:
            dataset: with the label's columns.
            index: ``(n,)`` the rows.
            where: the source split's name, for messages.

        Returns:
            ``(n,)`` int64 class numbers, ``(n, classes)`` float32 of 0 and 1, ``(n,)`` float32, or ``(n, 2)`` int64
            units of the first of a row's answers.

        Raises:
            DataError: a label that is missing, not a number where one is needed, or out of range; an answer
                that does not stand in its context.
        """
        if self.task.kind == "span":
            return self._answers(dataset, index, where)
        columns = self.data.label if isinstance(self.data.label, list) else [self.data.label]
        part = dataset.select_columns(columns).select(index)
        values = [part[column][:] for column in columns]

        def at(position: int) -> str:
            return f"{where}, row {int(index[position]) + 1}"

        if self.task.kind == "regression":
            return np.array([_number(v, at, i) for i, v in enumerate(values[0])], dtype=np.float32)
        if self.task.kind == "single_label":
            return np.array([self._class(v, at, i) for i, v in enumerate(values[0])], dtype=np.int64)
        if isinstance(self.data.label, list):
            flags = [
                [_flag(v, f"{at(i)}, {c}") for i, v in enumerate(vs)]
                for c, vs in zip(columns, values, strict=True)
            ]
            return np.array(flags, dtype=np.float32).T.copy()
        result = np.zeros((len(index), len(self.names)), dtype=np.float32)
        for i, value in enumerate(values[0]):
            for item in _items(value, self.data.label_separator):
                result[i, self._class(item, at, i)] = 1
        return result

    def _answers(self, dataset: datasets.Dataset, index: Array, where: str) -> Array:
        """Find the units of answers; ``_kept`` has seen to the contexts."""
        assert isinstance(self.data.label, str)
        assert self.data.text_pair is not None
        part = dataset.select_columns([self.data.label, self.data.text_pair]).select(index)
        rows = zip(index, part[self.data.label], part[self.data.text_pair], strict=True)
        found = [_span(cell, str(context), f"{where}, row {int(row) + 1}") for row, cell, context in rows]
        return np.array(found, dtype=np.int64)

    def _class(self, value: Any, at: Any, position: int) -> int:
        """Turn a class's name or number into its number."""
        if isinstance(value, str) and value.strip() in self.names:
            return self.names.index(value.strip())
        if _is_missing(value):
            raise DataError(f"{at(position)}: {MISSING}")
        number = _flagged(value) if len(self.names) == 2 else _integer(value)
        if number is None:
            raise DataError(f"{at(position)}: label {value!r:.60} is no class{nearest(value, self.names)}")
        if not 0 <= number < len(self.names):
            raise DataError(
                f"{at(position)}: label {number} is out of range; classes are 0 to {len(self.names) - 1}"
            )
        return number


def _integer(value: Any) -> int | None:
    """Read a whole number from an int, a bool, a whole float, or the text of a number (``1``, ``1.0``)."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return int(value) if isinstance(value, int) else None


def _flagged(value: Any) -> int | None:
    """Read a number, or the text of a truth value."""
    words = {"true": 1, "false": 0}
    return words.get(value.strip().lower(), _integer(value)) if isinstance(value, str) else _integer(value)


def _is_missing(value: Any) -> bool:
    """Say whether a cell is empty, null or NaN, however it is written."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(value: Any, at: Any, position: int) -> float:
    if _is_missing(value):
        raise DataError(f"{at(position)}: {MISSING}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{at(position)}: label {value!r:.60} is not a finite number")
    return number


def _flag(value: Any, where: str) -> int:
    number = _flagged(value)
    if number not in (0, 1):
        raise DataError(f"{where}: label {value!r:.60} must be 0 or 1")
    return number


def _items(value: Any, separator: str | None) -> list[Any]:
    """Split one cell of a multi-label column."""
    if value is None:
        return []
    if isinstance(value, str):
        return [item for item in value.split(separator or ",") if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _span(cell: Any, context: str, at: str) -> Array:
    """Check a cell's answers, and find the units of the first one; 0 twice where there is none."""
    if cell is None:
        raise DataError(f"{at}: the answers are missing; where there is none, leave the lists empty")
    texts, starts = (cell.get(key) if isinstance(cell, dict) else None for key in ("text", "answer_start"))
    if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
        raise DataError(
            f"{at}: {cell!r:.60} holds no answers; must be as {{'text': ['Paris'], 'answer_start': [12]}}, or empty lists"
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{at}: the answer {text!r:.60} has no text; where there is none, leave the lists empty"
            )
        if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
            where = context.find(text)
            fix = f"it first stands at {where}" if where >= 0 else "it stands nowhere in it"
            raise DataError(
                f"{at}: the answer {text!r:.60} is not at character {start} of its context; {fix} (counted from 0)"
            )
    if not texts:
        return np.zeros(2, np.int64)
    ends = [starts[0] + len(texts[0])]
    return np.asarray(spans.touched(spans.units(context), np.array(starts[:1]), np.array(ends))[0])


def _class_feature(feature: Any) -> list[str] | None:
    """Return the names of a ClassLabel column, or of a list of them."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return list(names) if names else None


def _found(values: dict[Any, str], column: str) -> list[str]:
    """Work out class names from the values that occur, each with the place where it was first seen."""
    numbers = {value: _integer(value) for value in values}
    whole = [number for number in numbers.values() if number is not None]
    if len(whole) == len(values):
        top = max(whole, default=-1)
        if top >= MAX_CLASSES:
            raise DataError(
                f"{column}: label {top} is no class number; for a number to predict set task.kind=regression"
            )
        return [str(n) for n in range(top + 1)]
    for value, where in values.items():
        if isinstance(value, float | list | dict) or (whole and numbers[value] is None):
            raise DataError(
                f"{where}: label {value!r:.60} is no class number; name the classes in task.labels, "
                "or for a number to predict set task.kind=regression"
            )
    names = sorted({str(value).strip() for value in values})
    if len(names) > MAX_CLASSES:
        raise DataError(f"{column}: {len(names):,} different labels; is this the label's column?")
    return names


def _occurring(labelled: dict[str, tuple[datasets.Dataset, Array]], data: Data, task: Task) -> dict[Any, str]:
    """Collect the different labels of the rows that are kept, each with the place where it is first seen."""
    assert isinstance(data.label, str)
    values: dict[Any, str] = {}
    for source, (dataset, index) in labelled.items():
        part = dataset.select_columns([data.label]).select(index)
        for start in range(0, len(index), 10_000):
            for i, cell in enumerate(part[start : start + 10_000][data.label], start=start):
                items = _items(cell, data.label_separator) if task.kind == "multi_label" else [cell]
                for value in items:
                    if isinstance(value, list | dict) or (task.kind != "multi_label" and _is_missing(value)):
                        why = (
                            MISSING
                            if _is_missing(value)
                            else f"label {value!r:.60} is no class; several labels need task.kind=multi_label"
                        )
                        raise DataError(f"{source}, row {int(index[i]) + 1}: {why}")
                    values.setdefault(value, f"{source}, row {int(index[i]) + 1}")
    return values


def read_labels(labelled: dict[str, tuple[datasets.Dataset, Array]], data: Data, task: Task) -> Labels:
    """Find the class names: the recipe's, the data set's own, or those that occur.

    Args:
        labelled: by the source split's name, its data set and the rows ``(n,)`` that are kept.
        data: the recipe's section.
        task: the recipe's section.

    Raises:
        DataError: the column holds no classes.
    """
    first, _ = next(iter(labelled.values()))
    if isinstance(data.label, list):
        names = task.labels or data.label
        if len(names) != len(data.label):
            raise DataError(f"task.labels has {len(names)} names, data.label has {len(data.label)} columns")
        return Labels(tuple(names), task, data)
    if task.kind == "regression":
        return Labels((data.label,), task, data)
    if task.kind == "span":
        return Labels(("start", "end"), task, data)
    names = task.labels or _class_feature(first.features[data.label]) or []
    if not names:
        names = _found(_occurring(labelled, data, task), data.label)
        joined = [name for name in names if set(name) & set(';|[]"')] if task.kind == "multi_label" else []
        if joined and data.label_separator is None:
            raise DataError(
                f"column {data.label!r}: label {joined[0]!r:.60} looks like several; set data.label_separator, as ';', or "
                "name the classes in task.labels"
            )
    if len(names) < 2:
        only = f": {names[0]!r}" if names else ""
        raise DataError(f"column {data.label!r} has one class only{only}; there is nothing to learn")
    return Labels(tuple(names), task, data)
