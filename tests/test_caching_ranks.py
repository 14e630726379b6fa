"""Caching over several processes: one that dies leaves whole shards, and any number of them goes on with the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import Write

from distill import data, fitting, inference, logits, models
from distill import recipe as recipes
from distill.tasks import TaskSpec

torch.set_num_threads(1)

DIES = """
import os, signal
from distill import logits
from distill.__main__ import main
real, written = logits.write_shard, []
def write_shard(*arguments):
    if os.environ["RANK"] == "1" and written:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(real(*arguments))
    return written[-1]
logits.write_shard = write_shard
main()
"""
"""The second process is killed as it writes its second shard."""


def torchrun(processes: int, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return subprocess.run(
        [*launcher, str(processes), *command],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
    )  # fmt: skip


def test_a_pass_that_lost_a_process_is_gone_on_with_by_any_number(
    runs: Path, recipe_file: Write, tmp_path: Path
) -> None:
    file = str(recipe_file({"cache.tokens_per_shard": 500, "cache.precision": "fp32"}))
    recipe = recipes.load(file)
    task = TaskSpec("single_label", ("bad", "good"), "accuracy")
    model = models.build(recipe.teacher, "teacher", task, 0)
    model.save(tmp_path / "teacher")
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    ask = ("cache", "--teacher", str(tmp_path / "teacher"), "--recipe", file, "--split", "train")
    assert torchrun(2, str(script), *ask).returncode != 0
    (folder,) = (runs / "_logits").iterdir()
    whole = {path.name: len(logits._ids(path)) for path in logits._shards(folder)}
    assert whole, "what was written before stays"
    assert not (folder / "manifest.json").exists()
    rows = data.load(recipe).splits["train"]
    rest = len(rows) - sum(whole.values())
    assert rest > 0
    everything = fitting.encode_rows(model.eval(), rows)
    expected = inference.predict(model, everything, np.arange(len(rows)), 4096, "fp32")
    for processes in (3, 1):
        place = tmp_path / f"runs-{processes}"
        shutil.copytree(runs, place)
        done = torchrun(processes, "-m", "distill", *ask, DISTILL_RUNS=str(place))
        assert done.returncode == 0, done.stderr
        assert f"cached logits of {rest} documents" in done.stderr
        again = place / "_logits" / folder.name
        assert whole.keys() < {path.name for path in logits._shards(again)}
        assert logits.verify(again) == len(rows)
        np.testing.assert_allclose(logits.Logits(again)(rows.row_id), expected, atol=1e-5)
