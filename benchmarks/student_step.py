"""A student's training steps: transformers' BERT-Tiny against the packed one, and cached logits against a live teacher.

    python benchmarks/student_step.py [--quick]

BERT-Tiny (2 layers of 128), 32 reviews a step, cut at 200 tokens, dropout of 0.1 in both. ``trainer`` is a
whole epoch at 512 tokens of transformers' Trainer with the soft loss in ``compute_loss`` and a live teacher's
logits already computed for it, from text: tokenising and loading included on both sides.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import torch
from _shared import build, conclude, here, matmul_rate, reviews, say, take_turns

from distill import padded
from distill.batching import collate, micro_batches, steps
from distill.losses import Objective
from distill.schema import Loss

STEP, LENGTH = 32, 200
EPOCH_LENGTH = 512
"""Tokens of the student of the recipe imdb, which the epochs are measured at."""
GOALS = {"step": 3.0, "live teacher": 15.0, "trainer": 4.0}
TERMS = [Loss(kind="soft", temperature=2.0), Loss(kind="hard", weight=0.5)]


def student(length: int = LENGTH) -> Any:
    """Build a BERT-Tiny with random weights."""
    return build("student", "bert_miniature", checkpoint=None, max_length=length).train()


def optimizer(model: Any) -> torch.optim.Optimizer:
    """Make the optimizer that both sides use."""
    return torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)


def step(model: Any, adam: Any, batch: Any, logits: torch.Tensor) -> None:
    """Make one optimizer step on both losses."""
    objective = Objective("single_label", TERMS)
    loss: Any = sum(
        objective.weight(t) * objective.per_document(t, logits.float(), batch).mean() for t in TERMS
    )
    loss.backward()
    adam.step()
    adam.zero_grad()


def floor_seconds(model: Any, tokens: float) -> float:
    """Seconds that the first layer's multiplications take at the rate measured here, forward and backward."""
    width = model.model.config.hidden_size
    return float(3 * 2 * 12 * width * width * tokens / matmul_rate(torch.bfloat16, width))


def epoch_ours(texts: list[str], labels: Any, teacher: Any) -> None:
    """Train an epoch from text."""
    from distill.encoding import encode_texts

    model = student(EPOCH_LENGTH)
    data = encode_texts(model.tokenizer, [[(text, None) for text in texts]], model.config)
    data.labels[:], data.labelled[:] = labels, True
    adam = optimizer(model)
    for number, documents in enumerate(steps(len(data), STEP, 0)):
        if number == len(data) // STEP:
            break
        (sorted_,) = micro_batches(data, documents, STEP * EPOCH_LENGTH)
        batch = collate(data, sorted_, teacher[sorted_])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch)
        step(model, adam, batch, logits)


def epoch_trainer(texts: list[str], labels: Any, teacher: Any) -> None:
    """Train an epoch from text with transformers' Trainer, padded to the length, as its examples do."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = student(EPOCH_LENGTH)

    def tokenised(row: dict[str, Any]) -> Any:
        return model.tokenizer(row["text"], padding="max_length", truncation=True, max_length=EPOCH_LENGTH)

    rows = Dataset.from_dict({"text": texts, "labels": labels.tolist(), "soft": teacher.tolist()})
    rows = rows.map(tokenised, batched=True, remove_columns=["text"])

    class Distiller(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            target = inputs.pop("soft")
            found = model(**inputs)
            soft = 4.0 * torch.nn.functional.kl_div(
                (found.logits / 2).log_softmax(-1),
                (target / 2).log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            return soft + 0.5 * found.loss

    with tempfile.TemporaryDirectory() as folder:
        wish = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=STEP, learning_rate=5e-5, report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        Distiller(model.model, wish, train_dataset=rows).train()


def main() -> None:
    """Measure, print the tables, and hold them against the goals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under four minutes")
    rounds = 5 if parser.parse_args().quick else 15
    torch.set_num_threads(1)
    say(here())
    data = reviews(STEP, LENGTH)
    data.labels[:], data.labelled[:] = np.arange(len(data)) % 2, True
    (documents,) = micro_batches(data, np.arange(STEP), STEP * LENGTH)
    batch = collate(data, documents, np.random.default_rng(0).normal(size=(STEP, 2)).astype(np.float32))
    stock, ours, exact, taught = (student() for _ in range(4))
    adams = {id(m): optimizer(m) for m in (stock, ours, exact, taught)}
    teacher_config = {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    teacher = build("teacher", "bert", config=teacher_config, max_length=512).eval()

    def stock_step(width: int | None) -> None:
        step(stock, adams[id(stock)], batch, stock.model(**padded.inputs(stock.model, batch, width)).logits)

    def packed_step(model: Any, bf16: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(batch)
        step(model, adams[id(model)], batch, logits)

    def live_step() -> None:
        with torch.inference_mode():
            teacher.model(**padded.inputs(teacher.model, batch))
        stock_step(LENGTH)

    took = take_turns(
        {
            "stock, padded to 200": lambda: stock_step(LENGTH),
            "stock, padded to the longest": lambda: stock_step(None),
            "packed fp32": lambda: packed_step(exact, False),
            "packed bf16": lambda: packed_step(ours, True),
        },
        rounds,
    )
    live = take_turns({"live": live_step, "cached": lambda: packed_step(taught, True)}, 3)
    base = took["stock, padded to 200"]
    for name, seconds in took.items():
        say(f"{name}: {seconds * 1000:.0f} ms a step ({base / seconds:.2f}x)")
    share = floor_seconds(ours, float(data.tokens.sum())) / took["packed bf16"]
    say(f"packed bf16 is at {share:.0%} of the first layer's matrix floor")
    say(
        f"a live BERT-base teacher beside stock: {live['live'] * 1000:.0f} ms a step, cached logits: {live['cached'] * 1000:.0f} ms"
    )

    from distill import data as reading
    from distill import recipe

    count = 640 if rounds == 5 else 2560
    rows = reading.load(recipe.load("quickstart", [f"data.splits.transfer.rows={count}"])).splits["transfer"]
    texts = [text for text, _ in rows.texts(slice(0, count))]
    labels, soft = np.arange(count) % 2, np.random.default_rng(1).normal(size=(count, 2)).astype(np.float32)
    epochs = {}
    for name, run in (("trainer", epoch_trainer), ("ours", epoch_ours)):
        began = time.process_time()
        run(texts, labels, soft)
        epochs[name] = time.process_time() - began
    say(
        f"an epoch of {count} reviews from text: Trainer {epochs['trainer']:.1f} s, ours {epochs['ours']:.1f} s"
    )
    conclude([
        ("BERT-Tiny step", base / took["packed bf16"], GOALS["step"]),
        ("cached logits over a live BERT-base", live["live"] / live["cached"], GOALS["live teacher"]),
        ("epoch over Trainer", epochs["trainer"] / epochs["ours"], GOALS["trainer"]),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
