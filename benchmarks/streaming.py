"""More data than memory: peak memory of `distill cache` and `distill student` at 100,000 and at 1,000,000 documents.

    python benchmarks/streaming.py

The documents are 4 to 12 generated words each, in parquet shards, and the models tiny, so that what is kept for each
document stands out as far as it can. Both commands run as they are, each in a process of its own, which is looked at
from outside: its resident memory, and the part of it that is no page of a file (anonymous). The student makes as many
steps on either corpus, an epoch of the larger one: glibc keeps some of what is freed, the more the more batches of new
shapes there have been, and that has nothing to do with the corpus. ``--one-epoch`` makes an epoch of each.

``--whole`` reads the same shards without ``streaming``. Exits with 1 where the larger corpus takes 10 % more.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

GOAL = 1.1
SHARD = 50_000
"""Documents in a file."""
WORDS = [a + b for a in "ba co di fu ge ho ju ki lo mu ne po".split() for b in "da le mi ro su ta vo".split()]
PLACE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def texts(count: int, seed: int) -> Iterator[str]:
    """Write documents, no two alike."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        chosen = rng.integers(0, len(WORDS), int(rng.integers(3, 12)))
        yield " ".join([*(WORDS[at] for at in chosen), f"{seed}x{number}"])


def write_shards(folder: Path, count: int) -> Path:
    """Write unlabelled documents as parquet, a shard after another."""
    folder.mkdir()
    for number, start in enumerate(range(0, count, SHARD)):
        table = pyarrow.table({"text": list(texts(min(SHARD, count - start), 1000 + number))})
        pyarrow.parquet.write_table(table, folder / f"{number:05d}.parquet", row_group_size=10_000)
    return folder


def write_tokenizer(folder: Path) -> Path:
    """Write a WordPiece tokenizer of these words."""
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    BertTokenizer(vocab={entry: number for number, entry in enumerate(entries)}).save_pretrained(folder)
    return folder


def write_recipe(place: Path, name: str, transfer: Path, streaming: bool, epochs: float = 1.0) -> Path:
    """Write the recipe: 400 labelled documents, and the unlabelled ones."""
    labelled = place / "labelled.csv"
    with labelled.open("w", newline="", encoding="utf-8") as file:
        rows = [(text, len(text.split()) % 2) for text in texts(400, 1)]
        csv.writer(file).writerows([("text", "label"), *rows])
    tokenizer = str(place / "tokenizer")
    train = {
        "epochs": 1.0,
        "batch_size": 1024,
        "tokens_per_batch": 2048,
        "learning_rate": 1e-3,
        "precision": "fp32",
    }
    parts = {name: {"from": "train", "rows": 100} for name in ("test", "validation")}
    recipe = {
        "description": "generated text",
        "data": {
            "source": str(labelled),
            "splits": parts,
            "transfer": [{"source": str(transfer), **({"streaming": True} if streaming else {})}],
        },
        "task": {"labels": ["even", "odd"]},
        "cache": {"rows_per_shard": 16384, "tokens_per_batch": 2048, "precision": "fp32"},
        "teacher": {"architecture": "bert", "tokenizer": tokenizer, "config": PLACE, "max_length": 32, "train": train},
        "student": {
            "architecture": "bert_miniature", "checkpoint": None, "tokenizer": tokenizer, "config": PLACE,
            "max_length": 32, "losses": [{"kind": "soft"}], "train": {**train, "epochs": epochs},
        },
    }  # fmt: skip
    path = place / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def watched(*arguments: str) -> dict[str, float]:
    """Run ``distill`` and look at its memory, every 20 ms.

    Returns:
        Bytes of its ``peak`` (the kernel's own mark), of the ``anonymous`` part's peak, and ``seconds``.
    """
    began, found = time.monotonic(), {"peak": 0.0, "anonymous": 0.0}
    process = subprocess.Popen([sys.executable, "-m", "distill", *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
        now = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
        for name, field in (("peak", "VmHWM"), ("anonymous", "RssAnon")):
            found[name] = max(found[name], 1024 * float(now.get(field, 0)))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"distill {' '.join(arguments)} ended with {process.returncode}")
    return {**found, "seconds": time.monotonic() - began}


def measure(place: Path, count: int, streaming: bool, epochs: float) -> dict[str, dict[str, float]]:
    """Cache logits of ``count`` documents, and train a student on them for so many epochs."""
    name = f"r{count}"
    recipe = str(write_recipe(place, name, write_shards(place / name, count), streaming, epochs))
    return {
        "cache": watched("cache", "--teacher", "teacher", "--recipe", recipe),
        "student": watched(
            "student", "--teacher", "teacher", "--recipe", recipe, "--name", name, "--no-control"
        ),
    }


def main() -> None:
    """Measure, print the table, and hold the growth against the goal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs=2, default=[100_000, 1_000_000], metavar=("FEW", "MANY"))
    parser.add_argument("--whole", action="store_true", help="leave streaming out")
    parser.add_argument("--one-epoch", action="store_true", help="of each corpus")
    arguments = parser.parse_args()
    few, many = arguments.rows
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ |= {
            "DISTILL_RUNS": str(place / "runs"), "HF_DATASETS_CACHE": str(place / "datasets"), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        write_tokenizer(place / "tokenizer")
        empty = write_recipe(place, "teacher", write_shards(place / "few", 1000), False)
        watched("teacher", "--recipe", str(empty), "--name", "teacher")
        epochs = {few: 1.0 if arguments.one_epoch else many / few, many: 1.0}
        found = {count: measure(place, count, not arguments.whole, epochs[count]) for count in (few, many)}
    worst = 0.0
    print(f"| | documents | peak MB | of it anonymous | MB above {few:,} | seconds |")
    print("|---|---|---|---|---|---|")
    for command in ("cache", "student"):
        for count in (few, many):
            one, base = found[count][command], found[few][command]
            worst = max(worst, one["peak"] / base["peak"])
            print(
                f"| distill {command} | {count:,} | {one['peak'] / 1e6:.0f} | {one['anonymous'] / 1e6:.0f} | "
                f"{(one['peak'] - base['peak']) / 1e6:.0f} ({one['peak'] / base['peak'] - 1:.1%}) | {one['seconds']:.0f} |"
            )
    print(f"\nlargest peak over that at {few:,}: {worst:.3f} (goal: below {GOAL})")
    sys.exit(int(worst >= GOAL))


if __name__ == "__main__":
    main()
