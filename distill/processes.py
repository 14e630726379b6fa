"""Several processes of one job: who speaks, what all agree on, when all are there. One process is the usual case."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import DistillError, Interrupted, Lost, UsageError

T = TypeVar("T")

SECONDS = 1800.0
"""How long a process waits for the others where ``$DISTILL_TIMEOUT`` says nothing, as torch's own do."""


def count() -> int:
    """Return how many processes this job was started with (torchrun and accelerate say it in the environment)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Say whether this process is the one that talks and writes run folders."""
    return os.environ.get("RANK", "0") == "0"


def timeout() -> timedelta:
    """Return how long a process waits for the others before it takes them for lost: ``$DISTILL_TIMEOUT``, in seconds.

    Raises:
        UsageError: it is no positive number.
    """
    text = os.environ.get("DISTILL_TIMEOUT", str(SECONDS))
    with suppress(ValueError, OverflowError):
        if float(text) > 0:
            return timedelta(seconds=float(text))
    raise UsageError(f"DISTILL_TIMEOUT: must be a number of seconds above 0, and is {text!r}")


def agree(value: T) -> T:
    """Give every process the main one's value."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    state()
    box: list[Any] = [value]
    broadcast_object_list(box)
    result: T = box[0]
    return result


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        state().wait_for_everyone()


def leave() -> None:
    """Leave the job in good order: a group that is still open makes the interpreter's end a race of its threads."""
    if count() > 1:
        wait()
        state().destroy_process_group()


def state() -> Any:
    """Join the job, and return Accelerate's view of it; without ``cpu`` it overlooks other processes on CPUs."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=timeout())


def check(accelerator: Any) -> None:
    """Refuse to go on with another number of processes than were started: it would train something else.

    Raises:
        UsageError: Accelerate sees fewer or more of them.
    """
    if accelerator.num_processes != count():
        raise UsageError(f"{count()} processes were started, and Accelerate sees {accelerator.num_processes}")


def speaks() -> bool:
    """Claim the word for an error: of the processes of a machine that fail together, the first to ask gets it.

    The main one may be the one that died, so that it cannot be asked. torchrun, and Accelerate through it, gives each
    process a folder of its own for errors; the one above is theirs together.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if count() == 1 or not own:
        return is_main()
    try:
        (Path(own).parents[1] / "said").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return is_main()
    return True


def loss(error: BaseException) -> Lost | None:
    """Recognise that another process has died or hangs, by what an exception is or came in the middle of."""
    if count() == 1 or "torch" not in sys.modules:
        return None
    from torch.distributed import DistError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DistillError):
            return cause if isinstance(cause, Lost) else None
        if isinstance(cause, DistError) or (isinstance(cause, RuntimeError) and "gloo" in str(cause).lower()):
            return Lost(
                f"another process of this job died, or did not answer for {timeout().total_seconds():g} s "
                "(DISTILL_TIMEOUT); what was trained is kept: start the job again with --resume"
            )
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def noticing_loss() -> Iterator[None]:
    """Turn the loss of another process into one line; who leaves for it, or was asked to leave, is asked no more.

    A launcher ends the others as soon as one has left, and each may still have something to write down.
    """
    try:
        yield
    except Exception as error:
        short = loss(error)
        if count() > 1 and (short is not None or isinstance(error, Interrupted)):
            deaf()
        if short is None or short is error:
            raise
        raise short from error


def deaf() -> None:
    """Hear no more of SIGTERM: this process is leaving as it is."""
    with suppress(ValueError):  # not the main thread: signals are somebody else's
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
