"""Documents as token ids, packed: no padding, one array for a whole split. Knows no model.

The special tokens' places are read off the tokenizer's own encoding of a probe, so that BERT's segments
and RoBERTa's doubled separators come out as each model wants them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import spans
from distill.files import sha256_json
from distill.schema import Model
from distill.spool import Joined, Slices, Spool
from distill.streams import Stream
from distill.tasks import UNREAD, Array, Floats
from distill.views import cut, cut_pair

if TYPE_CHECKING:
    from distill.data import Rows

Tokenizer = Any
"""A transformers tokenizer."""


def epoch_size(documents: int, weights: Array | None) -> int:
    """Count the documents that an epoch draws: each once, or as often as its weight ``(documents,)`` says."""
    return documents if weights is None else max(1, round(float(weights.sum())))


def joined_weights(parts: Sequence[tuple[int, Array | None]]) -> Array | None:
    """Put the weights of some documents, with their count, before those of others; None where nothing has any."""
    if all(weights is None for _, weights in parts):
        return None
    each = [np.broadcast_to(1.0, count) if weights is None else weights for count, weights in parts]
    if all(weights.strides == (0,) and weights[0] == each[0][0] for weights in each):
        return np.broadcast_to(each[0][0], sum(map(len, each)))  # one number, which takes no memory
    return np.concatenate(each)


@dataclass(frozen=True)
class Encoded:
    """A split as windows of token ids, packed one after another."""

    token_ids: Slices
    """``(tokens,)`` of integers, special tokens included."""
    segments: Slices
    """``(tokens,)`` uint8: 1 in the second text of a pair where the model tells them apart."""
    windows: Array
    """``(windows + 1,)`` int64: where each window begins in ``token_ids``."""
    documents: Array
    """``(documents + 1,)`` int32: where each document begins in ``windows``."""
    full_length: Array
    """``(documents,)`` int32: tokens of the whole document, special ones included."""
    row_id: Array
    """``(documents,)`` int64."""
    labels: Array
    """Labels as in tasks.py; zeros where ``labelled`` is False, and never read there."""
    labelled: Array
    """``(documents,)`` bool."""
    weights: Array | None = None
    """``(documents,)`` float64: how often each document is drawn in an epoch; once where None."""
    unit_of: Slices | None = None
    """Of spans, ``(tokens, 2)`` int32: the unit that each token begins in, and the one that it ends in; -1 where it is of
    none. The first of each window is of unit 0."""
    units: Array | None = None
    """Of spans, ``(documents,)`` int32: units of each document, unit 0 included."""

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def draws(self) -> int:
        """Documents of an epoch."""
        return epoch_size(len(self), self.weights)

    def blank(self, documents: Array, classes: int) -> Floats:
        """Make room for the logits of some documents, as in tasks.py: zeros, or of spans UNREAD."""
        if self.units is None:
            return np.zeros((len(documents), classes), np.float32)
        return np.full(
            (len(documents), int(self.units[documents].max(initial=1)), classes), UNREAD, np.float32
        )

    @property
    def _single(self) -> bool:
        """Whether each document has one window, so that nothing need be kept twice."""
        return len(self.windows) == len(self.documents)

    @cached_property
    def window_counts(self) -> Array:
        """``(documents,)`` int32: windows of each document."""
        if self._single:
            return np.broadcast_to(np.int32(1), len(self))
        return np.diff(self.documents)

    @cached_property
    def tokens(self) -> Array:
        """``(documents,)`` int32: tokens of each document's windows together."""
        starts = self.windows if self._single else self.windows[self.documents]
        # Cast before they are subtracted, without a copy: what is cut off cancels out.
        return np.subtract(starts[1:], starts[:-1], dtype=np.int32, casting="same_kind")

    @cached_property
    def longest_window(self) -> Array:
        """``(documents,)`` int32: tokens of each document's longest window."""
        if self._single:
            return self.tokens
        longest = np.maximum.reduceat(np.diff(self.windows), self.documents[:-1])
        return np.asarray(longest, dtype=np.int32)


@dataclass(frozen=True)
class Template:
    """Where special tokens stand: prefix, text, middle, pair, suffix, each with its segment."""

    prefix: list[int]
    middle: list[int]
    suffix: list[int]
    segments: tuple[int, int, int, int, int]

    def fill(self, first: Sequence[int], second: Sequence[int] | None) -> list[int]:
        """Put the token ids of one window together."""
        return [*self.prefix, *first, *self.middle, *(second or ()), *self.suffix]

    def segments_of(self, first: Sequence[int], second: Sequence[int] | None) -> list[int]:
        """Return the segment of each of a window's tokens."""
        parts = [self.prefix, first, self.middle, second or (), self.suffix]
        return [s for part, s in zip(parts, self.segments, strict=True) for _ in part]


