"""One model in its run folder: planned, trained, measured once on test, written down. Knows no teacher from a student."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from distill import (
    augmentation,
    base_rates,
    data,
    inference,
    memory,
    models,
    planning,
    processes,
    runs,
    sharding,
    thresholds,
    tracking,
)
from distill.data import Corpus, Rows, SplitName
from distill.encoding import Encoded, concatenate, encode, reading_key
from distill.errors import Lost
from distill.evaluation import Predictions, measure
from distill.files import read_json, reporting_disk, sweep, write_json
from distill.inference import Precision
from distill.live import Pair
from distill.losses import Objective
from distill.masking import MaskedModel
from distill.models import Classifier
from distill.progress import duration, say, track
from distill.runs import Role, Run, RunFolder
from distill.schema import Cache, Recipe, Train
from distill.tasks import Floats, quality
from distill.training import Lookup, total_steps, train

MEASURED: tuple[SplitName, ...] = ("validation", "test", "test_other")
"""Splits whose logits a finished model is measured by, where a recipe has them."""


@dataclass(frozen=True)
class Plan:
    """What a dry run shows."""

    title: str
    splits: dict[str, dict[str, Any]]
    """Of each split: rows, label counts, token-length percentiles, share of documents truncated."""
    cost: planning.Cost
    notes: list[str] = field(default_factory=list)


def load_corpus(recipe: Recipe) -> Corpus:
    """Read the data, with the copies that are made of it, and say what was left out."""
    corpus = augmentation.extend(recipe, data.load(recipe))
    for note in corpus.notes:
        say(note)
    for name, rows in corpus.splits.items():
        say(f"{name}: {len(rows):,} documents")
    memory.release_memory()
    return corpus


def encode_rows(model: Classifier, rows: Rows) -> Encoded:
    """Tokenise a split for a model, and show the progress."""
    with track(f"tokenising {rows.name}", len(rows), "documents") as progress:
        notes: list[str] = []
        encoded = encode(
            model.tokenizer, rows, model.config, progress, span=model.task.kind == "span", notes=notes
        )
    for note in notes:
        say(f"{rows.name}: {note}")
    memory.release_memory()
    return encoded


Kept = dict[str, dict[SplitName, Encoded]]
"""A corpus' splits as one model reads them, under :func:`distill.encoding.reading_key`."""


def encode_splits(model: Classifier, corpus: Corpus, kept: Kept) -> dict[SplitName, Encoded]:
    """Tokenise every split for a model, unless ``kept`` holds that of this corpus; afterwards it holds nothing else."""
    key = reading_key(model.tokenizer, model.config)
    if key not in kept:
        kept.clear()  # before more is made: of two there is no need
        kept[key] = {name: encode_rows(model, rows) for name, rows in corpus.splits.items()}
    return kept[key]


def cost_of(model: Classifier | MaskedModel, settings: Train, documents: Encoded) -> planning.Cost:
    """Estimate what training a model costs."""
    config = model.model.config
    parameters = model.parameters_count
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hidden = int(getattr(config, "hidden_size", 0) or config.dim)
    heads = int(getattr(config, "num_attention_heads", 0) or getattr(config, "n_heads", 0))  # FNet: none
    longest = int(documents.longest_window.max())
    steps = total_steps(settings, documents.draws)
    return planning.estimate(
        parameters, trained, hidden, len(models.layers(model.model)), heads, longest, settings, steps, documents,
        reading_of(model, settings),
    )  # fmt: skip


def reading_of(model: Classifier | MaskedModel, settings: Train) -> planning.Reading:
    """Say what a model computes of each token: what its layers hold, and what its attention sees."""
    layers = list(models.layers(model.model))
    whole = isinstance(model, MaskedModel) or model.task.kind == "span" or model.padding is not None
    if not whole:
        layers.pop()  # of the last one the packed pass computes what the first token needs (see packed.py)
    config = model.model.config
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    frozen = settings.freeze_layers
    return planning.Reading(
        sum(sizes), sum(sizes[frozen:]), int(getattr(config, "hidden_size", 0) or config.dim), len(layers),
        len(sizes[frozen:]), model.keys if isinstance(model, Classifier) else lambda length: length,
    )  # fmt: skip


def check(model: Classifier | MaskedModel, settings: Train, documents: Encoded) -> None:
    """Refuse what cannot be trained here, before there is a folder of it.

    Raises:
        RecipeError: a precision that the hardware does not have, or more layers to freeze than there are.
        DataError: the disk has too little room.
    """
    _precision(settings)
    models.check_freeze(model.model, settings.freeze_layers)
    planning.require_disk(cost_of(model, settings, documents).disk)


