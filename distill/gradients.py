"""How hard each term of an objective pulls: the norm of its own gradient in one step. Knows no term and no model.

The gradients are taken through the graph that the training step has built: dropout is the same, and their
weighted sum is the step's gradient before clipping. ``.grad`` is not touched. They are not scaled as Accelerate
scales a loss in fp16, so that there the smallest may round to 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TermGradients:
    """Gradients of single terms by all trained weights, summed over a step's micro-batches.

    Args:
        model: the bare model, not wrapped for several processes.
        terms: how many terms there are.
    """

    def __init__(self, model: torch.nn.Module, terms: int) -> None:
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._sums: list[list[Tensor]] = [[torch.zeros_like(p) for p in self._weights] for _ in range(terms)]

    def add(self, number: int, value: Tensor) -> None:
        """Add the gradient of a term's share in one micro-batch; the graph is kept for the step's own pass."""
        found = torch.autograd.grad(value, self._weights, retain_graph=True, allow_unused=True)
        for total, gradient in zip(self._sums[number], found, strict=True):
            if gradient is not None:
                total += gradient

    def norms(self, accelerator: Any) -> list[float]:
        """Return each term's Euclidean norm, its gradient summed over all processes first."""
        if accelerator.num_processes > 1:
            self._sums = accelerator.reduce(self._sums, "sum")
        return [float(torch.stack([g.norm() for g in term]).norm()) for term in self._sums]
