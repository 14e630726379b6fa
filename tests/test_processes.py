"""Two processes on CPUs, over gloo: one job, one set of run folders, the same figures as one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import TINY, Write, distill

from distill import data, inference, pretraining
from distill import recipe as recipes
from distill.masking import HeldOut
from distill.runs import RunFolder


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, "-m", "distill", *arguments],
        capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_two_processes_train_what_one_does(runs: Path, recipe_file: Write) -> None:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    changes: dict[str, Any] = {f"teacher.config.{name}": value for name, value in dropout.items()}
    changes |= {
        "data.augment": {"replace": 0.0, "copies": 1},
        "teacher.train.log_gradient_norms": True,
        "student.config": {**TINY, "hidden_size": 16},
        "student.losses": [{"kind": "soft"}, {"kind": "hidden_mse"}, {"kind": "relation"}],
    }
    recipe = str(recipe_file(changes))
    alone = distill("teacher", "--recipe", recipe, "--name", "alone")
    assert alone.returncode == 0, alone.stderr
    shutil.rmtree(runs / "_augmented")
    done = distill("teacher", "--recipe", recipe, "--name", "both", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("both") == 1, "results are told once"
    found = {name: json.loads((runs / name / "metrics.json").read_text()) for name in ("alone", "both")}
    facts = {name: json.loads((runs / name / "run.json").read_text())["facts"] for name in found}
    assert facts["both"]["processes"] == 2
    assert facts["alone"]["data"] == facts["both"]["data"], "augmented copies included"
    assert abs(found["alone"]["test"]["nll"] - found["both"]["test"]["nll"]) < 1e-4
    norms = [
        next(RunFolder(runs / name).entries())["metrics"]["train/gradient_norm_hard"]
        for name in ("alone", "both")
    ]
    assert norms[0] > 0
    assert abs(norms[1] / norms[0] - 1) < 1e-3
    done = torchrun("student", "--teacher", "both", "--name", "s")
    assert done.returncode == 0, done.stderr
    names = sorted(path.parent.name for path in runs.glob("s*/metrics.json"))
    assert names == ["s", "s-control", "s-tfidf"]
    beside = {name for entry in RunFolder(runs / "s").entries() for name in entry["metrics"]}
    assert {"train/loss_soft", "train/loss_hidden_mse", "train/loss_relation"} <= beside
    assert done.stderr.count("training labels look wrong to the teacher") == 1, "told once"


def test_two_processes_pre_train_one_model_and_measure_it_as_one_does(runs: Path, recipe_file: Write) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    train = {"max_steps": 6, "evaluate_every": 3, "batch_size": 15, "precision": "fp32"}
    keys = {f"pretraining.train.{key}": value for key, value in train.items()}
    file = str(recipe_file({**keys, "student.architecture": "fnet", "student.config": config}))
    done = torchrun("pretrain", "--recipe", file, "--name", "p")
    assert done.returncode == 0, done.stderr
    folder = RunFolder(runs / "p")
    assert folder.read().facts["processes"] == 2
    recipe = recipes.load(file, [f"student.checkpoint={folder.model}", "student.config={}"])
    model = pretraining.build(recipe)
    windows = pretraining._pack(model, data.load(recipe).splits["validation"], "validation")
    again = HeldOut(windows, model.masking).measure(model, 4096, inference.make_accelerator("fp32"))
    assert abs(again["nll"] - folder.metrics()["validation"]["nll"]) < 1e-4
    narrow = "student.config={hidden_size: 16, num_hidden_layers: 1, intermediate_size: 32}"
    done = torchrun("pretrain", "--recipe", file, "--set", narrow, "--teacher", "p", "--name", "taught")
    assert done.returncode == 0, done.stderr
    assert {"train/loss_soft", "train/loss_cosine"} <= next(RunFolder(runs / "taught").entries())[
        "metrics"
    ].keys()
