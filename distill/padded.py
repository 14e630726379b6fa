"""The bridge from packed batches to transformers' stock forward: windows are padded here and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distill.batching import Batch


def pad(values: Tensor, windows: Tensor, width: int, fill: int = 0) -> Tensor:
    """Lay packed values out as a rectangle.

    Args:
        values: ``(tokens,)``.
        windows: ``(windows + 1,)``, where each begins.
        width: tokens of a row; at least the longest window.
        fill: what stands in the padding.

    Returns:
        ``(windows, width)``.
    """
    import torch

    lengths = windows.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    columns = torch.arange(len(values), device=values.device) - windows[rows]
    result = values.new_full((len(lengths), width), fill)
    result[rows, columns] = values
    return result


def filled(batch: Batch, width: int, fill: int) -> Batch:
    """Put padding tokens behind each window, up to ``width`` tokens: for models that read them as text."""
    import torch

    ids, segments = (
        pad(x, batch.windows, width, f).flatten() for x, f in ((batch.token_ids, fill), (batch.segments, 0))
    )
    windows = torch.arange(0, len(ids) + 1, width, device=ids.device)
    return replace(batch, token_ids=ids, segments=segments, windows=windows)


def inputs(model: Any, batch: Batch, width: int | None = None) -> dict[str, torch.Tensor]:
    """Make the arguments of a stock forward: ``input_ids``, ``attention_mask``, ``token_type_ids``."""
    import torch

    width = width or int(batch.windows.diff().max())
    ids = pad(batch.token_ids, batch.windows, width, model.config.pad_token_id or 0)
    mask = pad(torch.ones_like(batch.token_ids), batch.windows, width)
    result = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        result["token_type_ids"] = pad(batch.segments, batch.windows, width)
    return result


def forward(model: Any, config: Any, batch: Batch) -> Tensor:
    """Run a stock classifier; right for every model whose attention mask hides the padding entirely.

    Returns:
        Logits ``(windows, classes)``; of a head that finds spans ``(tokens, 2)``.
    """
    import torch

    arguments = inputs(model, batch)
    output = model(**arguments)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], 2)[arguments["attention_mask"].bool()]
    logits: Tensor = output.logits
    return logits