def plan(
    title: str,
    role: Role,
    corpus: Corpus,
    model: Classifier,
    settings: Train,
    trained: Sequence[str],
    cache: Cache | None = None,
) -> Plan:
    """Describe a training run without running it, and with ``cache`` the caching of the model's logits."""
    splits: dict[str, dict[str, Any]] = {}
    documents, cached = [], []
    for name, rows in corpus.splits.items():
        encoded = encode_rows(model, rows)
        splits[name] = {
            **data.describe(rows, corpus.task),
            "tokens": planning.lengths(encoded),
            "truncated": planning.truncated(encoded),
        }
        if name in trained:
            documents.append(encoded)
        if cache is not None and name in cache.splits:
            cached.append(encoded)
    cost = cost_of(model, settings, concatenate(documents))
    notes = time_left(role, cost)
    if cache is not None and cached:
        notes.append(_caching(model, settings, cached, cache))
    return Plan(title, splits, cost, notes)


def time_left(role: Role, cost: planning.Cost) -> list[str]:
    """Say how long it would take at the rate of the newest run here of as many parameters and processes, if any."""
    for folder in reversed(runs.every()):
        run, found = folder.read(), folder.metrics()
        if run.role != role or not found or run.facts.get("processes") != processes.count():
            continue
        rate = found["train"].get("tokens", 0) / max(found["train"]["seconds"], 1e-9)
        if rate and found["model"]["parameters"] == cost.parameters:
            return [f"about {duration(cost.tokens / rate)}, at {rate:,.0f} tokens a second as in {run.name}"]
    return []


def _caching(model: Classifier, settings: Train, parts: Sequence[Encoded], cache: Cache) -> str:
    """Say what caching a teacher's logits of some splits costs."""
    reading = reading_of(model, settings)
    once = [replace(part, weights=None) for part in parts]
    found = [planning.amount(part, reading.keys) for part in once]
    tokens, pairs = (sum(one) for one in zip(*found, strict=True))
    rows = sum(len(part) if part.units is None else int(part.units.sum()) for part in parts)
    count = sum(map(len, parts))
    bytes_ = planning.cache_bytes(count, rows, model.task.classes, cache.dtype)
    return (
        f"caching its logits of {count:,} documents afterwards: {tokens:,.0f} tokens, "
        f"{reading.forward(tokens, pairs):.2g} FLOPs, {planning.size(bytes_)} of disk"
    )


def _precision(settings: Train) -> Precision:
    return inference.resolve_precision(settings.precision)


