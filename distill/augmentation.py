"""Copies of documents with words left out or replaced: more rows for the transfer set, without labels.

The heuristics are those of Tang et al. 2019, section 3.1, with two differences. A word is replaced by one that
stands near it in a checkpoint's table of embeddings, and not by one of the same part of speech. And where they
write a mask's token, the word is left out: a copy is one text, with one row id, for a teacher and students
whose tokenizers write that token each in its own way (``[MASK]``, ``<mask>``) or have none, and what the one
knows as its mask the other would read as brackets and letters.

The copies are written once, to ``runs/_augmented/<key>-<sha256[:16]>.jsonl``, and read as any other unlabelled text
is; a file whose name is not its hash is made again. What is
drawn for a copy depends on the seed, its original's row id and its number alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from distill import data, models, pretrained, processes
from distill.data import Corpus, Rows
from distill.encoding import Tokenizer
from distill.errors import RecipeError
from distill.files import replacing, sha256_file, sha256_json
from distill.progress import track
from distill.runs import runs_folder
from distill.schema import Augment, Model, Recipe
from distill.tasks import Array, Floats

FORMAT = 1
BLOCK = 256
"""Words whose cosines to all others are held at once."""
_WORD = re.compile(r"([^\w<>/@#&]*)([^\W\d_]+)([^\w<>/@#&]*)")
"""Punctuation, letters, punctuation; tags and addresses are no words."""

Near = Mapping[str, Sequence[str]]
"""Entries of a vocabulary that are whole words, each with the words near it, the nearest first."""


def extend(recipe: Recipe, corpus: Corpus) -> Corpus:
    """Add augmented copies to the transfer set, where a recipe asks for them; no other split changes.

    Raises:
        RecipeError: there is no split to copy, or the vocabulary of the embeddings has no whole words.
        DataError: no copy is new text, or the checkpoint cannot be read.
        HubError: the checkpoint is neither here nor reachable.
    """
    settings = recipe.data.augment
    if settings is None:
        return corpus
    for name in settings.source:
        if name not in corpus.splits:
            raise RecipeError(f"data.augment.from: the recipe has no {name} rows")
    parts = [corpus.splits[name] for name in settings.source]
    path = processes.agree(str(_written(recipe, settings, parts)) if processes.is_main() else "")
    # Filters are for choosing documents, and these have been chosen; the file has columns of its own.
    own = recipe.data.model_copy(
        update={
            "text": "text", "text_pair": recipe.data.text_pair and "text_pair",
            "blank": "drop", "min_words": None, "max_words": None,
        }
    )  # fmt: skip
    notes: list[str] = []
    rows = data.read_text(own, path, "data.augment", notes)
    seen = np.concatenate([split.row_id for split in corpus.splits.values()])
    rows = data.without(rows, seen, path, "test, validation, train or transfer", notes)
    notes.append(
        f"transfer: {len(rows):,} augmented copies of {sum(map(len, parts)):,} documents of "
        f"{' and '.join(settings.source)}, each drawn {settings.weight:g} times an epoch"
    )
    rows = replace(rows, weights=np.broadcast_to(settings.weight, len(rows)))
    before = [corpus.splits["transfer"]] if "transfer" in corpus.splits else []
    splits = {**corpus.splits, "transfer": data.join([*before, rows])}
    return replace(corpus, splits=splits, notes=[*corpus.notes, *notes])


def _written(recipe: Recipe, settings: Augment, parts: Sequence[Rows]) -> Path:
    """Return the file of the copies of these rows; write it where it is not there yet."""
    words: dict[str, int] = {}
    table: Floats = np.zeros((0, 1), np.float32)
    if settings.replace:
        words, table = _vocabulary(recipe, settings)
    key = sha256_json(
        {
            "format": FORMAT,
            "settings": settings.model_dump(mode="json", exclude={"source", "weight", "checkpoint"}),
            "rows": hashlib.sha256(b"".join(part.row_id.tobytes() for part in parts)).hexdigest(),
            "words": list(words),
            "table": hashlib.sha256(table.tobytes()).hexdigest(),
        }
    )
    place = runs_folder() / "_augmented"
    place.mkdir(parents=True, exist_ok=True)
    # Of two jobs the second reads what the first has written.
    with FileLock(runs_folder() / ".augmented.lock"):
        for path in place.glob(f"{key[:16]}-*.jsonl"):
            if sha256_file(path).startswith(path.stem.partition("-")[2]):
                return path
            path.unlink()
        for leftover in place.glob(".*.tmp"):  # of a process that was killed
            leftover.unlink()
        return _write(place, key[:16], settings, parts, words, table)


def _write(
    place: Path, key: str, settings: Augment, parts: Sequence[Rows], words: dict[str, int], table: Floats
) -> Path:
    """Write the file of the copies, whose name is the key and what it holds."""
    near = near_words(list(words), table, occurring(parts, words), settings.neighbours) if words else {}
    staged = place / f".{key}.part.tmp"
    with (
        replacing(staged) as aside,
        aside.open("w", encoding="utf-8") as file,
        track("augmenting", sum(map(len, parts)), "documents") as progress,
    ):
        for part in parts:
            for row_id, text, pair in _documents(part):
                for copy in range(settings.copies):
                    made = vary(text, pair, row_id, copy, settings, near)
                    file.write(json.dumps({"of": row_id, "copy": copy, **made}, ensure_ascii=False) + "\n")
                progress.advance()
    path = place / f"{key}-{sha256_file(staged)[:16]}.jsonl"
    staged.replace(path)
    return path


def _documents(rows: Rows) -> Iterator[tuple[int, str, str | None]]:
    at = 0
    for batch in rows.batches():
        for row_id, (text, pair) in zip(rows.row_id[at : at + len(batch)].tolist(), batch, strict=True):
            yield row_id, text, pair
        at += len(batch)


def vary(
    text: str, pair: str | None, row_id: int, copy: int, settings: Augment, near: Near
) -> dict[str, str]:
    """Make one copy of a document, each text of a pair on its own; one that stays as it was is its original.

    Args:
        text: the document.
        pair: its second text, where there is one.
        row_id: its.
        copy: the number of the copy.
        settings: shares of words, and how many there are to choose from.
        near: of every word that may be replaced.

    Returns:
        The copy by column: ``text`` and, of a pair, ``text_pair``; blank where no word is left.
    """
    rng = np.random.default_rng([settings.seed, row_id % 2**64, copy])
    texts = {"text": text} if pair is None else {"text": text, "text_pair": pair}
    made = {}
    for column, whole in texts.items():
        words = whole.split()
        varied = _vary(words, settings, near, rng)
        made[column] = whole if varied == words else " ".join(varied)
    return made


def _vary(words: list[str], settings: Augment, near: Near, rng: np.random.Generator) -> list[str]:
    fate = rng.random(len(words))
    result = words.copy()
    touched = np.flatnonzero(fate < settings.delete + settings.replace)
    for at, draw in zip(touched.tolist(), rng.random(len(touched)).tolist(), strict=True):
        result[at] = "" if fate[at] < settings.delete else replaced(words[at], near, draw)
    result = [word for word in result if word]
    whether, how_long, where = rng.random(3).tolist()
    if whether < settings.ngram:
        length = min(len(result), 1 + int(how_long * settings.longest_ngram))
        start = int(where * (len(result) - length + 1))
        result = result[start : start + length]
    return result


def replaced(word: str, near: Near, draw: float) -> str:
    """Put a near word in a word's place, between its punctuation and with its capitals.

    Args:
        word: as it stands in the text.
        near: the words to choose from.
        draw: from 0 to 1, less than 1; which of them is taken.

    Returns:
        The word itself where it has none.
    """
    found = _WORD.fullmatch(word)
    entry = found and _entry(found[2], near)
    if not found or not entry or not near[entry]:
        return word
    before, letters, after = found.groups()
    new = near[entry][int(draw * len(near[entry]))]
    if entry != letters:
        if letters.isupper() and len(letters) > 1:
            new = new.upper()
        elif letters[0].isupper():
            new = new.capitalize()
    return f"{before}{new}{after}"


def _entry(letters: str, known: Collection[str]) -> str | None:
    """Find a word in a vocabulary, as it is written or in small letters."""
    return next((form for form in (letters, letters.lower()) if form in known), None)


def occurring(parts: Sequence[Rows], known: Collection[str]) -> list[str]:
    """List the entries of a vocabulary that occur in documents, sorted."""
    words: set[str] = set()
    for part in parts:
        for _, text, pair in _documents(part):
            words.update(text.split(), (pair or "").split())
    found = (_WORD.fullmatch(word) for word in words)
    return sorted({entry for one in found if one and (entry := _entry(one[2], known))})


def whole_words(tokenizer: Tokenizer) -> dict[str, int]:
    """List the entries of a vocabulary that are one word of letters each, with their numbers.

    Such an entry is what the tokenizer makes of the word that it is written as: no special token is, and no piece
    from inside a word. (A piece that only begins words cannot be told from a word; byte-level vocabularies have some.)
    """
    special = set(tokenizer.all_special_ids)
    entries = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    written = [
        (number, word)
        for number, token in entries
        if number not in special and (word := tokenizer.convert_tokens_to_string([token]).strip()).isalpha()
    ]
    # A byte-level vocabulary has a word that begins a text apart from one with a blank before it.
    texts = [f" {word}" for _, word in written]
    read = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return {word: number for (number, word), ids in zip(written, read, strict=True) if ids == [number]}


def near_words(words: Sequence[str], table: Floats, wanted: Sequence[str], count: int) -> Near:
    """Find the words nearest to each wanted one, by the cosine of their embeddings.

    In float64 and rounded to nine digits, equal ones in the vocabulary's order: the sums of no machine change it.

    Args:
        words: the vocabulary.
        table: ``(words, width)``, the embedding of each.
        wanted: those of the words whose neighbours are asked for.
        count: how many each has, itself not among them; fewer where the vocabulary has no more.

    Returns:
        The wanted words with their neighbours, the nearest first.
    """
    unit = table.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    number = {word: at for at, word in enumerate(words)}
    rows = np.array([number[word] for word in wanted], dtype=np.int64)
    count = min(count, len(words) - 1)
    near: dict[str, list[str]] = {}
    with track("looking for near words", len(rows), "words") as progress:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            for row, chosen in zip(block.tolist(), _nearest(unit, block, count), strict=True):
                near[words[row]] = [words[at] for at in chosen]
            progress.advance(len(block))
    return near


def _nearest(unit: Array, rows: Array, count: int) -> Iterator[list[int]]:
    """Yield, for each of the rows, the ``count`` others of largest cosine in ``unit``."""
    cosines = np.round(unit[rows] @ unit.T, 9)
    cosines[np.arange(len(rows)), rows] = -2.0  # itself
    for own in cosines:
        if count == 0:
            yield []
            continue
        reach = np.partition(own, -count)[-count]
        candidates = np.flatnonzero(own >= reach)
        yield candidates[np.argsort(-own[candidates], kind="stable")][:count].tolist()


def _vocabulary(recipe: Recipe, settings: Augment) -> tuple[dict[str, int], Floats]:
    """Read the whole words of the checkpoint that tells which are near, and their embeddings."""
    named = Model(architecture="any", checkpoint=settings.checkpoint)
    sections: dict[str, Any] = {"data.augment": named, "teacher": recipe.teacher, "student": recipe.student}
    section, model = next((s, m) for s, m in sections.items() if m.checkpoint is not None)
    key = f"{section}.checkpoint"
    tokenizer = models.load_tokenizer(model, section)
    table = pretrained.word_embeddings(model.checkpoint, key)
    words = {word: number for word, number in whole_words(tokenizer).items() if number < len(table)}
    if not words:
        raise RecipeError(
            f"{key}: no entry of its vocabulary is a whole word; set data.augment.replace=0, "
            "or data.augment.checkpoint to another"
        )
    return words, np.ascontiguousarray(table[list(words.values())])
