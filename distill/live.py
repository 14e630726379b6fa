"""A student and the teacher that runs beside it, for losses that compare the two from inside.

The teacher reads the student's batches, without gradients and in evaluation mode. What a term compares is
tapped on the way (packed.py), its algebra is in losses.py; here its values for tokens become means over
documents. Matrices that bridge unequal widths are trained with the student, and stay behind when it is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from distill import losses, models
from distill.attention import Layout
from distill.batching import Batch, Padding
from distill.encoding import Tokenizer, encode_texts
from distill.errors import RecipeError, UsageError
from distill.packed import Taps
from distill.schema import Loss

if TYPE_CHECKING:
    from pathlib import Path

    from distill.models import Classifier

SAMPLE = 200
"""Training documents over which the two tokenizers are held against one another."""


def load_teacher(terms: Sequence[Loss], teachers: Sequence[Path | str]) -> Classifier | None:
    """Load the teacher that runs beside the student; None where no term needs it.

    Args:
        terms: the student's.
        teachers: model folders or hub ids.

    Raises:
        UsageError: there is none, or more than one.
    """
    kind = next((term.kind for term in terms if term.needs_live), None)
    if kind is None:
        return None
    if not teachers:
        raise UsageError(
            f"student.losses: {kind} needs the teacher itself, and --logits gives its logits alone; add --teacher"
        )
    if len(teachers) > 1:
        raise UsageError(
            f"student.losses: {kind} compares layers with those of one teacher, not {len(teachers)}; "
            "give one --teacher"
        )
    return models.load(teachers[0])


def check_reading(student: Classifier, teacher: Classifier, rows: Sequence[tuple[str, str | None]]) -> None:
    """Refuse a pair that would not read the same tokens.

    Args:
        student: its windows are read by both.
        teacher: see there.
        rows: texts to try the tokenizers on.

    Raises:
        RecipeError: the tokenizers differ, or the teacher has no room for the student's windows.
    """
    check_room(student.config.max_length, teacher.config.max_length)
    shown = difference(student.tokenizer, teacher.tokenizer)
    read, heard = (encode_texts(model.tokenizer, [rows], student.config) for model in (student, teacher))
    if shown or not np.array_equal(read.token_ids, heard.token_ids):
        raise RecipeError(
            f"student.losses: student and teacher must have one tokenizer, and theirs differ{shown}; "
            "take terms of logits, or the teacher's tokenizer"
        )
    if not np.array_equal(read.segments, heard.segments):
        raise RecipeError(
            "student.losses: the student's tokenizer does not tell the texts of a pair apart, as the teacher's does; "
            "take terms of logits"
        )


def check_room(wanted: int, room: int) -> None:
    """Raise RecipeError when the student's windows have more tokens than the teacher reads."""
    if wanted > room:
        raise RecipeError(
            f"student.max_length is {wanted}, and the teacher beside it reads {room} tokens; "
            f"set student.max_length={room}"
        )


def check_project(term: Loss, where: str, ours: int, theirs: int) -> None:
    """Raise RecipeError when states of unequal widths are to be compared as they are."""
    if ours != theirs and not term.project:
        raise RecipeError(
            f"{where}: the student's states are {ours} wide and the teacher's {theirs}; set project: true"
        )


