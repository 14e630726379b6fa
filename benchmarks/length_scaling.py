"""One document, ever longer: time and memory of a forward pass and of a training step.

    python benchmarks/length_scaling.py [--quick]

Encoders of 4 layers of 256, fp32, random tokens: full attention (BERT), BigBird, Longformer and FNet, transformers'
forward pass (``stock``; BERT's goes through SDPA) and the packed one. The slope is that of the logarithm of
time over the logarithm of length, from 2,048 tokens on: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import numpy as np
import torch
from _shared import NO_DROPOUT, SIZES, again, build, conclude, here, say, take_turns

from distill.batching import Batch
from distill.benchmark import idle_memory, peak_memory

ARCHITECTURES = {"bert": "teacher", "bigbird": "teacher", "longformer": "teacher", "fnet": "student"}
OWN: dict[str, dict[str, Any]] = {"longformer": {"window": 512}, "fnet": {"checkpoint": None}}
ENGINES = ("stock", "packed")
SLOPE, FULL = 1.2, 1.0


def document(length: int) -> Batch:
    """Make a document of random tokens."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 20000, length))
    return Batch(
        ids, torch.zeros_like(ids), torch.tensor([0, length]), torch.zeros(1, dtype=torch.long), 1,
        torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool),
    )  # fmt: skip


def model(architecture: str, engine: str, length: int) -> Any:
    """Build an encoder that reads ``length`` tokens."""
    own = OWN.get(architecture, {})
    sizes: dict[str, Any] = {**SIZES["4x256"], **NO_DROPOUT}
    if architecture == "fnet":  # no heads, and no attention to drop
        sizes = {name: value for name, value in sizes.items() if "attention" not in name}
    return build(
        ARCHITECTURES[architecture],
        architecture,
        config=sizes,
        max_length=length,
        engine=engine,
        **own,
    )


def measure(length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time all of them at one length."""
    torch.set_num_threads(1)
    batch = document(length)
    models = {f"{a} {e}": model(a, e, length) for a in ARCHITECTURES for e in ENGINES}

    def forward(one: Any) -> None:
        with torch.inference_mode():
            one.eval()(batch)

    def train(one: Any) -> None:
        one.train()(batch).sum().backward()
        one.zero_grad()

    return {
        "forward": take_turns({n: partial(forward, m) for n, m in models.items()}, rounds),
        "training": take_turns({n: partial(train, m) for n, m in models.items()}, rounds),
    }


def memory(architecture: str, engine: str, length: int) -> int:
    """Peak bytes of a training step above the idle process."""
    torch.set_num_threads(1)
    one, batch = model(architecture, engine, length).train(), document(length)
    idle = idle_memory()
    one(batch).sum().backward()
    return peak_memory() - idle


def main() -> None:
    """Measure, print the tables, and hold them against the goals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="up to 4,096 tokens, fewer rounds, under four minutes"
    )
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        if asked.inside[0] == "time":
            say(json.dumps(measure(int(asked.inside[1]), int(asked.inside[2]))))
        else:
            say(str(memory(asked.inside[1], asked.inside[2], int(asked.inside[3]))))
        return
    say(here())
    lengths = [512, 1024, 2048, 4096] + ([] if asked.quick else [8192])
    goals: list[tuple[str, float, float]] = []
    took = {n: again("default", "--inside", "time", str(n), "1" if asked.quick else "3") for n in lengths}
    for kind in ("forward", "training"):
        say(f"\n{kind}, seconds at {', '.join(f'{n:,}' for n in lengths)} tokens")
        for name in took[lengths[0]][kind]:
            seconds = [took[n][kind][name] for n in lengths]
            late = [at for at, n in enumerate(lengths) if n >= 2048]
            slope = np.polyfit(np.log([lengths[at] for at in late]), np.log([seconds[at] for at in late]), 1)[
                0
            ]
            say(f"  {name}: " + ", ".join(f"{s:.3f}" for s in seconds) + f"; slope {slope:.2f}")
            if name in ("bigbird packed", "longformer packed"):
                goals.append((f"{name} {kind}: {SLOPE} over its slope", SLOPE / float(slope), 1.0))
                full = [took[n][kind]["bert stock"] for n in lengths]
                worst = min(f / s for f, s in zip(full, seconds, strict=True))
                goals.append((f"{name} {kind}: stock full attention over it, at worst", worst, FULL))
    say(
        f"\npeak of a training step above the idle process, MB, at {', '.join(f'{n:,}' for n in lengths)} tokens"
    )
    for architecture in ARCHITECTURES:
        for engine in ENGINES:
            peaks = [
                again("default", "--inside", "memory", architecture, engine, str(n)) / 1e6 for n in lengths
            ]
            say(f"  {architecture} {engine}: " + ", ".join(f"{p:.0f}" for p in peaks))
    conclude(goals)


if __name__ == "__main__":
    main()
