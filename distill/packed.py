"""The forward pass of BERT-like encoders over packed documents, with transformers' own modules and weights.

Exact for a classifier that reads the first token: in the last layer everything but what that token hears
from the others is computed for it alone. Knows no architecture; each says which modules play which part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn, unflatten
from torch.utils.checkpoint import checkpoint

from distill import attention
from distill.attention import Layout
from distill.rules import Full, Rule

if TYPE_CHECKING:
    from distill.batching import Batch


@runtime_checkable
class Mixing(Protocol):
    """How the tokens of a document hear of each other: attention, or what takes its place."""

    def everywhere(self, states: Tensor, layout: Layout) -> Tensor:
        """Compute what each token hears: ``(tokens, width)`` to ``(tokens, width)``."""

    def at_first(self, states: Tensor, layout: Layout) -> Tensor:
        """Compute what each document's first token hears: ``(tokens, width)`` to ``(documents, width)``."""


Projections = tuple[nn.Linear, nn.Linear, nn.Linear]
"""Query, key and value."""


Heads = tuple[Tensor, Tensor, Tensor]
"""Query, key and value of all tokens, each ``(tokens, heads, head width)``."""


@dataclass(frozen=True)
class Attention:
    """Attention of several heads."""

    projections: Projections
    heads: int
    rule: Rule
    dropout: float
    """Probability, of attention weights; 0 in evaluation."""
    readers: Projections | None = None
    """Of global tokens, where they have their own."""
    global_tokens: int = 0

    def project(self, states: Tensor) -> Heads:
        """Project ``(tokens, width)``."""
        query, key, value = (unflatten(part(states), 1, (self.heads, -1)) for part in self.projections)
        return query, key, value

    def sees_all(self, layout: Layout) -> bool:
        """Say whether each token sees each one of its document, by the same projections."""
        return self.readers is None and all(self.rule.sees_all(length) for length in set(layout.lengths))

    def everywhere(self, states: Tensor, layout: Layout) -> Tensor:
        """See :class:`Mixing`."""
        query, key, value = self.project(states)
        context = attention.packed(query, key, value, layout, self.rule, self.dropout)
        if self.readers:
            found = self._read(self.readers, states, layout, self.global_tokens)
            rows = layout.first(self.global_tokens, states.device)
            context = context.index_copy(0, rows, found.to(context.dtype))
        return context

    def at_first(self, states: Tensor, layout: Layout) -> Tensor:
        """See :class:`Mixing`."""
        return self._read(self.readers or self.projections, states, layout, 1)

    def _read(self, projections: Projections, states: Tensor, layout: Layout, count: int) -> Tensor:
        return attention.from_first(states, layout, *projections, self.heads, count, self.dropout)


@dataclass(frozen=True)
class Layer:
    """One encoder layer's parts, on states of any leading shape."""

    mixing: Mixing
    mix: Callable[[Tensor, Tensor], Tensor]
    """Context and residual to states: output projection, dropout, norm."""
    feed: Callable[[Tensor], Tensor]
    """States to states: feed-forward, residual, dropout, norm."""
    recompute: bool
    """Whether the backward pass computes the layer again, in place of keeping what it computed."""


@dataclass
class Taps:
    """What a forward pass is to write down on its way. Layers are counted from 1; 0 are the embeddings."""

    states_of: Collection[int]
    """Layers whose states are wanted, of all tokens."""
    heads_of: Collection[int]
    """Layers whose query, key and value are wanted, of all tokens."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """By layer, ``(tokens, width)``."""
    heads: dict[int, Heads] = field(default_factory=dict)
    """By layer; none of a layer that has no attention."""
    sparse: set[int] = field(default_factory=set)
    """Layers of ``heads`` in which some token does not see all of its document."""

    def enter(self, number: int, mixing: Mixing, states: Tensor, layout: Layout) -> None:
        """Write down what a layer makes of the states that it is given."""
        if number not in self.heads_of or not isinstance(mixing, Attention):
            return
        self.heads[number] = mixing.project(states)
        if not mixing.sees_all(layout):
            self.sparse.add(number)

    def leave(self, number: int, states: Tensor) -> None:
        """Write down a layer's states."""
        if number in self.states_of:
            self.states[number] = states

    def keep(self, tokens: Tensor) -> None:
        """Leave only some tokens, ``(tokens,)`` bool: a model that fills its windows up drops the filling."""
        self.states = {number: states[tokens] for number, states in self.states.items()}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return transformers' activation of a name, in one pass where stock makes eight."""
    from transformers.activations import ACT2FN

    tanh = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    chosen: Callable[[Tensor], Tensor] = nn.GELU(approximate="tanh") if name in tanh else ACT2FN[name]
    return chosen


def add(output: Any, states: Tensor, residual: Tensor) -> Tensor:
    """Run the end of a BERT layer's halves: projection, dropout, residual, norm."""
    dropout = output.dropout.p if output.training else 0.0
    result: Tensor = output.LayerNorm(attention.drop(output.dense(states), dropout) + residual)
    return result


