"""FNet (Lee-Thorp et al. 2021): tokens are mixed by a Fourier transform, which has no weights and no mask.

The transform runs over whatever it is given: padding to the longest of a batch makes a document's logits
depend on its company. Here each document is transformed at its own length, or at max_length with padding
tokens behind it, as the released checkpoints were trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill.schema import Student

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distill.attention import Layout
    from distill.batching import Batch, Padding
    from distill.packed import Taps
    from distill.tasks import TaskSpec

MODEL_TYPE = "fnet"


class Config(Student):
    """FNet's fields."""

    architecture: Literal["fnet"]
    checkpoint: str | None = "google/fnet-base"
    """null: random weights, sized by ``config``, with the teacher's vocabulary."""
    transform: Literal["auto", "document", "max_length"] = "auto"
    """The length that tokens are mixed at; auto: max_length with a checkpoint, since the released ones
    were trained so (at 512 tokens), and each document's own from scratch."""

    @property
    def is_filled(self) -> bool:
        """Whether each window is filled up to max_length with padding tokens."""
        return self.transform == "max_length" or (self.transform == "auto" and self.checkpoint is not None)


def positions(config: Any) -> int:
    """Return how many tokens a checkpoint reads."""
    return int(config.max_position_embeddings)


def padding(model: Any, config: Config) -> Padding | None:
    """Say how windows are padded: to max_length, or each stays at its own length."""
    if config.is_filled:
        return lambda length: config.max_length
    return None if config.engine == "packed" else lambda length: length


def keys(model: Any, config: Config, length: int) -> int:
    """Return 0: tokens are mixed without attention."""
    return 0


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build from the checkpoint, or from scratch."""
    from transformers import FNetConfig

    from distill import pretrained

    if config.checkpoint is not None:
        key = "student.checkpoint"
        found = pretrained.read_config(config.checkpoint, key, (MODEL_TYPE,))
        pretrained.check_length(config.max_length, positions(found), "student")
        return pretrained.from_checkpoint(
            pretrained.head(task), config.checkpoint, key, task, **config.config
        )
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": max(512, config.max_length),
        **config.config,
    }
    return pretrained.head(task).from_config(FNetConfig(**fields, num_labels=task.classes))


class Fourier:
    """The real part of the transform over a document's tokens and over the width."""

    def everywhere(self, states: Tensor, layout: Layout) -> Tensor:
        """Mix all tokens: ``(tokens, width)`` to ``(tokens, width)``."""
        import torch

        parts = [self._transform(part.float()).flatten(0, 1) for part in layout.split(states)]
        return torch.cat(parts).to(states.dtype)

    def at_first(self, states: Tensor, layout: Layout) -> Tensor:
        """Mix for the first token, whose frequency is 0: the transform of the tokens' sum."""
        import torch

        sums = torch.cat([part.float().sum(1) for part in layout.split(states)])
        mixed: Tensor = torch.fft.fft(sums).real
        return mixed.to(states.dtype)

    @staticmethod
    def _transform(states: Tensor) -> Tensor:
        """``(documents, length, width)``: half of the frequencies say the other half, as states are real."""
        import torch

        half = torch.fft.rfft2(states, dim=(1, 2)).real
        mirrored = half[..., 1 : (states.shape[2] + 1) // 2].flip(1, 2).roll(1, 1)
        return torch.cat([half, mirrored], 2)


def forward(model: Any, config: Config, batch: Batch, taps: Taps | None = None) -> Tensor:
    """Run the classifier; logits ``(windows, classes)``, or of a head that finds spans ``(tokens, 2)``."""
    import torch

    from distill import packed, padded
    from distill.attention import Layout

    text = None
    if config.is_filled:
        text = padded.pad(torch.ones_like(batch.token_ids), batch.windows, config.max_length).flatten().bool()
        batch = padded.filled(batch, config.max_length, model.config.pad_token_id)
    layout = Layout(batch.windows.tolist())
    act = packed.activation(model.config.hidden_act)
    states = packed.embed(model, batch, layout, token_type_ids=batch.segments[None])
    layers = [_layer(layer, act) for layer in model.fnet.encoder.layer]
    logits: Tensor
    if hasattr(model, "qa_outputs"):
        found = packed.encode(layers, states, layout, taps, whole=True)
        logits = model.qa_outputs(found if text is None else found[text])
        return logits
    first = packed.encode(layers, states, layout, taps)
    if taps is not None and text is not None:
        taps.keep(text)
    logits = model.classifier(model.dropout(model.fnet.pooler(first.unsqueeze(1))))
    return logits


def _layer(layer: Any, act: Any) -> Any:
    """Name a layer's parts."""
    from distill import packed

    return packed.Layer(
        Fourier(),
        lambda mixed, states: layer.fourier.output(mixed, states),
        lambda states: packed.add(layer.output, act(layer.intermediate.dense(states)), states),
        layer.gradient_checkpointing,
    )


def stock(model: Any, config: Config, batch: Batch) -> Tensor:
    """Run transformers' own forward, once for each length; logits ``(windows, classes)``."""
    import numpy as np
    import torch

    from distill import padded

    pad = padding(model, config)
    assert pad is not None, "the stock forward pass has a width"
    lengths = np.array([pad(length) for length in batch.windows.diff().tolist()])
    result: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        members = np.flatnonzero(lengths == length).tolist()
        arguments = padded.inputs(model, batch.select(members), int(length))
        arguments.pop("attention_mask")
        result |= dict(zip(members, model(**arguments).logits, strict=True))
    return torch.stack([result[at] for at in range(len(lengths))])
