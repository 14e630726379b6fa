"""Training steps of long-context teachers on real reviews: transformers' forward pass against the packed one.

    python benchmarks/teacher_step.py [--quick]

Sixteen reviews a step, cut at 1,024 tokens, AdamW, no dropout (so that losses can be compared). ``padded`` is
the published recipe: every review padded to 1,024. ``dynamic`` pads to the longest of the step, ``grouped``
also sorts 32 reviews by length first; there stock BigBird turns to full attention, so it is not the same
model. The packed BigBird lies on the grid of 1,024 (``grid: max_length``): losses equal those of ``padded``.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial
from typing import Any

import numpy as np
import torch
from _shared import (
    ALLOCATORS,
    NO_DROPOUT,
    SIZES,
    again,
    build,
    conclude,
    here,
    matmul_rate,
    reviews,
    say,
    take_turns,
)

from distill import padded
from distill.batching import collate
from distill.benchmark import idle_memory, peak_memory

STEP, LENGTH, REVIEWS = 16, 1024, 32
GOALS = {
    "default": {"packed fp32": 15.0, "packed bf16": 25.0},
    "raised": {"packed fp32": 9.0, "packed bf16": 12.0},
}
GROUPED, FLOOR, MEMORY = 4.5, 0.6, 8.0


class Contender:
    """A model with its optimizer, and one way to feed it."""

    def __init__(self, model: Any, way: str) -> None:
        self.model, self.way = copy.deepcopy(model).train(), way
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def logits(self, batch: Any) -> Any:
        """Compute logits of a step's documents."""
        if self.way.startswith("packed"):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.way.endswith("bf16")):
                return self.model(batch)
        stock = self.model.model
        inputs = padded.inputs(stock, batch, LENGTH if self.way == "padded" else None)
        if stock.config.model_type == "longformer":
            inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
            inputs["global_attention_mask"][:, 0] = 1
        return stock(**inputs).logits

    def step(self, batch: Any) -> None:
        """Make one step."""
        loss: Any = torch.nn.functional.cross_entropy(self.logits(batch).float(), batch.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


def batches(data: Any, grouped: bool) -> list[Any]:
    """Cut the reviews into steps, as they come or sorted by length."""
    order = np.argsort(data.tokens, kind="stable") if grouped else np.arange(len(data))
    data.labels[:] = np.arange(len(data)) % 2
    return [collate(data, order[at : at + STEP]) for at in range(0, len(data), STEP)]


def floor(model: Any, data: Any) -> float:
    """Count the multiplications that one step cannot do without: the linear layers', of every token but once.

    Forward and backward are three passes; of the last layer only keys' and values' side would be needed, and
    that is absorbed, so it is left out.
    """
    settings = model.model.config
    width, inner = settings.hidden_size, settings.intermediate_size
    layer = 2 * (4 * width * width + 2 * width * inner)
    return float(3 * layer * (settings.num_hidden_layers - 1) * data.tokens.sum() / (len(data) / STEP))


def measure(architecture: str, size: str, rounds: int) -> dict[str, Any]:
    """Time all ways of one model."""
    torch.set_num_threads(1)
    data = reviews(REVIEWS, LENGTH)
    own = {"grid": "max_length"} if architecture == "bigbird" else {"window": 512}
    model = build("teacher", architecture, config={**SIZES[size], **NO_DROPOUT}, max_length=LENGTH, **own)
    ways = ("padded", "dynamic", "grouped", "packed fp32", "packed bf16")
    contenders = {way: Contender(model, way) for way in ways}
    mixed, sorted_ = batches(data, False), batches(data, True)
    # The first two cost the same for every batch, or nearly: nearly each has a review of 1,024 tokens.
    rounds_of = {"padded": mixed[:1], "dynamic": mixed[:1], "grouped": sorted_}

    def steps(way: str) -> None:
        for batch in rounds_of.get(way, mixed):
            contenders[way].step(batch)

    took = take_turns({way: partial(steps, way) for way in ways}, rounds, warm_up=False)
    seconds = {way: took[way] / len(rounds_of.get(way, mixed)) for way in ways}
    first = {way: contenders[way].losses[0] for way in ("padded", "packed fp32")}
    assert abs(first["padded"] - first["packed fp32"]) < 1e-5 * max(first.values()), first
    rate = matmul_rate(torch.float32, SIZES[size]["hidden_size"])
    return {"seconds": seconds, "floor": floor(model, data) / rate / seconds["packed fp32"], "losses": first}


def memory(architecture: str, size: str, way: str) -> int:
    """Peak bytes of one step above the idle process."""
    torch.set_num_threads(1)
    data = reviews(REVIEWS, LENGTH)
    own = {"grid": "max_length"} if architecture == "bigbird" else {"window": 512}
    contender = Contender(
        build("teacher", architecture, config={**SIZES[size], **NO_DROPOUT}, max_length=LENGTH, **own), way
    )
    batch = batches(data, False)[0]
    idle = idle_memory()
    contender.step(batch)
    return peak_memory() - idle


def main() -> None:
    """Measure, print the tables, and hold them against the goals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small model, under four minutes")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        what, *rest = asked.inside
        found: Any = memory(*rest) if what == "memory" else measure(rest[0], rest[1], int(rest[2]))
        say(json.dumps(found))
        return
    say(here())
    sizes = ("4x256",) if asked.quick else ("12x256", "4x768")
    rounds = "1" if asked.quick else "3"
    goals = []
    for size in sizes:
        for architecture in ("bigbird", "longformer"):
            for allocator in ALLOCATORS:
                found = again(allocator, "--inside", "time", architecture, size, rounds)
                seconds, name = found["seconds"], f"{architecture} {size}, {allocator} allocator"
                say(
                    f"{name}: "
                    + ", ".join(
                        f"{way} {s:.2f} s ({seconds['padded'] / s:.1f}x)" for way, s in seconds.items()
                    )
                )
                say(
                    f"  losses of the first step {found['losses']}; {found['floor']:.0%} of the matrix floor in fp32"
                )
                goals += [
                    (f"{name}: {way}", seconds["padded"] / seconds[way], goal)
                    for way, goal in GOALS[allocator].items()
                ]
                if allocator == "default":
                    goals += [
                        (f"{name}: packed over grouped", seconds["grouped"] / seconds["packed fp32"], GROUPED)
                    ]
                    goals += [(f"{name}: share of the matrix floor", found["floor"], FLOOR)]
            peak = {
                way: again("default", "--inside", "memory", architecture, size, way)
                for way in ("padded", "packed fp32")
            }
            say(
                f"{architecture} {size}: peak "
                + ", ".join(f"{way} {b / 1e9:.2f} GB" for way, b in peak.items())
            )
            goals += [(f"{architecture} {size}: peak memory", peak["padded"] / peak["packed fp32"], MEMORY)]
    conclude(goals)


if __name__ == "__main__":
    main()