def bert_layers(model: Any, rule: Callable[[int], Rule], global_tokens: int) -> list[Layer]:
    """Take apart the layers of a BERT, RoBERTa, BigBird or Longformer, which bear the same names.

    What stands in an attention's place and is a :class:`Mixing` itself is taken as it is.
    """
    settings = model.config
    act = activation(settings.hidden_act)
    dropout = settings.attention_probs_dropout_prob if model.training else 0.0

    def mixing_of(number: int, own: Any) -> Mixing:
        if isinstance(own, Mixing):
            return own
        readers = (
            (own.query_global, own.key_global, own.value_global) if hasattr(own, "query_global") else None
        )
        return Attention(
            (own.query, own.key, own.value), settings.num_attention_heads, rule(number), dropout, readers, global_tokens
        )  # fmt: skip

    def layer_of(number: int, layer: Any) -> Layer:
        return Layer(
            mixing_of(number, layer.attention.self),
            lambda context, states: add(layer.attention.output, context, states),
            lambda states: add(layer.output, act(layer.intermediate.dense(states)), states),
            layer.gradient_checkpointing,
        )

    return [layer_of(number, layer) for number, layer in enumerate(model.base_model.encoder.layer)]


def embed(model: Any, batch: Batch, layout: Layout, **more: Tensor) -> Tensor:
    """Look up the tokens, ``(tokens, width)``; positions begin anew with each document."""
    embeddings = model.base_model.embeddings
    # RoBERTa and Longformer keep the rows up to and with the padding's for padding.
    positions = layout.positions(batch.token_ids.device) + getattr(embeddings, "padding_idx", -1) + 1
    states: Tensor = embeddings(input_ids=batch.token_ids[None], position_ids=positions[None], **more)
    return states[0]


def encode(
    layers: Sequence[Layer], states: Tensor, layout: Layout, taps: Taps | None = None, *, whole: bool = False
) -> Tensor:
    """Run an encoder, and compute of its last layer what the first tokens need, or all where it is tapped.

    Args:
        layers: from the bottom up.
        states: ``(tokens, width)``.
        layout: the documents.
        taps: filled on the way.
        whole: compute and return all tokens' states.

    Returns:
        The first tokens' states, ``(documents, width)``, or all, ``(tokens, width)``.
    """

    def everywhere(layer: Layer, states: Tensor) -> Tensor:
        return layer.feed(layer.mix(layer.mixing.everywhere(states, layout), states))

    def at_first(layer: Layer, states: Tensor) -> Tensor:
        residual = states[layout.first(1, states.device)]
        return layer.feed(layer.mix(layer.mixing.at_first(states, layout), residual))

    taps = taps or Taps((), ())
    taps.leave(0, states)
    for number, layer in enumerate(layers, 1):
        taps.enter(number, layer.mixing, states, layout)
        shortened = layer is layers[-1] and number not in taps.states_of and not whole
        run = at_first if shortened else everywhere
        if layer.recompute and torch.is_grad_enabled():
            states = checkpoint(run, layer, states, use_reentrant=False)
        else:
            states = run(layer, states)
        taps.leave(number, states)
    return states if shortened or whole else states[layout.first(1, states.device)]


def bert_forward(
    model: Any,
    batch: Batch,
    rule: Callable[[int], Rule] = lambda _: Full(),
    global_tokens: int = 0,
    taps: Taps | None = None,
) -> Tensor:
    """Run a classifier whose parts bear BERT's names.

    Args:
        model: transformers' classifier of a BERT, RoBERTa, BigBird or Longformer.
        batch: the documents.
        rule: of a layer's attention, the layers counted from 0.
        global_tokens: how many first tokens have projections of their own, where the model has those.
        taps: filled on the way.

    Returns:
        Logits ``(windows, classes)``; of a head that finds spans ``(tokens, 2)``.
    """
    layout = Layout(batch.windows.tolist())
    segments = batch.segments if model.config.type_vocab_size > 1 else torch.zeros_like(batch.segments)
    states = embed(model, batch, layout, token_type_ids=segments[None])
    layers = bert_layers(model, rule, global_tokens)
    spans = getattr(model, "qa_classifier", None) or getattr(model, "qa_outputs", None)
    if spans is not None:
        found: Tensor = spans(encode(layers, states, layout, taps, whole=True))
        return found
    first = encode(layers, states, layout, taps)
    pooler = getattr(model.base_model, "pooler", None)
    if hasattr(model, "dropout") and pooler is not None:
        first = model.dropout(pooler(first.unsqueeze(1)))
    else:
        first = first.unsqueeze(1)  # those heads take the first of a document's tokens themselves
    logits: Tensor = model.classifier(first)
    return logits


def forward(model: Any, config: Any, batch: Batch, taps: Taps | None = None) -> Tensor:
    """Run a full-attention classifier whose parts bear BERT's names; logits ``(windows, classes)``."""
    return bert_forward(model, batch, taps=taps)