@contextmanager
def reporting_memory() -> Iterator[None]:
    """Turn a lack of memory into one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        short = memory.out_of_memory(error)
        if short is None:
            raise
        raise short from error


def _validation(
    encoded: Encoded, corpus: Corpus, tokens: int, precision: Precision, accelerator: Any
) -> Callable[[Classifier], dict[str, float]]:
    """Make the function that measures a model on validation."""
    truth = corpus.splits["validation"].truth
    assert truth is not None

    def evaluate(model: Classifier) -> dict[str, float]:
        found = inference.predict_all(model, encoded, tokens, precision, accelerator)
        return quality(corpus.task.kind, found, truth)

    return evaluate


def fit(
    folder: RunFolder,
    recipe: Recipe,
    corpus: Corpus,
    model: Classifier,
    encoded: dict[str, Encoded],
    settings: Train,
    objective: Objective,
    lookup: Lookup | None,
    pair: Pair | None = None,
    *,
    any_processes: bool = False,
) -> None:
    """Train a model inside its run folder, measure it once on test, and write everything down.

    ``pair`` is the model with its teacher beside it, where the objective needs that; with ``any_processes`` the run
    may have been begun on another number of processes.
    """
    precision = _precision(settings)
    accelerator = inference.make_accelerator(precision)
    sharding.check(accelerator, model.config.engine, settings.log_gradient_norms)
    if corpus.task.kind == "multi_label":
        labels = corpus.splits["train"].labels
        assert labels is not None
        base_rates.begin(model.model, labels, objective.class_weights)
    initial = models.weights_hash(model.model)
    meaning = {
        "recipe": folder.recipe.read_text(encoding="utf-8"),
        "data": corpus.fingerprint,
        "initial weights": initial,
        "processes": accelerator.num_processes,
        "precision": precision,
    }
    if pair is not None:
        meaning["live teacher's weights"] = models.weights_hash(pair.teacher.model)
    facts = folder.read().facts | {
        "data": corpus.fingerprint,
        "initial_weights": initial,
        "precision": precision,
        "processes": accelerator.num_processes,
    }
    if accelerator.is_main_process:
        folder.update(facts=facts)
        tracking.sync(folder)
    # The model's own folder says how it reads; training data is what the objective was built for.
    evaluate = _validation(
        encoded["validation"], corpus, recipe.evaluation.tokens_per_batch, precision, accelerator
    )
    with reporting_memory():
        done = train(
            model, encoded["train"], objective, settings, evaluate, corpus.task.metric, folder, accelerator, meaning,
            lookup, lambda: tracking.sync(folder), pair, any_processes=any_processes,
        )  # fmt: skip
        tokens = recipe.evaluation.tokens_per_batch
        found = {
            name: inference.predict_all(
                model, encoded[name], tokens, precision, accelerator, f"{folder.name}: measuring {name}"
            )
            for name in MEASURED
            if name in encoded
        }
    weights = sharding.weights(model.model) if sharding.is_on(accelerator) else None
    if not accelerator.is_main_process:
        return
    model.save(folder.model, weights)
    train_figures = {
        "seconds": done.seconds,
        "steps": done.steps,
        "tokens": done.tokens,
        "best_step": done.best_step,
    }
    record(folder, recipe, corpus, found, model.parameters_count, train_figures)


def record(
    folder: RunFolder,
    recipe: Recipe,
    corpus: Corpus,
    found: Mapping[SplitName, Floats],
    parameters: int,
    training: dict[str, float],
) -> None:
    """Write a finished model's figures, its predictions and, where they are fitted, its thresholds.

    Args:
        folder: the run's, with the model saved.
        recipe: the run's.
        corpus: its data.
        found: logits ``(rows, classes)``, or as in tasks.py, of the splits of ``MEASURED`` that there are.
        parameters: of the model.
        training: figures of the training.
    """
    task, fitted = corpus.task, None
    predictions: dict[SplitName, Predictions] = {}
    for name, values in found.items():
        rows = corpus.splits[name]
        assert rows.labels is not None
        predictions[name] = Predictions(rows.row_id, values, rows.labels, rows.words)
    predictions["test"].save(folder.predictions)
    if recipe.task.thresholds == "fitted":
        fitted = thresholds.fit(predictions["validation"].logits, predictions["validation"].labels)
        about = read_json(folder.model / models.ABOUT)
        about["task"]["thresholds"] = dict(zip(task.labels, fitted, strict=True))
        write_json(folder.model / models.ABOUT, about)
    size = sum(file.stat().st_size for file in folder.model.rglob("*") if file.is_file())
    figures: dict[str, dict[str, Any]] = {
        "task": {"kind": task.kind, "labels": list(task.labels), "metric": task.metric},
        "model": {"parameters": parameters, "bytes": size},
        "train": training,
    }
    calibration = folder.read().facts.get("calibration")
    if calibration is not None:
        figures["calibration"] = calibration
    for name, one in predictions.items():
        edges, truth = recipe.evaluation.length_buckets, corpus.splits[name].truth
        figures[name] = measure(task.kind, task.metric, one, edges, truth)
        if task.kind == "multi_label" and name != "validation":
            if fitted is not None:
                figures[name] |= thresholds.figures(one.logits, one.labels, fitted)
            figures[name]["labels"] = thresholds.by_label(task.labels, one.logits, one.labels, fitted)
    folder.write_metrics(figures)
    told = {f"test/{k}": v for k, v in figures["test"].items() if isinstance(v, float)}
    told |= {f"test/other_{k}": v for k, v in figures.get("test_other", {}).items() if isinstance(v, float)}
    folder.log(int(training.get("steps", 0)), told, "finished")


def new_run(name: str, role: Role, recipe: Recipe, recipe_name: str, **more: Any) -> RunFolder:
    """Make a run's folder, on the main process; ``more`` are further fields of the run."""
    run = Run(
        name=name, role=role, recipe=recipe_name, experiment=recipe.experiment, created=runs.now(),
        **{"group": name, "seed": 0, "model": recipe.teacher.architecture, **more},
    )  # fmt: skip
    if processes.is_main():
        runs.create(run, recipe.dump())
    processes.wait()
    return RunFolder(runs.runs_folder() / name)


@contextmanager
def working(folder: RunFolder) -> Iterator[None]:
    """Work in a run folder; the tracker hears of the end, good or bad, and checkpoints go after a good one."""
    if not processes.is_main():
        try:
            with processes.noticing_loss():
                yield
                processes.wait()
        except Lost:
            folder.abandon()
            raise
        return
    fix = f"mend that, then --resume {folder.name} goes on from the last checkpoint"
    try:
        with reporting_disk(fix), folder.working(), processes.noticing_loss():
            sweep(folder.path)
            yield
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    finally:
        tracking.sync(folder)
    processes.wait()
