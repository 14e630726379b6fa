"""Models whose weights, gradients and moments are cut up among processes: FSDP2, by Accelerate's configuration.

Accelerate cuts and gathers; this module makes whole tensors of the parts for a checkpoint, makes parts of whole ones, and
lets all processes make as many passes, for in each of them every process gives its parts to the others. All functions are
for every process at once. Where nothing is cut up they do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.errors import UsageError


def is_on(accelerator: Any) -> bool:
    """Say whether Accelerate cuts models up."""
    return bool(accelerator.is_fsdp2)


def check(accelerator: Any, engine: str, norms: bool) -> None:
    """Refuse what cannot be trained in parts.

    Args:
        accelerator: Accelerate's.
        engine: of the model.
        norms: the norm of each term's gradient is to be logged.

    Raises:
        UsageError: it is so, or layers are cut up one by one and their insides are called one by one; or Accelerate
            was asked to cut the model up, and does not.
    """
    if not is_on(accelerator):
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise UsageError(
                "FSDP was asked for, and Accelerate leaves it out on CPUs: add --processes in its place"
            )
        return
    if norms:
        raise UsageError(
            "train.log_gradient_norms: under FSDP2 there is no gradient of one term; set it to false"
        )
    if engine != "stock" and os.environ.get("FSDP_AUTO_WRAP_POLICY") != "NO_WRAP":
        raise UsageError(
            "FSDP2 layer by layer needs transformers' own forward pass: --set teacher.engine=stock, or "
            "fsdp_auto_wrap_policy: NO_WRAP in accelerate's configuration (docs/scale.md)"
        )


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut a tensor up as another one is; all processes have it whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather a model's weights, on the CPU of every process."""
    return {name: whole(weight.detach()).cpu().clone() for name, weight in model.state_dict().items()}


def load(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Put whole weights into a model."""
    own = model.state_dict()
    model.load_state_dict({name: part(weight, own[name]) for name, weight in found.items()})


def even_out(accelerator: Any, passes: int, blank: Callable[[], object]) -> None:
    """Make blank passes, so that this process makes as many as the one that makes most; before its own.

    Args:
        accelerator: Accelerate's.
        passes: what this process will make.
        blank: makes a pass that changes nothing.
    """
    if is_on(accelerator):
        most = int(accelerator.gather(torch.tensor([passes], device=accelerator.device)).max())
        for _ in range(most - passes):
            blank()
