"""How a model with a short window reads a long document. Pure functions of token ids.

head       the first tokens
tail       the last tokens
head_tail  half of the window from each end (Sun et al. 2019, section 5.3.1)
chunks     several windows from the beginning on; their logits are pooled before the loss (see pooling.py),
so that the pooled logit is what meets the teacher's
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

View = Literal["head", "tail", "head_tail", "chunks"]


def cut(
    ids: Sequence[int], room: int, view: View, max_windows: int = 8, overlap: int = 0
) -> list[Sequence[int]]:
    """Cut a document into the windows that a model reads.

    Args:
        ids: the document's tokens, without special ones.
        room: tokens that fit one window beside the special ones; at least 1.
        view: which part is read.
        max_windows: with ``chunks``, at most this many windows.
        overlap: with ``chunks``, tokens that neighbouring windows share; less than ``room``.

    Returns:
        One window, or with ``chunks`` one or more, of at most ``room`` tokens each.
    """
    if len(ids) <= room:
        return [ids]
    if view == "head":
        return [ids[:room]]
    if view == "tail":
        return [ids[-room:]]
    if view == "head_tail":
        tail = room // 2
        return [[*ids[: room - tail], *ids[len(ids) - tail :]]]
    stride = room - overlap
    starts = range(0, max(len(ids) - overlap, 1), stride)
    return [ids[start : start + room] for start in starts[:max_windows]]


def cut_pair(first: Sequence[int], second: Sequence[int], room: int) -> tuple[Sequence[int], Sequence[int]]:
    """Cut a pair of texts to ``room`` tokens together, from the longer one first.

    The same tokens are left as with the tokenizers' own ``truncation="longest_first"``.
    """
    if len(first) + len(second) <= room:
        return first, second
    less = min(len(first), len(second), room // 2)
    if len(first) > len(second):
        return first[: room - less], second[:less]
    return first[:less], second[: room - less]
