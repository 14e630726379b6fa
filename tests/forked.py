"""Processes of their own that begin in a moment: a server imports the libraries once and forks a child for each.

A child is a true process: it is killed as one, has a memory of its own to limit, and locks of its own. Plain
Python, for tests and for soak.py.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "accelerate",
        "datasets",
        "mlflow",
        "distill.cli",
        "distill.show",
        "distill.stages",
        "distill.pretraining",
    ]
)


def start(
    work: Callable[..., object], *arguments: Any, output: Path | None = None, **environment: str
) -> BaseProcess:
    """Do some work in a child.

    Args:
        work: a function at the top of a module.
        arguments: of the work, to be pickled.
        output: where stdout and stderr go; nowhere where absent.
        environment: laid over this process's.
    """
    whole = dict(os.environ) | environment
    child = _CONTEXT.Process(target=_child, args=(work, arguments, output or Path(os.devnull), whole))
    child.start()
    return child


def _child(
    work: Callable[..., object], arguments: Sequence[Any], output: Path, environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    work(*arguments)


def distill(*arguments: str) -> None:
    """Run the true command line; to be started in a child."""
    from distill.__main__ import main

    sys.argv = ["distill", *arguments]
    main()


def job(ranks: int, *arguments: str, output: Path | None = None, **environment: str) -> list[BaseProcess]:
    """Start the command line on as many ranks, as torchrun does."""
    if ranks == 1:
        return [start(distill, *arguments, output=output, **environment)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    whole = environment | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    whole["LOCAL_WORLD_SIZE"] = str(ranks)
    return [
        start(distill, *arguments, output=output, **whole, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(ranks)
    ]
