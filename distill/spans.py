"""Answers that stand in a text: units of it, the span that logits mean, SQuAD's figures. Knows no tokenizer and no model.

A context is cut into units, runs of letters and digits or single other signs, by one rule for all; they are counted
from 1, and unit 0 stands for "no answer". Logits are of units ``(units, 2)``, the answer's first and its last, so
that models of any two tokenizers can be laid on one another. An answer is a pair of units, 0 twice where there is none.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from distill.tasks import Array

UNIT = re.compile(r"\w+|[^\w\s]")
LONGEST = 30
"""Units that a predicted answer may have (Devlin et al. 2019 allow as many tokens)."""
_SIGNS = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True)
class Truth:
    """What a predicted answer is held against."""

    context: str
    answers: Sequence[str]
    """Those that count as right; none where the context has no answer."""


def units(context: str) -> Array:
    """Find a context's units: ``(units, 2)``, the characters where each begins and ends, unit 1 first."""
    return np.array([unit.span() for unit in UNIT.finditer(context)], np.int64).reshape(-1, 2)


def touched(bounds: Array, starts: Array, ends: Array) -> Array:
    """Find the first and the last unit that stretches of characters touch.

    Args:
        bounds: what :func:`units` found.
        starts: ``(n,)`` characters.
        ends: ``(n,)`` characters, behind the last of each stretch.

    Returns:
        ``(n, 2)``; -1 twice where a stretch touches none.
    """
    first = np.searchsorted(bounds[:, 1], starts, side="right") + 1
    last = np.searchsorted(bounds[:, 0], ends, side="left")
    return np.where((first <= last)[:, None], np.stack([first, last], axis=1), -1)


def best(logits: Array) -> Array:
    """Choose each document's answer: the likeliest of at most 30 units, or none where that is as likely.

    Args:
        logits: ``(n, units, 2)``, unit 0 first.

    Returns:
        ``(n, 2)``, the answers' first and last units.
    """
    first, last = logits[..., 0], logits[..., 1]
    rows, result, score = (
        np.arange(len(logits)),
        np.zeros((len(logits), 2), np.int64),
        first[:, 0] + last[:, 0],
    )
    for more in range(min(LONGEST, logits.shape[1] - 1)):
        sums = first[:, 1 : logits.shape[1] - more] + last[:, 1 + more :]
        at = sums.argmax(axis=1)
        higher = sums[rows, at] > score
        score = np.where(higher, sums[rows, at], score)
        result[higher] = np.stack([at + 1, at + 1 + more], axis=1)[higher]
    return result


def place(context: str, span: Sequence[int]) -> tuple[int, int] | None:
    """Return the characters where an answer begins and ends; None where there is none."""
    first, last = span
    if not first:
        return None
    bounds = units(context)
    return int(bounds[first - 1, 0]), int(bounds[last - 1, 1])


def figures(predicted: Array, truth: Iterable[Truth]) -> dict[str, float]:
    """Compute exact match and F1 of words, each the best over a row's answers (Rajpurkar et al. 2016, section 6).

    Case, punctuation and articles do not count. Where nothing is right but no answer, that counts 1 and any other 0
    (Rajpurkar et al. 2018). Means over the rows, from 0 to 1.

    Args:
        predicted: ``(n, 2)`` as of :func:`best`.
        truth: of each row.
    """
    exact = f1 = 0.0
    for span, row in zip(predicted, truth, strict=True):
        found = place(row.context, span)
        given = _words(row.context[slice(*found)]) if found else []
        right = [words for words in map(_words, row.answers) if words] or [[]]
        exact += max(given == words for words in right)
        f1 += max(_f1(given, words) for words in right)
    return {"f1": f1 / len(predicted), "exact_match": exact / len(predicted)}


def _words(text: str) -> list[str]:
    """Split a text into the words that count."""
    return _ARTICLES.sub(" ", text.lower().translate(_SIGNS)).split()


def _f1(given: list[str], right: list[str]) -> float:
    if not given or not right:
        return float(given == right)
    shared = (Counter(given) & Counter(right)).total()
    return 2 * shared / (len(given) + len(right))
