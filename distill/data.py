"""Rows: from a source to splits of text, label and row id. Knows no tokenizer and no model.

A row id is a hash of the row's text fields; logits, predictions and splits are joined by it and never by
position. Everything that is left out is counted, and the counts are told.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distill import class_weights, sources, streams
from distill.encoding import epoch_size, joined_weights
from distill.errors import DataError
from distill.ids import among, merge
from distill.labels import read_labels
from distill.schema import Data, Recipe, Split
from distill.spans import Truth
from distill.streams import READ_AT_ONCE, Source, Stream
from distill.tasks import Array, TaskSpec, check_metric

if TYPE_CHECKING:
    import datasets

SplitName = Literal["train", "validation", "test", "test_other", "transfer"]
SPLITS: tuple[SplitName, ...] = ("test", "test_other", "validation", "train", "transfer")
"""Most held out first: a document that stands in two of them stays in the first."""
Texts = Any
"""``datasets.Dataset`` or ``Stream``."""
_NUMBER = re.compile(r"\s*[-+]?[\d.,]+(?:[eE][-+]?\d+)?\s*")


@dataclass(frozen=True)
class Rows:
    """One split."""

    name: SplitName
    dataset: Texts
    """Columns ``text``, for pairs ``text_pair``, and for labelled spans ``answers``; of transfer it may be a stream."""
    row_id: Array
    """``(n,)`` int64."""
    labels: Array | None
    """As in tasks.py; None for transfer."""
    words: Array
    """``(n,)`` int32."""
    weights: Array | None = None
    """``(n,)`` float64: how often each row is drawn in an epoch of training; once where None."""

    def __len__(self) -> int:
        return len(self.row_id)

    def texts(self, indices: Array | slice | None = None) -> list[tuple[str, str | None]]:
        """Read documents as (text, text_pair or None); of a stream they are not to be had in any order."""
        assert not isinstance(self.dataset, Stream), "a stream is read by batches"
        part = self.dataset[:] if indices is None else self.dataset[indices]
        pairs = part.get("text_pair") or [None] * len(part["text"])
        return list(zip(part["text"], pairs, strict=True))

    def batches(self) -> Iterator[list[tuple[str, str | None]]]:
        """Read all documents in their order, some at a time.

        Raises:
            DataError: a stream has other documents than when its ids were taken, or cannot be read any more.
        """
        if not isinstance(self.dataset, Stream):
            for start in range(0, len(self), READ_AT_ONCE):
                yield self.texts(slice(start, start + READ_AT_ONCE))
            return
        at = 0
        for batch in self.dataset.batches():
            ids = self.row_id[at : at + len(batch)]
            if [row_id(*texts) for texts in batch] != ids.tolist():
                raise DataError(
                    f"{self.name}: its text is not what it was when this command began; run it again"
                )
            at += len(batch)
            yield batch
        if at < len(self):
            raise DataError(f"{self.name}: its text is shorter than when this command began; run it again")

    @property
    def draws(self) -> int:
        """Documents of an epoch."""
        return epoch_size(len(self), self.weights)

    @cached_property
    def truth(self) -> Array | None:
        """What metrics read: the labels, or of spans ``(n,)`` the contexts with all their answers."""
        if isinstance(self.dataset, Stream) or "answers" not in self.dataset.column_names:
            return self.labels
        result = np.empty(len(self), dtype=object)
        columns = (self.dataset[name] for name in ("text_pair", "answers"))
        for at, (context, answers) in enumerate(zip(*columns, strict=True)):
            result[at] = Truth(context, tuple(answers["text"]))
        return result

    def select(self, positions: Array) -> Rows:
        """Take some of the rows."""
        labels, weights = (None if x is None else x[positions] for x in (self.labels, self.weights))
        dataset = self.dataset.select(positions)
        return Rows(self.name, dataset, self.row_id[positions], labels, self.words[positions], weights)


@dataclass(frozen=True)
class Corpus:
    """All splits of a recipe, checked."""

    task: TaskSpec
    splits: dict[SplitName, Rows]
    notes: list[str] = field(default_factory=list)
    """What was left out or made different, one sentence each."""

    @property
    def fingerprint(self) -> str:
        """Hash of every split's row ids and labels, in order."""
        digest = hashlib.sha256()
        for name in SPLITS:
            if name in self.splits:
                rows = self.splits[name]
                digest.update(name.encode())
                digest.update(rows.row_id.data)
                digest.update(b"" if rows.labels is None else np.ascontiguousarray(rows.labels).tobytes())
                if not isinstance(rows.dataset, Stream) and "answers" in rows.dataset.column_names:
                    digest.update(repr([one["text"] for one in rows.dataset["answers"]]).encode())
        return digest.hexdigest()