def special_tokens(tokenizer: Tokenizer, *, pair: bool) -> Template:
    """Read the special tokens' places off the tokenizer's own encoding of a probe."""
    texts = ("a", "b") if pair else ("a",)
    contents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    whole = tokenizer(*texts)
    ids, kinds = whole["input_ids"], whole.get("token_type_ids") or [0] * len(whole["input_ids"])
    spans, at = [], 0
    for content in contents:
        while ids[at : at + len(content)] != content:
            at += 1
        spans.append((at, at + len(content)))
        at += len(content)
    first, last = spans[0], spans[-1]
    middle = ids[first[1] : last[0]] if pair else []
    between = kinds[first[1]] if pair else 0
    suffix_kind = kinds[last[1]] if last[1] < len(ids) else 0
    segments = (kinds[0], kinds[first[0]], between, kinds[last[0]], suffix_kind)
    return Template(ids[: first[0]], middle, ids[last[1] :], segments)


def reading_key(tokenizer: Tokenizer, model: Model) -> str:
    """Hash whatever decides how a document is cut into windows of token ids."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    names = tokenizer.model_input_names  # whether it has segments
    view = [model.max_length, model.view, model.max_windows, model.overlap]
    return sha256_json([backend.to_str(), names, view])


def encode_texts(
    tokenizer: Tokenizer,
    rows: Iterable[Sequence[tuple[str, str | None]]],
    model: Model,
    *,
    span: bool = False,
    notes: list[str] | None = None,
    on_disk: bool = False,
) -> Encoded:
    """Tokenise documents and cut them into a model's windows.

    Args:
        tokenizer: the model's.
        rows: batches of (text, text_pair or None).
        model: its max_length and view.
        span: the texts are questions, and the second ones contexts: each window of a context stands behind its
            question, which takes at most a third of it; units are found.
        notes: gets a sentence for whatever is cut.
        on_disk: keep what there is of each token in files (see spool.py).

    Returns:
        The documents with row ids of zero and without labels.
    """
    numbers = np.uint16 if on_disk and len(tokenizer) <= 1 << 16 else np.int32
    token_ids, segments, unit_of = (
        Spool(dtype, row) if on_disk else [np.zeros((0, *row), dtype)]
        for dtype, row in ((numbers, ()), (np.uint8, ()), (np.int32, (2,)))
    )
    window_lengths, window_counts, full, units = (array("i") for _ in range(4))
    shortened = 0
    has_segments = False
    template: Template | None = None
    for batch in rows:
        if not batch:
            continue
        pair = batch[0][1] is not None
        template = template or special_tokens(tokenizer, pair=pair)
        has_segments = any(template.segments)
        room = model.max_length - len(template.prefix) - len(template.middle) - len(template.suffix)
        firsts = tokenizer([t for t, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        told = (
            tokenizer(
                [p for _, p in batch], add_special_tokens=False, verbose=False, return_offsets_mapping=span
            )
            if pair
            else {"input_ids": [None] * len(batch)}
        )
        seconds, offsets = told["input_ids"], told.get("offset_mapping") or [None] * len(batch)
        views: list[tuple[Sequence[int], Sequence[int] | None]]
        batch_ids: list[int] = []
        batch_segments: list[int] = []
        batch_units: list[Array] = []
        for (_, context), first, second, characters in zip(batch, firsts, seconds, offsets, strict=True):
            full.append(len(first) + len(second or ()) + model.max_length - room)
            if span:
                question = first[: model.max_length // 3]
                shortened += len(question) < len(first)
                places = cut(
                    range(len(second)), room - len(question), model.view, model.max_windows, model.overlap
                )
                views = [(question, [second[at] for at in place]) for place in places]
                bounds = spans.units(str(context))
                units.append(len(bounds) + 1)
                starts, ends = np.array(characters, np.int64).reshape(-1, 2).T
                touched = spans.touched(bounds, starts, ends)
                sizes = len(template.prefix) + len(question) + len(template.middle), len(template.suffix)
                before, after = (np.full((size, 2), -1) for size in sizes)
                before[0] = 0
                for place in places:
                    batch_units += [before, touched[list(place)], after]
            elif second is None:
                views = [
                    (window, None)
                    for window in cut(first, room, model.view, model.max_windows, model.overlap)
                ]
            else:
                views = [cut_pair(first, second, room)]
            window_counts.append(len(views))
            for window in views:
                ids = template.fill(*window)
                window_lengths.append(len(ids))
                batch_ids += ids
                if has_segments:
                    batch_segments += template.segments_of(*window)
        token_ids.append(np.array(batch_ids, dtype=numbers))
        if has_segments:
            segments.append(np.array(batch_segments, dtype=np.uint8))
        if span:
            unit_of.append(np.concatenate(batch_units).astype(np.int32))
    count = len(full)
    if notes is not None and shortened:
        notes.append(
            f"{shortened:,} of {count:,} questions are cut to a third of max_length ({model.max_length // 3} tokens)"
        )
    windows = np.zeros(len(window_lengths) + 1, np.int64)
    documents = np.zeros(count + 1, np.int32)
    for offsets, lengths in ((windows, window_lengths), (documents, window_counts)):
        np.cumsum(np.frombuffer(lengths, np.intc), out=offsets[1:])
    return Encoded(
        token_ids=_whole(token_ids),
        segments=_whole(segments) if has_segments else np.broadcast_to(np.uint8(0), int(windows[-1])),
        windows=windows,
        documents=documents,
        full_length=np.frombuffer(full, np.intc),
        row_id=np.zeros(count, np.int64),
        labels=np.zeros(count, np.int64),
        labelled=np.zeros(count, bool),
        unit_of=_whole(unit_of) if span else None,
        units=np.frombuffer(units, np.intc) if span else None,
    )


def _whole(values: Spool | list[Array]) -> Slices:
    return values if isinstance(values, Spool) else np.concatenate(values)


def encode(
    tokenizer: Tokenizer,
    rows: Rows,
    model: Model,
    progress: Any = None,
    *,
    span: bool = False,
    notes: list[str] | None = None,
) -> Encoded:
    """Tokenise a split; its row ids and labels go with it.

    A row whose answer the model does not read has no label: to learn from it that there is none would be wrong.
    """

    def batches() -> Iterable[list[tuple[str, str | None]]]:
        for part in rows.batches():
            yield part
            if progress is not None:
                progress.advance(len(part))

    on_disk = isinstance(rows.dataset, Stream)
    encoded = encode_texts(tokenizer, batches(), model, span=span, notes=notes, on_disk=on_disk)
    labels = rows.labels if rows.labels is not None else np.zeros(len(rows), np.int64)
    labelled = np.full(len(rows), rows.labels is not None)
    if span and rows.labels is not None:
        labelled = _read(encoded, labels)
        if notes is not None and not labelled.all():
            notes.append(f"{int((~labelled).sum()):,} of {len(rows):,} answers stand where no window reaches")
    return replace(encoded, row_id=rows.row_id, labels=labels, labelled=labelled, weights=rows.weights)


def _read(encoded: Encoded, answers: Array) -> Array:
    """Say which documents' answers ``(documents, 2)`` begin and end in tokens of theirs."""
    assert encoded.unit_of is not None
    document = np.repeat(np.arange(len(encoded)), encoded.tokens)
    hits = encoded.unit_of == answers[document]
    first = encoded.windows[encoded.documents[:-1]]
    return np.asarray(np.logical_or.reduceat(hits, first).all(axis=1))


