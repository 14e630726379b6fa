"""What long work shows: a bar with rate and time left on a terminal, plain lines elsewhere, on rank 0 only.

Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from distill.processes import is_main

console = Console(stderr=True, highlight=False)
out = Console(highlight=False)
SECONDS_BETWEEN_LINES = 10.0


def say(message: str) -> None:
    """Tell the user one thing, on standard error."""
    if is_main():
        console.print(message, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Write seconds as people do: ``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Tracker:
    """One piece of long work; :meth:`advance` is called as it goes."""

    def __init__(self, title: str, total: int, bar: Progress | None) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self._bar = bar
        self._task = bar.add_task(title, total=total, rate="", figures="") if bar else None
        self._began = self._last = time.monotonic()
        self._start = 0

    def skip(self, done: int) -> None:
        """Begin at ``done``, as a resumed run does; the rate counts from there."""
        self.done = self._start = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def advance(self, count: int = 1, figures: str = "") -> None:
        """Count work as done, and show it.

        Args:
            count: how much.
            figures: what else is worth seeing, as in ``"loss 0.41"``.
        """
        self.done += count
        now = time.monotonic()
        rate = (self.done - self._start) / max(now - self._began, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{rate:,.1f}/s", figures=figures)
        elif is_main() and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            left = duration((self.total - self.done) / rate) if rate else "?"
            more = f", {figures}" if figures else ""
            say(f"{self.title}: {self.done:,}/{self.total:,}, {rate:,.1f}/s, {left} left{more}")


@contextmanager
def track(title: str, total: int) -> Iterator[Tracker]:
    """Show the progress of the block's work."""
    if not (console.is_terminal and is_main()):
        yield Tracker(title, total, None)
        return
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        yield Tracker(title, total, bar)
