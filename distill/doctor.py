"""What this machine has of what distill needs, and how to mend what is missing. Prints nothing.

Each check looks once, changes nothing, and gives up after three seconds where a network is asked.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from distill import hub, tracking
from distill.runs import runs_folder

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "scikit-learn", "mlflow")
_GIB = 1 << 30
_LEAST_DISK = 2.0
_LEAST_MEMORY = 2.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    """What to do about it; empty when it is ok."""


def _requirements() -> dict[str, str]:
    """Read the version bounds that the installed distill declares, by package name."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("distill") or []]
    return {each.name: str(each.specifier) for each in wanted if each.marker is None}


def _fits(version: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bounds).contains(version, prereleases=True)


def _python() -> Check:
    version, bounds = platform.python_version(), metadata.metadata("distill")["Requires-Python"]
    return Check("python", _fits(version, bounds), version, f"install Python {bounds} and distill in it")


def _package(name: str) -> Check:
    bounds = _requirements()[name]
    fix = f'pip install "{name}{bounds}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", fix)
    return Check(name, _fits(version, bounds), version, fix)


def _cpu_bf16() -> bool:
    """Ask whether the processor multiplies bf16 itself; torch has no public name for it."""
    import torch

    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_sve_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _devices() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return Check(
            "devices", False, f"torch cannot be loaded: {error}", "pip install --force-reinstall torch"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processor = f"{cores} processor cores ({torch.backends.cpu.get_cpu_capability()})"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        bf16 = torch.cuda.is_bf16_supported()
        found = ", ".join(names)
    elif torch.backends.mps.is_available():
        bf16, found = torch.backends.mps.is_macos_or_newer(14, 0), "Apple GPU (mps)"  # it came with macOS 14
    else:
        bf16, found = _cpu_bf16(), "no GPU"
    found = f"{found}; {processor}; bf16 {'in hardware' if bf16 else 'not in hardware'}"
    blind = shutil.which("nvidia-smi") is not None and not torch.cuda.is_available()
    fix = "torch does not see the NVIDIA GPU: install the CUDA build, https://pytorch.org/get-started/locally"
    return Check("devices", not blind, found, fix)


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total / _GIB, memory.available / _GIB
    fix = "close other programs, or lower train.tokens_per_batch of teacher and student with --set"
    return Check("memory", free >= _LEAST_MEMORY, f"{free:.1f} of {total:.1f} GiB free", fix)


def _nearest_folder(path: Path) -> Path:
    """Return the folder itself, or the one above it in which it would be made."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _disk() -> Check:
    free = shutil.disk_usage(_nearest_folder(runs_folder())).free / _GIB
    fix = f"free {_LEAST_DISK:.0f} GiB, or set DISTILL_RUNS to a folder on another disk"
    return Check("disk", free >= _LEAST_DISK, f"{free:.1f} GiB free for {runs_folder()}", fix)


def _runs() -> Check:
    folder = runs_folder()
    try:
        with tempfile.TemporaryFile(dir=_nearest_folder(folder)):
            pass
    except OSError as error:
        fix = "set DISTILL_RUNS to a folder that you may write in"
        return Check("runs folder", False, f"{folder}: {error.strerror}", fix)
    return Check("runs folder", True, f"{folder}{'' if folder.exists() else ' (will be made)'}")


def _trouble(url: str) -> str | None:
    """Say what keeps a server from serving, None when it answers for itself."""
    try:
        status = hub.status(url)
    except ConnectionError as error:
        return str(error)
    # Below 500 a server has understood and declined; above, or 407, a gateway speaks in its place.
    return f"HTTP {status}" if status >= 500 or status == 407 else None


def _tracker() -> Check:
    where, file = tracking.uri(), tracking.sqlite_file(tracking.uri())
    shown = str(file) if file else tracking.public(where)
    fix = "set MLFLOW_TRACKING_URI to a server that answers, or unset it; training goes on without one"
    trouble: str | None = None
    if where.startswith(("http://", "https://")):
        trouble = _trouble(tracking.public(where).rstrip("/") + "/health")
    elif file is None or file.parent.exists():
        try:
            tracking.probe(where)
        except PermissionError as error:
            trouble = str(error)
            fix = f"make {file} writable for you, or set MLFLOW_TRACKING_URI"
        except OSError as error:
            trouble = str(error)
            fix = f"move {file} away and run `distill sync`: every journal is sent anew" if file else fix
    if trouble:
        return Check("tracker", False, f"{shown}: {trouble}", fix)
    return Check("tracker", True, f"{shown} (will be made)" if file and not file.exists() else shown)


def _hub() -> Check:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Check("hub", True, "not asked: HF_HUB_OFFLINE is set")
    trouble = _trouble(constants.ENDPOINT)
    fix = (
        "local folders, package:// and already fetched checkpoints work; to fetch others: set HTTPS_PROXY, "
        "or `hf download ID` elsewhere and point --set teacher.checkpoint=FOLDER to it"
    )
    return Check("hub", trouble is None, f"{constants.ENDPOINT}{f': {trouble}' if trouble else ''}", fix)


def checks() -> list[Check]:
    """Look at everything, in the order in which it should be mended."""
    rest: list[Callable[[], Check]] = [_devices, _memory, _disk, _runs, _tracker, _hub]
    found = [_python(), *(_package(name) for name in PACKAGES), *(look() for look in rest)]
    return [replace(check, fix="") if check.ok else check for check in found]