def concatenate(parts: Sequence[Encoded]) -> Encoded:
    """Put splits one after another; unlabelled parts take the labels' shape of the labelled one."""
    shape = next((p.labels for p in parts if p.labelled.any()), parts[0].labels)

    def offsets(arrays: Sequence[Array]) -> Array:
        result = np.zeros(1 + sum(len(one) - 1 for one in arrays), arrays[0].dtype)
        at = 0
        for one in arrays:
            end = at + len(one) - 1
            np.add(one[1:], result[at], out=result[at + 1 : end + 1])
            at = end
        return result

    spans_of = [(p.unit_of, p.units) for p in parts if p.unit_of is not None]
    labelled = np.concatenate([p.labelled for p in parts])
    labels = np.zeros(
        (len(labelled), *shape.shape[1:]), shape.dtype
    )  # pages of it that stay zero take no memory
    starts = np.cumsum([0, *map(len, parts)])
    for start, part in zip(starts, parts, strict=False):
        if part.labelled.any():
            labels[start : start + len(part)] = part.labels
    return Encoded(
        token_ids=Joined([p.token_ids for p in parts]),
        segments=Joined([p.segments for p in parts]),
        windows=offsets([p.windows for p in parts]),
        documents=offsets([p.documents for p in parts]),
        full_length=np.concatenate([p.full_length for p in parts]),
        row_id=np.concatenate([p.row_id for p in parts]),
        labels=labels,
        labelled=labelled,
        weights=joined_weights([(len(p), p.weights) for p in parts]),
        unit_of=Joined([places for places, _ in spans_of]) if spans_of else None,
        units=np.concatenate([units for _, units in spans_of]) if spans_of else None,
    )
