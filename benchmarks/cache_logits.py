"""Writing a teacher's logits for real reviews: transformers' forward pass against the packed one.

    python benchmarks/cache_logits.py [--quick]

Both read the same reviews, cut at 1,024 tokens, in batches of 16: ``padded`` pads each to 1,024, as the
published scripts do, ``packed`` takes a budget of tokens. BigBird lies on the grid of 1,024 in both.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from _shared import ALLOCATORS, NO_DROPOUT, SIZES, again, build, conclude, here, reviews, say, take_turns

from distill import inference, padded
from distill.batching import collate

LENGTH, BATCH = 1024, 16
GOALS = {
    "default": {"packed fp32": 13.0, "packed bf16": 25.0},
    "raised": {"packed fp32": 9.0, "packed bf16": 13.0},
}


def measure(architecture: str, size: str, rounds: int, count: int) -> dict[str, Any]:
    """Time both, and compare their logits."""
    torch.set_num_threads(1)
    data = reviews(count, LENGTH)
    own = {"grid": "max_length"} if architecture == "bigbird" else {"window": 512}
    model = build(
        "teacher", architecture, config={**SIZES[size], **NO_DROPOUT}, max_length=LENGTH, **own
    ).eval()
    found: dict[str, Any] = {}

    def stock() -> None:
        logits = []
        for at in range(0, BATCH if rounds == 1 else len(data), BATCH):  # its time is the same for each batch
            inputs = padded.inputs(
                model.model, collate(data, np.arange(at, min(at + BATCH, len(data)))), LENGTH
            )
            if architecture == "longformer":
                inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
                inputs["global_attention_mask"][:, 0] = 1
            with torch.inference_mode():
                logits.append(model.model(**inputs).logits.numpy())
        found["padded"] = np.concatenate(logits)

    def packed(precision: Any) -> None:
        found[precision] = inference.predict(model, data, np.arange(len(data)), 8192, precision)

    ways = {"padded": stock, "packed fp32": lambda: packed("fp32"), "packed bf16": lambda: packed("bf16")}
    took = take_turns(ways, rounds, warm_up=False)
    read = len(found["padded"])
    rates = {way: (read if way == "padded" else len(data)) / seconds for way, seconds in took.items()}
    gaps = {p: float(np.abs(found[p][:read] - found["padded"]).max()) for p in ("fp32", "bf16")}
    return {"rates": rates, "gaps": gaps, "spread": float(found["padded"].std())}


def main() -> None:
    """Measure, print the tables, and hold them against the goals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small model, under four minutes")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        architecture, size, rounds, count = asked.inside
        say(json.dumps(measure(architecture, size, int(rounds), int(count))))
        return
    say(here())
    goals = []
    for size in ("4x256",) if asked.quick else ("12x256", "4x768"):
        for architecture in ("bigbird", "longformer"):
            for allocator in ALLOCATORS:
                found = again(allocator, "--inside", architecture, size, "1" if asked.quick else "3", "64")
                rates, name = found["rates"], f"{architecture} {size}, {allocator} allocator"
                say(
                    f"{name}: "
                    + ", ".join(
                        f"{way} {r:.1f} docs/s ({r / rates['padded']:.1f}x)" for way, r in rates.items()
                    )
                )
                say(f"  largest difference of a logit {found['gaps']}, of a spread of {found['spread']:.3f}")
                goals += [
                    (f"{name}: {way}", rates[way] / rates["padded"], goal)
                    for way, goal in GOALS[allocator].items()
                ]
    conclude(goals)


if __name__ == "__main__":
    main()
