"""JSON files of ours, read back and not believed: somebody may have edited them, or sent them. Knows no content.

What a file holds is a type of the module that writes it: a dataclass, a TypedDict, ``list[str]``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from distill.errors import DataError

MAX_BYTES = 1 << 26
"""Of a file; the largest of ours are vocabularies of a few MiB."""

T = TypeVar("T")


def read(path: Path, kind: type[T]) -> T:
    """Read a JSON file.

    Args:
        path: the file.
        kind: what it holds.

    Raises:
        DataError: it is not JSON, not of this shape, or larger or deeper than a file of ours can be.
        OSError: it cannot be opened.
    """
    where = f"{path.parent.name}/{path.name}"
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise DataError(f"{where}: larger than {MAX_BYTES >> 20} MiB; distill did not write it")
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise DataError(f"{where}: damaged: {explain(error)}") from None


def check(value: Any, kind: type[T], where: str) -> T:
    """Take a value that stood in such a file as a value of a type.

    Raises:
        DataError: it is not of this shape; ``where`` says what.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise DataError(f"{where}: damaged: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Say in one line what is wrong first."""
    first = error.errors(include_url=False, include_input=False)[0]
    at = ".".join(str(part) for part in first["loc"])
    message = first["msg"].replace("Input should be", "must be").replace("Field required", "is missing")
    return " ".join(f"{at:.80}: {message:.120}".removeprefix(": ").split())
