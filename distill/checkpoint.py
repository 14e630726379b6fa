"""Checkpoints: complete or absent, hashed, and all that a run needs to go on to the same bits.

Rank 0 writes ``<step>.tmp``, syncs, hashes, renames; then older ones go. Tensors are safetensors; nothing
is ever unpickled. A random state is not needed: every step is seeded from (seed, step, rank).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import records, sharding
from distill.errors import DataError
from distill.files import replacing_folder, sha256_file, write_json
from distill.processes import is_main
from distill.sharding import whole

MANIFEST = "manifest.json"
NEEDED = {"model.safetensors", "optimizer.safetensors", "state.json"}


@dataclass
class TrainState:
    """Where a training run stands."""

    step: int = 0
    """Optimizer steps done."""
    best: float | None = None
    """The best validation figure so far."""
    best_step: int = 0
    since_best: int = 0
    """Evaluations since then."""
    seconds: float = 0.0
    """Time spent, over all its starts."""
    tokens: int = 0
    meaning: dict[str, Any] = field(default_factory=dict)
    """What must be equal for a resume: recipe, data, initial weights, processes."""


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{at}.{name}": whole(torch.as_tensor(value)).cpu()
        for at, slots in state.items()
        for name, value in slots.items()
    }


def save(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor] | None,
    state: TrainState,
) -> Path:
    """Write a checkpoint, then remove the older ones; every process is here where the model is cut up.

    Args:
        folder: of all checkpoints of the run.
        model: the bare model, not wrapped for several processes.
        optimizer: its moments are kept.
        best: weights of the best evaluation so far.
        state: where the run stands.

    Returns:
        The checkpoint's folder.
    """
    target = folder / f"step-{state.step:09d}"
    weights, moments = sharding.weights(model), _flat_optimizer(optimizer)
    if not is_main():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_folder(target) as aside:
        save_file({n: t.contiguous() for n, t in weights.items()}, aside / "model.safetensors")
        save_file(moments, aside / "optimizer.safetensors")
        if best is not None:
            save_file({n: t.contiguous().clone() for n, t in best.items()}, aside / "best.safetensors")
        write_json(aside / "state.json", asdict(state))
        hashes = {file.name: sha256_file(file) for file in sorted(aside.iterdir())}
        write_json(aside / MANIFEST, hashes)
    # Older ones, and what a killed process left half written.
    for other in [*folder.glob("step-*"), *folder.glob(".step-*")]:
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def _holds(path: Path) -> bool:
    """Say whether every file that there must be is there, as the manifest says."""
    try:
        hashes = records.read(path / MANIFEST, dict[str, str])
    except (OSError, DataError):
        return False
    return set(hashes) >= NEEDED and all(
        Path(name).name == name and (path / name).is_file() and sha256_file(path / name) == sha
        for name, sha in hashes.items()
    )


def latest(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole; None where there is none at all.

    Raises:
        DataError: there are checkpoints, and each is damaged. To begin anew is the user's choice: it
            throws away what was trained.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    whole = next((path for path in found if _holds(path)), None)
    if found and whole is None:
        raise DataError(
            f"{folder.parent.name}: checkpoint {found[0].name} is damaged (its hashes differ); "
            f"put {found[0]} back from a copy, or delete {folder} to train from the beginning"
        )
    return whole


def _difference(was: Any, now: Any) -> str:
    """Tell two values apart; of long texts, such as recipes, the first line that differs."""
    pairs = zip_longest(str(was).splitlines(), str(now).splitlines(), fillvalue="absent")
    old, new = next(((a.strip(), b.strip()) for a, b in pairs if a != b), (was, now))
    return f"was {old!s:.80}, and is {new!s:.80} now"


def load(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    meaning: dict[str, Any],
    *,
    any_processes: bool = False,
) -> tuple[TrainState, dict[str, Tensor] | None]:
    """Read a checkpoint into a model and an optimizer.

    Args:
        path: what :func:`latest` found.
        model: of the same shape.
        optimizer: over the same parameters.
        meaning: what must be equal (see TrainState).
        any_processes: their number need not be.

    Returns:
        Where the run stands, and the weights of its best evaluation.

    Raises:
        DataError: recipe, data, initial weights or processes are others now; the difference is told. Or the
            tensors are not those of this model and optimizer.
    """
    state = records.read(path / "state.json", TrainState)
    for key, was in state.meaning.items():
        if meaning.get(key) != was and not (any_processes and key == "processes"):
            hint = "; --any-processes allows that" if key == "processes" else ""
            raise DataError(
                f"{path.parent.parent.name}: cannot be resumed: {key} {_difference(was, meaning.get(key))}{hint}"
            )
    state.meaning = meaning
    best = path / "best.safetensors"
    try:
        sharding.load(model, load_file(path / "model.safetensors"))
        optimizer.load_state_dict(_optimizer_state(path / "optimizer.safetensors", optimizer))
        return state, load_file(best) if best.exists() else None
    except (RuntimeError, ValueError, LookupError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{path.parent.parent.name}: checkpoint {path.name} is not of this model: {reason}"
        ) from None


def _optimizer_state(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read what :func:`_flat_optimizer` made: a number, or a tensor of its parameter's shape, under each name."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(path).items():
        at, _, slot = name.partition(".")
        if value.ndim and value.shape != parameters[int(at)].shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}")
        slots.setdefault(int(at), {})[slot] = sharding.part(value, parameters[int(at)])
    return {"state": slots, "param_groups": optimizer.state_dict()["param_groups"]}
