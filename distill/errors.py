"""Everything that can go wrong by a user's hand or a machine's, with the exit code that it ends in.

    DistillError               1
    ├── UsageError             2   an option, a run or a file name on the command line
    ├── RecipeError            3   a recipe: unreadable, unknown key, wrong type, parts that don't fit
    ├── DataError              4   the user's data
    │   ├── HubError           4   a checkpoint or data set that is not on this machine
    │   └── LogitsError        4   cached logits that are damaged, or of another teacher or data
    ├── OutOfMemory            5
    ├── Diverged               6   the loss is not a number
    └── Interrupted           75   stopped from outside; `--resume` goes on from there
        └── Lost              75   another process of the job died or hangs

A message is one line: what is wrong, where, the nearest right name, and how to mend it. A bug of our
own is an ``assert`` or any other exception, and is not in this tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistillError(Exception):
    """Base of every error that is reported in one line, without a traceback."""

    exit_code = 1


class UsageError(DistillError):
    """A wrong option, run or file name on the command line."""

    exit_code = 2


class RecipeError(DistillError):
    """A recipe that cannot be read, or that asks for what does not exist."""

    exit_code = 3


class DataError(DistillError):
    """Data that is missing, unreadable or not what the recipe says."""

    exit_code = 4


class HubError(DataError):
    """A checkpoint or data set that is neither on this machine nor reachable."""


class LogitsError(DataError):
    """Cached logits that are damaged, or that belong to something else."""


class OutOfMemory(DistillError):
    """The machine or the GPU has no memory left."""

    exit_code = 5


class Diverged(DistillError):
    """The training loss is no longer a finite number."""

    exit_code = 6


class Interrupted(DistillError):
    """The work was stopped from outside and can be resumed."""

    exit_code = 75


class Lost(Interrupted):
    """Another process of the job died or does not answer; what was trained is kept."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Say which known name is meant: ``"; did you mean 'x'?"``, or the list where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f" (there are: {', '.join(names)})" if names else ""