def difference(student: Tokenizer, teacher: Tokenizer) -> str:
    """Say in brackets what token of two vocabularies is not the same one, the teacher's first; nothing if all are."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    word = min(
        (word for word in theirs if ours.get(word) != theirs[word]), key=theirs.__getitem__, default=None
    )
    if word is not None:
        return f" ({word!r:.30} is {theirs[word]}, not {ours.get(word)})"
    return f" ({len(theirs):,} tokens, not {len(ours):,})" if len(ours) != len(theirs) else ""


def layer_pairs(term: Loss, student: int, teacher: int) -> list[tuple[int, int]]:
    """Say which layers a term compares, student's and teacher's.

    Args:
        term: one that needs a live teacher.
        student: how many layers it has.
        teacher: how many it has.
    """
    if term.kind == "relation":
        return [(student, term.teacher_layer or teacher)]
    if term.kind == "cosine" or term.layer_map == "last":
        return [(student, teacher)]
    if term.layer_map == "uniform":  # Jiao et al. 2020
        first = 1 if term.kind == "attention" else 0
        return [
            (m, max(first, (2 * m * teacher + student) // (2 * student))) for m in range(first, student + 1)
        ]
    return [(mine, theirs) for mine, theirs in term.layer_map]


class Pair(nn.Module):
    """A student and its teacher as one module; its weights are the student's and the bridging matrices.

    Args:
        student: engine packed.
        teacher: the same; it is set to evaluation mode, and its weights take no gradients.
        terms: of the objective.
        seed: of the matrices.

    Raises:
        RecipeError: a term names a layer that is not there, or compares what cannot be compared.
    """

    def __init__(self, student: Classifier, teacher: Classifier, terms: Sequence[Loss], seed: int) -> None:
        super().__init__()
        self.student = student
        self._beside = (teacher.eval().requires_grad_(False),)  # a tuple: its weights are not this module's
        self.terms = {number: term for number, term in enumerate(terms) if term.needs_live}
        for name, model in (("student", student), ("teacher", teacher)):
            if model.config.engine == "stock":
                raise RecipeError(
                    f"student.losses: the {name} ({model.config.architecture}) runs by engine: stock, which shows no "
                    "layers; take terms of logits"
                )
        depths = [len(models.layers(model.model)) for model in (student, teacher)]
        self.pairs = {number: layer_pairs(term, *depths) for number, term in self.terms.items()}
        for number, pairs in self.pairs.items():
            for name, depth, wanted in zip(
                ("student", "teacher"), depths, zip(*pairs, strict=True), strict=True
            ):
                if max(wanted) > depth:
                    raise RecipeError(
                        f"student.losses.{number}: layer {max(wanted)} is out of range; the {name} has {depth} layers"
                    )
        torch.manual_seed(seed)
        self.bridges = nn.ModuleDict(self._fit())

    @property
    def teacher(self) -> Classifier:
        """The teacher, no part of this module's weights."""
        return self._beside[0]

    @property
    def padding(self) -> Padding | None:
        """How the student pads."""
        return self.student.padding

    def forward(self, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        """Compute the student's logits, and by its number each live term, unweighted, ``(documents,)``."""
        mine, theirs = self._taps(0), self._taps(1)
        logits = self.student(batch, mine)
        with torch.no_grad():
            self.teacher(batch, theirs)
        layout = Layout(batch.windows.tolist())
        owners = torch.repeat_interleave(batch.documents, batch.windows.diff())
        counts = torch.bincount(owners, minlength=batch.size)
        found = {}
        with torch.autocast(logits.device.type, enabled=False):
            for number, term in self.terms.items():
                each = [
                    self._values(number, term, mine, theirs, layers, layout) for layers in self.pairs[number]
                ]
                tokens = torch.stack(each).mean(0)
                found[number] = tokens.new_zeros(batch.size).index_add(0, owners, tokens) / counts
        return logits, found

    def _taps(self, side: int) -> Taps:
        """Say what is needed of the student (0) or the teacher (1)."""
        states: set[int] = set()
        heads: set[int] = set()
        for number, term in self.terms.items():
            of = states if term.kind in ("cosine", "hidden_mse") else heads
            of |= {pair[side] for pair in self.pairs[number]}
        return Taps(states, heads)

    def _values(
        self, number: int, term: Loss, mine: Taps, theirs: Taps, layers: tuple[int, int], layout: Layout
    ) -> Tensor:
        """Compute a term at one pair of layers, ``(tokens,)``."""
        at, to = layers
        if term.kind in ("cosine", "hidden_mse"):
            states, wanted = mine.states[at].float(), theirs.states[to].float()
            if str(number) in self.bridges:
                states = self.bridges[str(number)](states)
            return (losses.cosine if term.kind == "cosine" else losses.hidden_mse)(states, wanted)
        ours, others = (
            [part.float() for part in taps[of]] for taps, of in ((mine.heads, at), (theirs.heads, to))
        )
        if term.kind == "relation":
            parts = [
                _by_window(
                    lambda s, t: losses.relation(s, t, term.relation_heads),
                    layout,
                    s.flatten(1),
                    t.flatten(1),
                )
                for s, t in zip(ours, others, strict=True)
            ]
            return torch.stack(parts).sum(0)
        return _by_window(
            lambda q, k, tq, tk: losses.attention(q, k, tq, tk, term.distance), layout, *ours[:2], *others[:2]
        )

    @torch.no_grad()
    def _fit(self) -> dict[str, nn.Module]:
        """Read one window of the greatest length, refuse what does not fit, and bridge unequal widths."""
        length = self.student.config.max_length
        ids = torch.zeros(length, dtype=torch.long)
        one, none = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bool)
        batch = Batch(ids, ids, torch.tensor([0, length]), one, 1, one, none)
        found = self._taps(0), self._taps(1)
        was = self.student.training
        for model, taps in zip((self.student.eval(), self.teacher), found, strict=True):
            model(batch.to(next(model.parameters()).device), taps)
        self.student.train(was)
        for name, model, taps in zip(
            ("student", "teacher"), (self.student, self.teacher), found, strict=True
        ):
            if set(taps.states_of) - set(taps.states):
                raise RecipeError(
                    f"student.losses: the {name} ({model.config.architecture}) runs by transformers' own forward pass, "
                    "which shows no layers; take terms of logits"
                )
        result: dict[str, nn.Module] = {}
        for number, term in self.terms.items():
            where = f"student.losses.{number}"
            if term.kind not in ("cosine", "hidden_mse"):
                for layers in self.pairs[number]:
                    _check_heads(term, where, found, layers)
                continue
            (at, to), *_ = self.pairs[number]  # all layers of a model are as wide as one
            ours, wanted = found[0].states[at].shape[1], found[1].states[to].shape[1]
            check_project(term, where, ours, wanted)
            if ours != wanted:
                result[str(number)] = nn.Linear(ours, wanted, bias=False)
        return result