def row_id(text: str, pair: str | None = None) -> int:
    """Hash a row's text fields to 64 bits.

    Two different documents of 100 million share an id with probability 3e-4 (the birthday bound); a row
    that does gets the other one's logits.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    if pair is not None:
        digest.update(b"\x00" + pair.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass(frozen=True)
class _Source:
    """One split of the source after the filters; arrays are over the rows that are kept."""

    dataset: Source
    index: Array
    """``(n,)`` row in ``dataset``."""
    row_id: Array
    words: Array
    labels: Array | None


@dataclass(frozen=True)
class _Kept:
    """What the filters leave of a source."""

    index: Array
    """``(n,)`` int64: the rows."""
    row_id: Array
    words: Array
    read: int
    """Rows of the source."""


def _kept(dataset: Source, data: Data, name: str, notes: list[str]) -> _Kept:
    """Apply the filters."""
    wanted = {k: v if isinstance(v, list) else [v] for k, v in data.where.items()}
    missed: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    only_numbers = True
    columns = list(dict.fromkeys([data.text, *([data.text_pair] if data.text_pair else []), *wanted]))
    at = 0

    def rows() -> Iterator[tuple[int, int, int]]:
        nonlocal at, only_numbers
        for batch in streams.read(dataset, columns, name):
            texts = batch[data.text]
            pairs = batch[data.text_pair] if data.text_pair else [None] * len(texts)
            for row, (text, pair) in enumerate(zip(texts, pairs, strict=True), start=at):
                unlike = next(
                    (c for c, values in wanted.items() if not _is_one_of(batch[c][row - at], values)), None
                )
                if unlike is not None:
                    missed[unlike] += 1
                    continue
                fields = ["" if f is None else str(f) for f in ((text, pair) if data.text_pair else (text,))]
                if not all(f.strip() for f in fields):
                    if data.blank == "refuse":
                        raise DataError(
                            f"{name}, row {row + 1}: the document is blank; mend it, or set data.blank=drop"
                        )
                    left_out["blank"] += 1
                    continue
                count = sum(len(f.split()) for f in fields)
                if data.min_words and count < data.min_words:
                    left_out["shorter than min_words"] += 1
                    continue
                if data.max_words and count > data.max_words:
                    left_out["longer than max_words"] += 1
                    continue
                only_numbers = only_numbers and _NUMBER.fullmatch(fields[0]) is not None
                yield row, row_id(fields[0], fields[1] if data.text_pair else None), count
            at += len(texts)

    # A record a row, in one array that grows: lists of Python's numbers would take five times as much.
    found = np.fromiter(rows(), [("row", np.int64), ("row_id", np.int64), ("words", np.int32)])
    notes += [f"{name}: {count:,} documents left out: {why}" for why, count in left_out.items()]
    if not len(found):
        reasons = [*(f"{count:,} {why}" for why, count in left_out.items())]
        for column, count in missed.items():
            seen = dict.fromkeys(f"{cell!r:.30}" for cell in dataset[:1000][column])
            shown = ", ".join(list(seen)[:10])
            reasons.append(f"{count:,} unlike data.where.{column}={wanted[column]} (it is {shown})")
        raise DataError(f"{name}: no rows left of {at:,}: {'; '.join(reasons)}")
    if only_numbers:
        raise DataError(
            f"{name}: column {data.text!r} holds a number in every row, and no text; name the text's column in data.text"
        )
    index, ids, words = (np.ascontiguousarray(found[field]) for field in ("row", "row_id", "words"))
    return _Kept(index, ids, words, at)


def _is_one_of(cell: Any, values: list[Any]) -> bool:
    """Say whether a cell has one of the values; a csv's cells are text, whatever is written in them."""
    for value in values:
        if isinstance(cell, str) and isinstance(value, bool):
            same = cell.strip().lower() == str(value).lower()
        elif isinstance(cell, str) and isinstance(value, int | float):
            try:
                same = float(cell) == value
            except ValueError:
                same = False
        else:
            same = cell == value
        if same:
            return True
    return False


def _size(split: Split, available: int, where: str) -> int | None:
    if split.rows is not None and split.rows > available:
        raise DataError(
            f"{where} wants {split.rows:,} rows, and only {available:,} are left in {split.source!r}"
        )
    if split.rows is not None:
        return split.rows
    return None if split.fraction is None else max(1, round(split.fraction * available))


