"""Several processes of one job: who speaks, what all agree on, when all are there. One process is the usual case."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from distill.errors import UsageError

T = TypeVar("T")


def count() -> int:
    """Return how many processes this job was started with (torchrun and accelerate say it in the environment)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Say whether this process is the one that talks and writes run folders."""
    return os.environ.get("RANK", "0") == "0"


def agree(value: T) -> T:
    """Give every process the main one's value."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    box: list[Any] = [value]
    broadcast_object_list(box)
    result: T = box[0]
    return result


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        _state().wait_for_everyone()


def leave() -> None:
    """Leave the job in good order: a group that is still open makes the interpreter's end a race of its threads."""
    if count() > 1:
        wait()
        _state().destroy_process_group()


def _state() -> Any:
    """Return Accelerate's view of the job; without ``cpu`` it overlooks other processes on CPUs."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def check(accelerator: Any) -> None:
    """Refuse to go on with another number of processes than were started: it would train something else.

    Raises:
        UsageError: Accelerate sees fewer or more of them.
    """
    if accelerator.num_processes != count():
        raise UsageError(f"{count()} processes were started, and Accelerate sees {accelerator.num_processes}")
