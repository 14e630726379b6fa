"""What a person sees on the terminal is what the data says, and nothing that the data does to the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from distill import show
from distill.fitting import Plan
from distill.planning import Cost


def test_labels_are_shown_as_they_are_written_and_cannot_paint(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(show, "out", Console(file=stream, width=160, force_terminal=True, color_system=None))
    split = {"rows": 3, "labels": {"\x1b[2Jgood": 2, "[/bad]": 1}, "tokens": {5: 1}, "truncated": 0.0}
    show.plan(Plan("teacher bert", {"train": split}, Cost(1, 2, 3.0, 4, 5, 6), ["label '\x9b31m' is rare"]))
    assert "\\x1b[2Jgood 2, [/bad] 1" in stream.getvalue()
    assert "label '\\x9b31m' is rare" in stream.getvalue()