def _draw(candidates: Array, count: int, labels: Array | None, seed: int) -> Array:
    """Draw rows at random; stratified where there are class numbers and each class has two rows."""
    from sklearn.model_selection import train_test_split

    if count == len(candidates):
        return candidates
    strata = None
    if labels is not None and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        sizes = np.unique(labels[candidates], return_counts=True)[1]
        if sizes.min() >= 2 and min(count, len(candidates) - count) >= len(sizes):
            strata = labels[candidates]
    taken, _ = train_test_split(candidates, train_size=count, random_state=seed, stratify=strata)
    return np.asarray(taken)


def _carve(source: _Source, wanted: dict[SplitName, Split], seed: int) -> dict[SplitName, Array]:
    """Cut one source split into disjoint parts; return positions into the source's arrays.

    Parts with a size are drawn first, the transfer set after the labelled ones and without a look at
    labels; the one without a size takes what is left.
    """
    whole = [name for name in SPLITS if name in wanted and wanted[name].rows is wanted[name].fraction is None]
    if len(whole) > 1:
        raise DataError(
            f"data.splits.{whole[1]} and data.splits.{whole[0]} both take the whole of {wanted[whole[0]].source!r}; "
            "give one of them rows or fraction"
        )
    total = left = np.arange(len(source.index))
    result: dict[SplitName, Array] = {}
    for name in [n for n in SPLITS if n in wanted and n not in whole]:
        split = wanted[name]
        share = len(total) if split.fraction is not None else len(left)
        count = _size(split, share, f"data.splits.{name}")
        assert count is not None
        if count > len(left) + len(wanted):  # more than what rounding adds
            raise DataError(
                f"data.splits.{name} wants {count:,} rows ({split.fraction:.0%} of {len(total):,}), and the other "
                f"splits leave {len(left):,} in {split.source!r}"
            )
        labels = None if name == "transfer" else source.labels
        result[name] = np.sort(_draw(left, min(count, len(left)), labels, seed))
        left = np.setdiff1d(left, result[name], assume_unique=True)
    for name in whole:
        result[name] = left
    return result


def _without_repeats(source: _Source, name: str, notes: list[str]) -> _Source:
    """Keep the first of equal documents, so that the parts of a source share none."""
    order = np.argsort(source.row_id, kind="stable")
    ids = source.row_id[order]
    fresh = np.concatenate([[True], ids[1:] != ids[:-1]])
    if fresh.all():
        return source
    note = f"{name}: {int((~fresh).sum()):,} repeated documents left out"
    if source.labels is not None:
        firsts = order[fresh][np.cumsum(fresh) - 1]
        unlike = source.labels[order] != source.labels[firsts]
        contrary = int(unlike.reshape(len(unlike), -1).any(axis=1).sum())
        note += f", {contrary:,} of them with another label than the first" if contrary else ""
    notes.append(note)
    first = np.sort(order[fresh])
    labels = None if source.labels is None else source.labels[first]
    return _Source(source.dataset, source.index[first], source.row_id[first], source.words[first], labels)


