"""What a student learns from its teachers: their cached logits by row id, made one target. Knows no student's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distill import caching, logits, models
from distill.calibration import Calibration, calibrate
from distill.data import Corpus
from distill.progress import say
from distill.schema import Recipe
from distill.tasks import Array, Floats
from distill.training import Lookup


@dataclass(frozen=True)
class Targets:
    """A look-up of soft targets, and where they come from."""

    lookup: Lookup
    caches: list[str]
    """Folders of the cached logits."""
    calibration: Calibration | None
    """Of the target, where the recipe asks for it; the look-up divides by its temperature already."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a student's run writes down of them."""
        fitted = {"calibration": asdict(self.calibration)} if self.calibration else {}
        return {"logits": self.caches, **fitted}


def open_targets(
    recipe: Recipe, corpus: Corpus, teachers: Sequence[caching.TeacherRef], cached: str | None
) -> Targets:
    """Open (or fill) the caches of all teachers and make one look-up of them.

    Args:
        recipe: the student's.
        corpus: its rows.
        teachers: whose logits.
        cached: a cache's name or folder to take in place of filling one.

    Raises:
        LogitsError: the cache is of other teachers, labels or rows.
        DataError: the validation rows settle no temperature.
    """
    opened: list[logits.Logits]
    if cached is not None:
        cache = logits.Logits(logits.find(cached))
        logits.refuse_difference(
            cache.key, {"kind": corpus.task.kind, "labels": list(corpus.task.labels)}, cache.folder.name
        )
        for teacher in teachers:
            if teacher.run is not None:
                model = models.load(teacher.model)
                logits.refuse_difference(
                    cache.key,
                    logits.key_of(model, cache.key["precision"], cache.key["dtype"]),
                    cache.folder.name,
                )
        opened = [cache]
    else:
        opened = [caching.cache_logits(teacher, recipe, corpus) for teacher in teachers]
    needed = ["train", "transfer", *(["validation"] if recipe.student.calibrate else [])]
    for cache in opened:
        for name, rows in corpus.splits.items():
            if name in needed:
                cache.require(rows.row_id)

    def mean(row_ids: Array) -> Floats:
        return logits.mean(corpus.task.kind, [cache(row_ids) for cache in opened], recipe.student.ensemble)

    caches = [str(cache.folder) for cache in opened]
    if not recipe.student.calibrate:
        return Targets(mean, caches, None)
    held_out = corpus.splits["validation"]
    assert held_out.labels is not None, "only transfer rows have no labels"
    found = calibrate(corpus.task.kind, mean(held_out.row_id), held_out.labels)
    say(f"the teacher's logits are divided by {found}")
    return Targets(lambda row_ids: mean(row_ids) / np.float32(found.temperature), caches, found)
