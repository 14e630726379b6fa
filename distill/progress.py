"""What long work shows: a bar with rate and time left on a terminal, plain lines elsewhere, on rank 0 only.

Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from distill.processes import is_main

console = Console(stderr=True, highlight=False)
out = Console(highlight=False)
SECONDS_BETWEEN_LINES = 10.0
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def harmless(text: str) -> str:
    r"""Write out control characters, as ``\x1b``: a label or a file's name must not move the cursor or paint.

    Marks of direction and lone surrogates, which no terminal can be sent, are among them.
    """
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def say(message: str) -> None:
    """Tell the user one thing, on standard error."""
    if is_main():
        tell(message)


def tell(message: str) -> None:
    """Tell the user one thing from this process, whichever of the job's it is."""
    console.print(harmless(message), markup=False, soft_wrap=True)


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

    def __init__(self, title: str, total: int, unit: str, bar: Progress | None) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self._bar = bar
        self._task = (
            bar.add_task(harmless(title), total=total, count=self._count, rate="", figures="")
            if bar
            else None
        )
        self._began = self._last = time.monotonic()
        self._start = 0

    @property
    def _count(self) -> str:
        return f"{self.done:,}/{self.total:,} {self.unit}"

    def skip(self, done: int) -> None:
        """Begin at ``done``, as a resumed run does; the rate counts from there."""
        self.done = self._start = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, count=self._count)

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
            self._bar.update(
                self._task, completed=self.done, count=self._count, rate=f"{rate:,.1f}/s", figures=figures
            )
        elif is_main() and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            left = duration((self.total - self.done) / rate) if rate else "?"
            more = f", {figures}" if figures else ""
            say(f"{self.title}: {self._count}, {rate:,.1f}/s, {left} left{more}")


@contextmanager
def track(title: str, total: int, unit: str) -> Iterator[Tracker]:
    """Show the progress of the block's work.

    Args:
        title: what is done.
        total: how much of it there is.
        unit: of ``total``, as in ``"documents"``; pieces of one unit should take like times, for the time
            left is reckoned from it.
    """
    if not (console.is_terminal and is_main()):
        yield Tracker(title, total, unit, None)
        return
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=None),
        TextColumn("{task.fields[count]}"), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        yield Tracker(title, total, unit, bar)
