"""The forward pass of BERT-like encoders over packed documents, with transformers' own modules and weights.

Exact for a classifier that reads the first token: in the last layer everything but the keys' and values'
side is computed for that token alone. Knows no architecture; each says which modules play which part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn, unflatten
from torch.utils.checkpoint import checkpoint

from distill import attention
from distill.attention import Kernel, Layout, Run

if TYPE_CHECKING:
    from distill.batching import Batch


@dataclass(frozen=True)
class Layer:
    """One encoder layer's parts, on states of any leading shape."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    mix: Callable[[Tensor, Tensor], Tensor]
    """Context and residual to states: output projection, dropout, norm."""
    feed: Callable[[Tensor], Tensor]
    """States to states: feed-forward, residual, dropout, norm."""
    recompute: bool
    """Whether the backward pass computes the layer again, in place of keeping what it computed."""
    readers: tuple[nn.Linear, nn.Linear, nn.Linear] | None = None
    """Query, key and value of global tokens, where they have their own."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return transformers' activation of a name, in one pass where stock makes eight."""
    from transformers.activations import ACT2FN

    tanh = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    chosen: Any = nn.GELU(approximate="tanh") if name in tanh else ACT2FN[name]
    return chosen  # type: ignore[no-any-return]


def bert_layers(model: Any) -> list[Layer]:
    """Take apart the layers of a BERT, RoBERTa, BigBird or Longformer, which bear the same names."""
    act = activation(model.config.hidden_act)

    def add(output: Any, states: Tensor, residual: Tensor) -> Tensor:
        dropout = output.dropout.p if output.training else 0.0
        result: Tensor = output.LayerNorm(attention.drop(output.dense(states), dropout) + residual)
        return result

    def layer_of(layer: Any) -> Layer:
        own = layer.attention.self
        return Layer(
            own.query,
            own.key,
            own.value,
            lambda context, states: add(layer.attention.output, context, states),
            lambda states: add(layer.output, act(layer.intermediate.dense(states)), states),
            layer.gradient_checkpointing,
            (own.query_global, own.key_global, own.value_global) if hasattr(own, "query_global") else None,
        )

    return [layer_of(layer) for layer in model.base_model.encoder.layer]


def embed(model: Any, batch: Batch, layout: Layout, **more: Tensor) -> Tensor:
    """Look up the tokens, ``(tokens, width)``; positions begin anew with each document."""
    embeddings = model.base_model.embeddings
    # RoBERTa and Longformer keep the rows up to and with the padding's for padding.
    positions = layout.positions(batch.token_ids.device) + getattr(embeddings, "padding_idx", -1) + 1
    states: Tensor = embeddings(input_ids=batch.token_ids[None], position_ids=positions[None], **more)
    return states[0]


def encode(
    layers: Sequence[Layer],
    states: Tensor,
    layout: Layout,
    heads: int,
    kernel: Callable[[int, Run], Kernel],
    global_tokens: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Run an encoder, and compute of its last layer what the first tokens need.

    Args:
        layers: from the bottom up.
        states: ``(tokens, width)``.
        layout: the documents.
        heads: of the attention.
        kernel: chooses the attention of a layer, counted from 0, and a run of documents.
        global_tokens: how many first tokens have projections of their own, ``Layer.readers``.
        dropout: probability, of attention weights; 0 in evaluation.

    Returns:
        The first tokens' states, ``(documents, width)``.
    """

    def attend(number: int, layer: Layer, states: Tensor) -> Tensor:
        query, key, value = (
            unflatten(part(states), 1, (heads, -1)) for part in (layer.query, layer.key, layer.value)
        )
        context = attention.packed(query, key, value, layout, lambda run: kernel(number, run))
        if layer.readers:
            found = attention.from_first(states, layout, *layer.readers, heads, global_tokens, dropout)
            context = context.index_copy(
                0, layout.first(global_tokens, states.device), found.to(context.dtype)
            )
        return layer.feed(layer.mix(context, states))

    def read(layer: Layer, states: Tensor) -> Tensor:
        projections = layer.readers or (layer.query, layer.key, layer.value)
        context = attention.from_first(states, layout, *projections, heads, 1, dropout)
        return layer.feed(layer.mix(context, states[layout.first(1, states.device)]))

    for number, layer in enumerate(layers[:-1]):
        if layer.recompute and states.requires_grad:
            states = checkpoint(attend, number, layer, states, use_reentrant=False)
        else:
            states = attend(number, layer, states)
    if layers[-1].recompute:
        return checkpoint(read, layers[-1], states, use_reentrant=False)  # type: ignore[no-any-return]
    return read(layers[-1], states)


def bert_forward(
    model: Any, batch: Batch, kernel: Callable[[int, Run, float], Kernel], global_tokens: int = 0
) -> Tensor:
    """Run a classifier whose parts bear BERT's names.

    Args:
        model: transformers' classifier of a BERT, RoBERTa, BigBird or Longformer.
        batch: the documents.
        kernel: chooses the attention of a layer, counted from 0, a run, and a probability of dropout.
        global_tokens: see :func:`encode`.

    Returns:
        Logits ``(windows, classes)``.
    """
    layout = Layout(batch.windows.tolist())
    settings = model.config
    dropout = settings.attention_probs_dropout_prob if model.training else 0.0
    segments = batch.segments if settings.type_vocab_size > 1 else torch.zeros_like(batch.segments)
    first = encode(
        bert_layers(model),
        embed(model, batch, layout, token_type_ids=segments[None]),
        layout,
        settings.num_attention_heads,
        lambda number, run: kernel(number, run, dropout),
        global_tokens,
        dropout,
    )
    pooler = getattr(model.base_model, "pooler", None)
    if hasattr(model, "dropout") and pooler is not None:
        first = model.dropout(pooler(first.unsqueeze(1)))
    else:
        first = first.unsqueeze(1)  # those heads take the first of a document's tokens themselves
    logits: Tensor = model.classifier(first)
    return logits


def forward(model: Any, config: Any, batch: Batch) -> Tensor:
    """Run a full-attention classifier whose parts bear BERT's names; logits ``(windows, classes)``."""
    return bert_forward(model, batch, lambda number, run, dropout: attention.full(dropout))