def _check_heads(term: Loss, where: str, found: tuple[Taps, Taps], layers: tuple[int, int]) -> None:
    """Refuse queries, keys and values that a term cannot compare."""
    shapes = []
    for name, taps, layer in zip(("student", "teacher"), found, layers, strict=True):
        if layer not in taps.heads:
            raise RecipeError(
                f"{where}: the {name} has no queries and keys to compare; take kind: hidden_mse"
            )
        if term.kind == "attention" and layer in taps.sparse:
            raise RecipeError(
                f"{where}: the {name} reads windows of student.max_length tokens with sparse attention; "
                "take kind: relation, or a student.max_length that it reads with full attention, if it has one"
            )
        shapes.append(taps.heads[layer][0].shape[1:])
    if term.kind == "attention" and shapes[0][0] != shapes[1][0]:
        raise RecipeError(
            f"{where}: the student has {shapes[0][0]} attention heads and the teacher {shapes[1][0]}; take kind: relation"
        )
    widths = [shape.numel() for shape in shapes]
    if term.kind == "relation" and any(width % term.relation_heads for width in widths):
        raise RecipeError(
            f"{where}: relation_heads: {term.relation_heads} does not divide the widths {widths[0]} and {widths[1]}; "
            f"take a divisor of {math.gcd(*widths)}"
        )


def _by_window(function: Callable[..., Tensor], layout: Layout, *states: Tensor) -> Tensor:
    """Compute what knows windows apart, those of one length together: ``(tokens, …)`` to ``(tokens,)``."""
    runs = zip(*(layout.split(part) for part in states), strict=True)
    return torch.cat([function(*parts).flatten() for parts in runs])