def load(recipe: Recipe) -> Corpus:
    """Read a recipe's data.

    Raises:
        DataError: a file, column, label or split is not what the recipe says.
        HubError: a hub data set that is neither here nor reachable.
        RecipeError: the task has no such metric.
    """
    data, kind = recipe.data, recipe.task.kind
    metric = check_metric(kind, recipe.task.metric)
    wanted: dict[SplitName, Split] = {
        name: split for name in SPLITS if (split := getattr(data.splits, name)) is not None
    }
    by_source: dict[str, dict[SplitName, Split]] = {}
    for name, split in wanted.items():
        by_source.setdefault(split.source, {})[name] = split
    opened = sources.open_all(data, list(by_source))
    labelled = [source for source, uses in by_source.items() if set(uses) != {"transfer"}]
    label_columns = data.label if isinstance(data.label, list) else [data.label]
    texts = [data.text, *([data.text_pair] if data.text_pair else [])]
    notes: list[str] = []
    kept: dict[str, _Kept] = {}
    for source, dataset in opened.items():
        own = label_columns if source in labelled else []
        sources.check_columns(dataset, [*texts, *data.where, *own], source)
        sources.check_text(dataset, texts, source)
        kept[source] = _kept(dataset, data, source, notes)
    labels = read_labels(
        {source: (opened[source], kept[source].index) for source in labelled}, data, recipe.task
    )
    task = TaskSpec(kind, labels.names, metric)
    class_weights.check(recipe.task.class_weights, task.labels)

    parts: dict[SplitName, tuple[_Source, Array]] = {}
    for source, dataset in opened.items():
        found = kept[source]
        values = labels.numbers(dataset, found.index, source) if source in labelled else None
        part = _Source(dataset, found.index, found.row_id, found.words, values)
        if data.deduplicate and len(by_source[source]) > 1:
            part = _without_repeats(part, source, notes)
        try:
            cut = _carve(part, by_source[source], data.seed)
        except DataError as error:
            raise DataError("; ".join([str(error), *notes])) from None
        parts |= {use: (part, positions) for use, positions in cut.items()}

    splits: dict[SplitName, Rows] = {}
    seen = np.array([], dtype=np.int64)
    for name in SPLITS:
        if name not in parts:
            continue
        part, positions = parts[name]
        if data.deduplicate:
            fresh = ~np.isin(part.row_id[positions], seen)
            if not fresh.all():
                dropped = int((~fresh).sum())
                notes.append(
                    f"{name}: {dropped:,} documents dropped that stand in a more held-out split as well"
                )
                if dropped == len(positions):
                    raise DataError(
                        f"split {name}: every one of its {dropped:,} documents stands in a more held-out split as well"
                    )
            positions = positions[fresh]
            seen = np.union1d(seen, part.row_id[positions])
        splits[name] = _rows(name, part, positions, data, task)
    if data.transfer:
        splits["transfer"] = _with_unlabelled(splits.get("transfer"), data, seen, notes)
    notes += _unseen(splits["train"], task)
    return Corpus(task, splits, notes)


def read_text(data: Data, address: str, key: str, notes: list[str], *, streaming: bool = False) -> Rows:
    """Read a source of unlabelled text, each document once.

    Args:
        data: how rows are read and filtered; its source, splits, format and ``where`` are not for this one.
        address: of the source.
        key: the recipe's key that names it.
        notes: gets a sentence for whatever is left out.
        streaming: leave the text where it is.

    Raises:
        DataError: it is missing, unreadable, has no such column or no rows.
    """
    own = data.model_copy(update={"where": {}, "format": "auto", "config": None})
    dataset = sources.open_text(own, address, key, streaming=streaming)
    columns = [own.text, *([own.text_pair] if own.text_pair else [])]
    sources.check_columns(dataset, columns, address)
    sources.check_text(dataset, columns, address)
    found = _kept(dataset, own, address, notes)
    part = _without_repeats(_Source(dataset, found.index, found.row_id, found.words, None), address, notes)
    if not streaming:
        texts = _texts(part, np.arange(len(part.index)), own)
        return Rows("transfer", texts, part.row_id, None, part.words)
    kept = np.zeros(found.read, bool)
    kept[part.index] = True
    stream = Stream((streams.Part(dataset, tuple(columns), kept, address),))
    return Rows("transfer", stream, part.row_id, None, part.words)


def without(rows: Rows, seen: Array, where: str, held: str, notes: list[str]) -> Rows:
    """Leave out the rows whose ids are in ``seen``, and note how many, and that they stand in ``held``.

    Raises:
        DataError: all of them are.
    """
    fresh = ~among(rows.row_id, np.sort(seen))
    dropped = int((~fresh).sum())
    if dropped == len(rows):
        raise DataError(f"{where}: every one of its {dropped:,} documents stands in {held} as well")
    if dropped:
        notes.append(f"{where}: {dropped:,} documents dropped that stand in {held} as well")
    return rows.select(np.flatnonzero(fresh)) if dropped else rows


def _with_unlabelled(transfer: Rows | None, data: Data, seen: Array, notes: list[str]) -> Rows:
    """Join the sources of ``data.transfer`` to the transfer set.

    Args:
        transfer: the rows of ``data.splits.transfer``, where there are any.
        data: the recipe's section.
        seen: ids of all rows of all splits.
        notes: gets a sentence for whatever is left out, and one for each source.
    """
    parts = [] if transfer is None else [transfer]
    for number, source in enumerate(data.transfer):
        key = f"data.transfer.{number}"
        own = data.model_copy(update={"text": source.text or data.text})
        rows = read_text(own, source.source, f"{key}.source", notes, streaming=source.streaming)
        if data.deduplicate:
            rows = without(rows, seen, source.source, "test, validation, train or transfer", notes)
        if source.rows is not None:
            if source.rows > len(rows):
                raise DataError(
                    f"{key}.rows wants {source.rows:,} rows, and only {len(rows):,} are left in {source.source}"
                )
            drawn = np.random.default_rng([data.seed, number]).choice(len(rows), source.rows, replace=False)
            rows = rows.select(np.sort(drawn))
        seen = merge(seen, rows.row_id)
        notes.append(
            f"transfer: {len(rows):,} documents of {source.source}, each drawn {source.weight:g} times an epoch"
        )
        parts.append(replace(rows, weights=np.broadcast_to(source.weight, len(rows))))
    return join(parts)


