"""One document at a time: BERT-Tiny's forward pass, transformers' eager one against the packed one.

    python benchmarks/latency.py

200 tokens, fp32, one thread, processor seconds. The packed pass computes of the last layer what the first token needs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from _shared import build, conclude, here, say
from length_scaling import document

from distill import padded

LENGTH, ROUNDS, GOAL = 200, 300, 2.0


def main() -> None:
    """Measure in turns, and hold the ratio against its goal."""
    torch.set_num_threads(1)
    say(here())
    ours = build("student", "bert_miniature", checkpoint=None, max_length=LENGTH).eval()
    eager, sdpa = copy.deepcopy(ours.model), copy.deepcopy(ours.model)
    eager.set_attn_implementation("eager")
    batch = document(LENGTH)
    inputs = padded.inputs(sdpa, batch)
    ways: dict[str, Callable[[], object]] = {
        "stock eager": lambda: eager(**inputs),
        "stock sdpa": lambda: sdpa(**inputs),
        "packed": lambda: ours(batch),
    }
    took: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for way, run in ways.items():
                began = time.process_time()
                run()
                took[way].append(time.process_time() - began)
    p50 = {way: median(seconds) * 1000 for way, seconds in took.items()}
    say(", ".join(f"{way} {ms:.2f} ms" for way, ms in p50.items()))
    conclude([("BERT-Tiny latency, stock eager over packed", p50["stock eager"] / p50["packed"], GOAL)])


if __name__ == "__main__":
    main()
