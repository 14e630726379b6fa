"""Pre-training of a student on unlabelled text, before it learns the task (Gururangan et al. 2020).

The text is the recipe's own train and transfer rows, and whatever other sources it names; never a row of
validation or test. The result is a folder that a recipe names by ``student.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill import (
    caching,
    catalog,
    data,
    fitting,
    hub,
    inference,
    masked_live,
    models,
    planning,
    pretrained,
    runs,
    tracking,
)
from distill.data import Rows
from distill.encoding import Encoded, Tokenizer
from distill.errors import RecipeError
from distill.files import replacing_folder, sha256_json
from distill.masked_live import MaskedPair
from distill.masking import HeldOut, MaskedLanguage, MaskedModel, Masking, pack
from distill.progress import say, track
from distill.runs import RunFolder
from distill.schema import Recipe
from distill.tasks import TaskSpec
from distill.training import Trained, train

HELD: tuple[data.SplitName, ...] = ("validation", "test", "test_other")
"""Splits of which no row is trained on."""


@dataclass(frozen=True)
class _Material:
    """What a run needs."""

    model: MaskedModel
    windows: Encoded
    held_out: Encoded
    """Windows of the validation rows."""
    fingerprint: str
    """Hash of all row ids."""
    pair: MaskedPair | None
    """The model with its teacher beside it, where it has one."""


def read(recipe: Recipe) -> tuple[Rows, Rows]:
    """Read the text to train on, and that of validation; say what was left out.

    Raises:
        RecipeError: the rows are pairs of texts, or there is no validation split.
        DataError: a source is missing, or leaves no rows.
    """
    if recipe.data.text_pair is not None:
        raise RecipeError(
            "data.text_pair: pre-training reads single texts; pre-train with a recipe without pairs"
        )
    # Copies with words left out are no text to learn a language from.
    plain = recipe.data.model_copy(update={"augment": None})
    corpus = fitting.load_corpus(recipe.model_copy(update={"data": plain}))
    if "validation" not in corpus.splits:
        raise RecipeError("data.splits.validation is missing: the perplexity is measured on it")
    held = np.concatenate([corpus.splits[name].row_id for name in HELD if name in corpus.splits])
    notes: list[str] = []
    parts: list[Rows] = []
    for name in ("train", "transfer"):
        if name in corpus.splits:
            # With data.deduplicate=false they may share rows, and held-out text stays held out all the same.
            parts.append(data.without(corpus.splits[name], held, name, "validation or test", notes))
    own = np.concatenate([part.row_id for part in parts])
    for number, source in enumerate(recipe.pretraining.corpus):
        key = f"pretraining.corpus.{number}"
        rows = data.read_text(recipe.data, source, key, notes)
        rows = data.without(rows, held, source, "validation or test", notes)
        rows = data.without(rows, own, source, "the text before it", notes)
        notes.append(f"{source}: {len(rows):,} documents")
        own = np.union1d(own, rows.row_id)
        parts.append(rows)
    for note in notes:
        say(note)
    return data.join(parts), corpus.splits["validation"]


def build(recipe: Recipe, teacher: Path | None = None) -> MaskedModel:
    """Make the student with a masked-language-model head, from its checkpoint or with random weights.

    ``teacher`` is the teacher's model folder or hub id, for students that take something from it.

    Raises:
        RecipeError: transformers has no such head for it, or what :func:`distill.models.build` refuses.
        HubError: the checkpoint is neither here nor reachable.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM

    student = recipe.student
    module = catalog.load("student", student.architecture)
    if not hasattr(module, "build"):
        raise RecipeError(f"student.architecture: {student.architecture} has no masked-language-model head")
    tokenizer = _tokenizer(recipe, teacher)
    masking = Masking(tokenizer, recipe.pretraining.masked)
    torch.manual_seed(recipe.pretraining.train.seed)
    # The architecture's own file checks the checkpoint and the length, and sizes what has none.
    task = TaskSpec("single_label", ("0", "1"), "accuracy")
    classifier = models.construct(student, "student", task, tokenizer, teacher)
    if type(classifier.config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise RecipeError(
            f"student.architecture: transformers has no masked-language-model head for {student.architecture}"
        )
    model = AutoModelForMaskedLM.from_config(classifier.config)
    if student.checkpoint is not None:
        _take_head(model, student.checkpoint)
    # The encoder is what the student would begin with, whatever its file makes of the checkpoint.
    _fill(model.base_model, classifier.base_model.state_dict())
    return MaskedModel(model, student, tokenizer, masking)


def _take_head(model: Any, checkpoint: str) -> None:
    """Take the head of a checkpoint of the same family, where it has one."""
    from transformers import AutoModelForMaskedLM

    key = "student.checkpoint"
    where = hub.checkpoint(checkpoint, key)
    if pretrained.read_config(checkpoint, key).model_type == model.config.model_type:
        with pretrained.reading(f"{key}: {checkpoint}"):
            found, info = pretrained.load(AutoModelForMaskedLM, where)
        if not info["missing_keys"]:
            _fill(model, found.state_dict())
            return
    say(f"student.checkpoint: {checkpoint} has no masked-language-model head; a new one is trained")


def _fill(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights that a model has a place for."""
    own = model.state_dict()
    placed = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
    model.load_state_dict(placed, strict=False)


def _tokenizer(recipe: Recipe, teacher: Path | None) -> Tokenizer:
    """Load the student's tokenizer, the teacher's where it has none of its own."""
    if recipe.student.tokenizer or recipe.student.checkpoint or teacher:
        return models.load_tokenizer(recipe.student, "student", teacher)
    if recipe.teacher.tokenizer or recipe.teacher.checkpoint:
        return models.load_tokenizer(recipe.teacher, "teacher")
    return models.load_tokenizer(recipe.student, "student")  # which says what is missing


def _pack(model: MaskedModel, rows: Rows, name: str) -> Encoded:
    """Tokenise rows into full windows, and show the progress."""
    with track(f"tokenising {name}", len(rows), "documents") as progress:

        def batches() -> Iterable[list[tuple[str, str | None]]]:
            for part in rows.batches():
                yield part
                progress.advance(len(part))

        return pack(model.tokenizer, batches(), model.config.max_length, name)


def _prepare(recipe: Recipe) -> _Material:
    if recipe.student.checkpoint is not None:
        hub.checkpoint(
            recipe.student.checkpoint, "student.checkpoint"
        )  # before the data, which may take long
    model, pair = _with_teacher(recipe)
    rows, validation = read(recipe)
    windows, held_out = _pack(model, rows, "corpus"), _pack(model, validation, "validation")
    say(
        f"corpus: {len(rows):,} documents, {len(windows):,} windows of {model.config.max_length:,} tokens; "
        f"validation: {len(held_out):,} windows"
    )
    digest = sha256_json([rows.row_id.tolist(), validation.row_id.tolist()])
    return _Material(model, windows, held_out, digest, pair)


def _with_teacher(recipe: Recipe) -> tuple[MaskedModel, MaskedPair | None]:
    """Make the student, and put its teacher beside it where it has one."""
    settings = recipe.pretraining
    if settings.teacher is None:
        return build(recipe), None
    runs.refuse_unfinished(settings.teacher)
    where = caching.find_teacher(settings.teacher, masked_live.KEY).model
    model = build(recipe, Path(where))
    teacher = masked_live.load_teacher(where, model)
    ours, theirs = (one.model.get_input_embeddings().weight for one in (model, teacher))
    if recipe.student.checkpoint is None and torch.equal(ours, theirs):
        # A student that is cut out of its teacher has its head as well, which reads those embeddings.
        inside = f"{teacher.model.base_model_prefix}."
        _fill(model.model, {n: w for n, w in teacher.model.state_dict().items() if not n.startswith(inside)})
    return model, MaskedPair(model, teacher, settings.losses, settings.train.seed)


def plan(recipe: Recipe) -> fitting.Plan:
    """Describe a pre-training run without running it."""
    found = _prepare(recipe)
    splits = {
        name: {"rows": len(windows), "labels": {}, "tokens": planning.lengths(windows), "truncated": 0.0}
        for name, windows in (("corpus", found.windows), ("validation", found.held_out))
    }
    cost = fitting.cost_of(found.model, recipe.pretraining.train, found.windows)
    title = f"pre-training {recipe.student.architecture}"
    return fitting.Plan(title, splits, cost, fitting.time_left("pretrained", cost))


def pretrain(
    recipe: Recipe,
    recipe_name: str,
    student: str,
    name: str | None = None,
    resume: str | None = None,
    *,
    any_processes: bool = False,
) -> RunFolder:
    """Pre-train a student.

    Args:
        recipe: resolved.
        recipe_name: for the run's tags.
        student: the architecture, or the preset's name.
        name: the run's; run1, run2, … where absent.
        resume: a run to go on with, whose recipe ``recipe`` is.
        any_processes: on another number of processes, too.

    Returns:
        The finished run.
    """
    folder = runs.begin_or_resume(name, resume)
    material = _prepare(recipe)
    settings = recipe.pretraining.train
    fitting.check(material.model, settings, material.windows)
    if folder is None:
        folder = fitting.new_run(
            runs.claim(name), "pretrained", recipe, recipe_name, seed=settings.seed, model=student,
            teachers=[recipe.pretraining.teacher] if recipe.pretraining.teacher else [],
        )  # fmt: skip
    with fitting.working(folder):
        _fit(folder, recipe, material, any_processes)
    return folder


def _fit(folder: RunFolder, recipe: Recipe, material: _Material, any_processes: bool) -> None:
    """Train inside the run folder and write everything down."""
    model, settings = material.model, recipe.pretraining.train
    precision = inference.resolve_precision(settings.precision)
    accelerator = inference.make_accelerator(precision)
    facts = {
        "data": material.fingerprint,
        "initial_weights": models.weights_hash(model.model),
        "precision": precision,
        "processes": accelerator.num_processes,
    }
    meaning = {"recipe": folder.recipe.read_text(encoding="utf-8"), **facts}
    if material.pair is not None:
        meaning["live teacher's weights"] = models.weights_hash(material.pair.teacher.model)
    if accelerator.is_main_process:
        folder.update(facts=folder.read().facts | facts)
        tracking.sync(folder)
    held_out = HeldOut(material.held_out, model.masking)
    objective = MaskedLanguage(terms=recipe.pretraining.losses)

    def evaluate(model: MaskedModel) -> dict[str, float]:
        return held_out.measure(model, recipe.evaluation.tokens_per_batch, accelerator)

    with fitting.reporting_memory():
        done = train(
            model, material.windows, objective, settings, evaluate, "nll", folder, accelerator, meaning,
            on_evaluation=lambda: tracking.sync(folder), pair=material.pair, any_processes=any_processes,
        )  # fmt: skip
        found = evaluate(model)
    if accelerator.is_main_process:
        _record(folder, model, done, found, len(material.held_out))


def _record(
    folder: RunFolder, model: MaskedModel, done: Trained, found: dict[str, float], windows: int
) -> None:
    """Save the model, as ``from_pretrained`` reads it, and its figures."""
    with replacing_folder(folder.model) as aside:
        model.model.save_pretrained(aside)
        model.tokenizer.save_pretrained(aside)
    size = sum(file.stat().st_size for file in folder.model.rglob("*") if file.is_file())
    figures: dict[str, dict[str, Any]] = {
        "task": {"kind": "masked_language_model", "labels": [], "metric": "perplexity"},
        "model": {"parameters": model.parameters_count, "bytes": size},
        "train": {
            "seconds": done.seconds,
            "steps": done.steps,
            "tokens": done.tokens,
            "best_step": done.best_step,
        },
        "validation": {**found, "windows": windows},
    }
    folder.write_metrics(figures)
    folder.log(done.steps, {f"eval/best_{name}": value for name, value in found.items()}, "finished")