def join(parts: Sequence[Rows]) -> Rows:
    """Put unlabelled rows one after another, as a transfer set."""
    if len(parts) == 1:
        return replace(parts[0], name="transfer", labels=None)
    return Rows(
        "transfer",
        _chain([part.dataset for part in parts]),
        np.concatenate([part.row_id for part in parts]),
        None,
        np.concatenate([part.words for part in parts]),
        joined_weights([(len(part), part.weights) for part in parts]),
    )


def _chain(texts: Sequence[Texts]) -> Texts:
    """Put texts one after another; they are a stream where one of them is."""
    import datasets

    if not any(isinstance(one, Stream) for one in texts):
        return datasets.concatenate_datasets([one.cast(texts[0].features) for one in texts])
    return Stream(tuple(part for one in texts for part in streams.parts_of(one)))


def _unseen(train: Rows, task: TaskSpec) -> list[str]:
    """Note the classes that no training row has: labels that count from 1 leave a class 0 that is none."""
    absent = [name for name, count in describe(train, task)["labels"].items() if count == 0]
    if task.kind in ("regression", "span") or not absent:
        return []
    more = f" and {len(absent) - 10:,} more" if len(absent) > 10 else ""
    return [f"train: no row has class {', '.join(absent[:10])}{more}, of {task.classes:,} classes"]


def _rows(name: SplitName, part: _Source, positions: Array, data: Data, task: TaskSpec) -> Rows:
    if len(positions) == 0:
        raise DataError(f"split {name} is empty: the other splits take every row; look at data.splits")
    labels = None if name == "transfer" or part.labels is None else part.labels[positions]
    if task.kind == "single_label" and name in ("train", "validation") and labels is not None:
        present = np.unique(labels)
        if len(present) < 2:
            raise DataError(
                f"split {name} has one class only ({task.labels[int(present[0])]!r} in all {len(labels):,} rows); "
                "is the file sorted by label, or data.where too narrow?"
            )
    ranked = task.metric in ("roc_auc", "average_precision")
    if ranked and labels is not None and not (labels.min(axis=0) < labels.max(axis=0)).any():
        raise DataError(
            f"split {name} has no label with rows of both kinds, so {task.metric} cannot be measured on it; "
            "make it larger, or set task.metric=micro_f1"
        )
    answers = labels is not None and task.kind == "span"
    dataset = _texts(part, positions, data, answers=answers)
    return Rows(name, dataset, part.row_id[positions], labels, part.words[positions])


def _texts(part: _Source, positions: Array, data: Data, *, answers: bool = False) -> datasets.Dataset:
    """Take rows' text fields, and their answers, under the names that ``Rows`` has for them."""
    dataset = part.dataset.select(part.index[positions])
    columns = {data.text: "text", **({data.text_pair: "text_pair"} if data.text_pair else {})}
    if answers:
        columns[str(data.label)] = "answers"
    dataset = dataset.select_columns(list(columns)).rename_columns(
        {k: v for k, v in columns.items() if k != v}
    )
    return sources.as_text(dataset)


def describe(rows: Rows, task: TaskSpec) -> dict[str, Any]:
    """Count rows and labels of a split, for a dry run."""
    if rows.labels is None:
        return {"rows": len(rows), "labels": {}}
    if task.kind == "regression":
        return {
            "rows": len(rows),
            "labels": {"mean": float(rows.labels.mean()), "std": float(rows.labels.std())},
        }
    if task.kind == "span":
        none = int((rows.labels[:, 0] == 0).sum())
        return {"rows": len(rows), "labels": {"answer": len(rows) - none, "no answer": none}}
    counts = (
        np.bincount(rows.labels, minlength=task.classes)
        if task.kind == "single_label"
        else rows.labels.sum(axis=0).astype(int)
    )
    return {"rows": len(rows), "labels": dict(zip(task.labels, counts.tolist(), strict=True))}
