"""Several processes of one job without the command line: forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from torch.distributed import TCPStore  # type: ignore[attr-defined]

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "distill.fitting",
        "accelerate",
        "transformers.models.bert.modeling_bert",
        "distill.pretraining",
        "datasets",
    ]
)


def _work(answer: Connection, environment: Mapping[str, str], work: Callable[..., Any], given: Any) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        found = work(*given)
    except Exception as error:
        found = error
    answer.send_bytes(
        pickle.dumps(found)
    )  # plain bytes: a tensor would be shared with a process that has gone
    os._exit(0)  # an open group makes the interpreter's end a race


def together(
    world: int, work: Callable[..., Any], *given: Any, hanging: int = 0, **environment: str
) -> list[Any]:
    """Do some work in each process of a job.

    Args:
        world: how many processes.
        work: a function of a module.
        given: to it.
        hanging: so many will never answer, and are killed once the others have.
        environment: of all.

    Returns:
        What each returned, or raised, in the order of their ranks; None where it died.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": "", **environment,
    }  # fmt: skip
    started = []
    for rank in range(world):
        ours, theirs = _FORKS.Pipe(duplex=False)
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _FORKS.Process(target=_work, args=(theirs, own, work, given))
        process.start()
        theirs.close()
        started.append((process, ours))
    answers: list[Any] = [None] * world
    waiting = {ours: rank for rank, (_, ours) in enumerate(started)}
    try:
        while len(waiting) > hanging:
            ready = wait(list(waiting), 120)
            assert ready, "they are silent"
            for ours in cast(list[Connection], ready):
                with suppress(EOFError):  # it died
                    answers[waiting[ours]] = pickle.loads(ours.recv_bytes())  # noqa: S301 - our own
                del waiting[ours]
    finally:
        for process, _ in started:
            process.kill()
            process.join()
    return answers
