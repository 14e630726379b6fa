"""``--processes N``: this very command again, N times, as one job on this machine. Knows nothing of what they do.

The processes are started by that part of torchrun which starts processes, and find each other as they do under
torchrun. Its agent is left out: it forgets the exit codes of those that were asked to stop.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import tempfile
from types import FrameType
from typing import Any

from distill import processes
from distill.errors import Interrupted, UsageError
from distill.progress import say

LOOPBACK = "127.0.0.1"


def launch(wished: int | None, *, sharded: bool = False) -> None:
    """Start the job's processes and end with their exit code; return where this is one of them, or the only one.

    Args:
        wished: ``--processes``; None: those that a launcher has started, or this one.
        sharded: the work can be done by a model that is cut up among them.

    Raises:
        UsageError: a launcher has started another number, or asks for what cannot be done.
        SystemExit: the job has ended.
    """
    _refuse_settings(sharded)
    _refuse_lone_process()
    if wished is None or wished == processes.count():
        return
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            f"--processes {wished}: this job was started with {processes.count()}, by a launcher; leave --processes out"
        )
    processes.timeout()  # what is wrong with it is told once, and now
    sys.exit(run(wished, sys.orig_argv[1:]))


def _refuse_settings(sharded: bool) -> None:
    """Refuse what Accelerate would do by its configuration to a loop that knows nothing of it.

    Raises:
        UsageError: weights are to be cut up where they cannot be, or gradients to be divided once more.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UsageError(
                f"accelerate's {name.lower()} keeps parts of weights that no checkpoint here could gather; "
                "take FSDP2 (docs/examples/fsdp2.yaml)"
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if not sharded:
            raise UsageError(
                "FSDP is for distill teacher: here take the configuration out, and add --processes or take torchrun"
            )
        if os.environ.get("FSDP_VERSION") != "2":
            raise UsageError("FSDP 1 is not known here: fsdp_version: 2 (docs/examples/fsdp2.yaml)")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UsageError(
            f"accelerate's gradient_accumulation_steps is {steps}, and would divide the gradients: leave it at 1; "
            "train.batch_size is of a whole step, and train.tokens_per_batch cuts it up"
        )


def _refuse_lone_process() -> None:
    """Refuse to work alone where ``accelerate launch`` was asked for several: on CPUs it starts one, silently.

    Raises:
        UsageError: so it is.
    """
    if "ACCELERATE_USE_CPU" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    import psutil

    launcher = psutil.Process().parent()
    asked = re.search(r"--num[_-]processes[= ](\d+)", " ".join(launcher.cmdline() if launcher else []))
    if asked is not None and int(asked[1]) > 1:
        raise UsageError(
            f"accelerate launch was asked for {asked[1]} processes and starts one, as it does on CPUs; "
            f"leave it out and add --processes {asked[1]}, or take torchrun"
        )


def meeting_place() -> Any:
    """Serve torch's store, in which the processes find each other, to this machine alone: by itself it serves all."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    server = socket.create_server((LOOPBACK, 0))
    port = server.getsockname()[1]
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())


def run(count: int, command: list[str]) -> int:
    """Run a command of this interpreter in several processes, until all have ended.

    Ctrl-C and SIGTERM are passed on, and a checkpoint is waited for, however long it takes. A second time the
    processes end at once; a third time they are killed.

    Args:
        count: how many.
        command: the interpreter's arguments.

    Returns:
        The exit code of a process that failed by itself; 75 where they were stopped, or killed; 0 where all went well.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    if "--debug" not in command:
        logging.disable(logging.CRITICAL)  # torchrun's own view of what the processes tell themselves
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    store = meeting_place()
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # this one, which does not go with the first process
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count))),
    }
    environments = {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)}
    signals = 0
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        ranks = start_processes(
            "distill", sys.executable, dict.fromkeys(range(count), tuple(command)), environments,
            DefaultLogsSpecs(folder),
        )  # fmt: skip

        def pass_on(number: int, frame: FrameType | None) -> None:
            nonlocal signals
            signals += 1
            for process in ranks.pids().values():
                try:
                    os.kill(process, signal.SIGTERM if signals < 3 else signal.SIGKILL)
                except ProcessLookupError:
                    continue

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, pass_on)
        result = ranks.wait(period=0.1)
    assert result is not None  # it waits for ever
    codes = [failure.exitcode for failure in result.failures.values()]
    own = [code for code in codes if code > 0]
    if codes and not own:
        say("distill: every process was killed; what was trained is kept: start the job again with --resume")
    # 75 is what the others end with when one has failed.
    return next(
        (code for code in own if code != Interrupted.exit_code), Interrupted.exit_code if codes else 0
    )
