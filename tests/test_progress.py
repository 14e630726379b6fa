from __future__ import annotations

import io

import pytest
from rich.console import Console

from distill import progress


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> str:
    """Return what a user sees of 3,000 tokens of which 1,500 were done already."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=terminal, width=120))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.track("caching", 3000, "tokens") as tracker:
        tracker.skip(1500)
        tracker.advance(1000, "loss 0.41")
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_progress_is_shown_in_its_unit_with_its_figures(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shown(monkeypatch, terminal)
    assert "caching" in found
    assert "2,500/3,000 tokens" in found
    assert "loss 0.41" in found


def test_what_is_said_cannot_paint_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, color_system=None))
    progress.say("label '\x1b[31mred\x9b2J\r\u202e' of zoë is new\nin 日本 [bold]")
    assert stream.getvalue() == "label '\\x1b[31mred\\x9b2J\\r\\u202e' of zoë is new\nin 日本 [bold]\n"


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_the_title_of_long_work_cannot_paint_the_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=terminal, width=120))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.track("logits of \x1b]0;mine\x07 [/x]", 10, "tokens") as tracker:
        tracker.advance(5)
    assert "logits of \\x1b]0;mine\\x07 [/x]" in stream.getvalue()
