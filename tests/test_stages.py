"""The stages inside their run folders: teacher, cached logits, students with their controls, a stop and a resume."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Write, documents, power_cut, small_disk, write_csv

from distill import (
    caching,
    catalog,
    checkpoint,
    data,
    files,
    fitting,
    inference,
    logits,
    models,
    planning,
    stages,
    tracking,
    training,
)
from distill import recipe as recipes
from distill import runs as folders
from distill.errors import DataError, DiskError, RecipeError, UsageError
from distill.evaluation import Predictions, measure
from distill.runs import RunFolder
from distill.schema import Recipe
from distill.stages import StudentJob

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


@pytest.fixture(autouse=True)
def _untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracker has tests of its own, and takes longer than all else here."""
    monkeypatch.setattr(tracking, "sync", lambda folder: None)


def teach(recipe: Recipe, name: str = "t", resume: str | None = None) -> RunFolder:
    return stages.train_teacher(recipe, "tiny", None if resume else name, resume)


def job_of(recipe: Recipe, teacher: str = "t", group: str = "s", seeds: int = 1, **more: Any) -> StudentJob:
    return StudentJob(
        [teacher], recipe.dump(), "tiny", "bert_miniature", group, seeds, **{"control": True, **more}
    )


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the finished teacher of this module is kept; filled by the first test that needs it."""
    return {"folder": tmp_path_factory.mktemp("taught")}


@pytest.fixture
def ready(runs: Path, recipe_file: Write, taught: dict[str, Path]) -> Recipe:
    """A recipe whose teacher ``t`` has finished, with its logits in the cache."""
    recipe = recipes.load(str(recipe_file({"student.train.batch_size": 16})))
    kept = taught["folder"] / "runs"
    if not kept.exists():
        teach(recipe)
        corpus = data.load(recipe)
        caching.cache_logits(caching.find_teacher("t"), recipe, corpus)
        shutil.copytree(runs, kept)
    else:
        shutil.copytree(kept, runs, dirs_exist_ok=True)
    return recipe


def test_a_finished_teacher_has_its_model_its_figures_and_no_checkpoints(ready: Recipe) -> None:
    folder = folders.find("t")
    run = folder.read()
    assert (run.status, run.role, run.seed, run.experiment) == ("finished", "teacher", 0, "tests")
    assert not folder.checkpoints.exists()
    assert models.load(folder.model).labels == ["bad", "good"]
    assert folder.metrics()["train"]["steps"] == 7
    assert [e["event"] for e in folder.entries()][-1] == "finished"


def test_the_recorded_figures_are_those_of_the_recorded_predictions(ready: Recipe) -> None:
    folder, corpus = folders.find("t"), data.load(ready)
    rows = Predictions.load(folder.predictions)
    again = measure("single_label", "accuracy", rows, ready.evaluation.length_buckets)
    assert folder.metrics()["test"] == again
    np.testing.assert_array_equal(rows.row_id, corpus.splits["test"].row_id)
    assert corpus.splits["test"].labels is not None
    np.testing.assert_array_equal(rows.labels, corpus.splits["test"].labels)
    found = models.TextReader(models.load(folder.model)).logits(corpus.splits["test"].texts())
    np.testing.assert_allclose(found, rows.logits, atol=1e-5)


def test_a_runs_own_recipe_run_again_gives_the_same_weights_and_figures(ready: Recipe) -> None:
    first = folders.find("t")
    again = teach(recipes.load(str(first.recipe)), "again")
    assert again.recipe.read_text() == first.recipe.read_text()
    assert models.weights_hash(models.load(again.model).model) == models.weights_hash(
        models.load(first.model).model
    )
    assert again.metrics()["test"] == first.metrics()["test"]


def test_nothing_of_test_is_read_before_the_training_is_over(
    runs: Path, recipe_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.load(str(recipe_file({"teacher.train.evaluate_every": 3})))
    test = set(data.load(recipe).splits["test"].row_id.tolist())
    seen: list[tuple[str, bool]] = []
    real_predict, real_step = inference.predict_all, training._step

    def predict_all(model: Any, rows: Any, *rest: Any) -> Any:
        seen.append(("predict", bool(test & set(rows.row_id.tolist()))))
        return real_predict(model, rows, *rest)

    def step(wrapped: Any, model: Any, rows: Any, *rest: Any) -> Any:
        seen.append(("step", bool(test & set(rows.row_id.tolist()))))
        return real_step(wrapped, model, rows, *rest)

    monkeypatch.setattr(inference, "predict_all", predict_all)
    monkeypatch.setattr(training, "_step", step)
    teach(recipe)
    reads = [at for at, (_, touched) in enumerate(seen) if touched]
    assert len(reads) == 1, "test is read once"
    assert reads[0] > max(at for at, (what, _) in enumerate(seen) if what == "step")
    assert sum(what == "predict" for what, _ in seen) == 3 + 2


def test_a_student_has_a_control_that_differs_in_the_teacher_alone(
    ready: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = data.load(ready)
    rows: dict[str, set[int]] = {}
    real = training._step

    def step(
        wrapped: Any, model: Any, part: Any, documents: Any, lengths: Any, objective: Any, *rest: Any
    ) -> Any:
        who = "distilled" if objective.needs_teacher else "control"
        rows.setdefault(who, set()).update(part.row_id[documents].tolist())
        assert part.labelled.all() == (who == "control")
        return real(wrapped, model, part, documents, lengths, objective, *rest)

    monkeypatch.setattr(training, "_step", step)
    stages.train_students(job_of(ready, seeds=2))
    labelled, transfer = (set(corpus.splits[n].row_id.tolist()) for n in ("train", "transfer"))
    assert rows == {"distilled": labelled | transfer, "control": labelled}
    initial = set()
    for suffix in ("", "-seed1"):
        one, two = folders.find(f"s{suffix}"), folders.find(f"s-control{suffix}")
        assert (one.read().role, two.read().role) == ("distilled", "control")
        assert one.read().facts["initial_weights"] == two.read().facts["initial_weights"]
        assert one.read().facts["data"] == two.read().facts["data"]
        assert one.metrics()["train"]["steps"] == two.metrics()["train"]["steps"] == 7
        weights = [models.weights_hash(models.load(f.model).model) for f in (one, two)]
        assert weights[0] != weights[1]
        initial.add(one.read().facts["initial_weights"])
    assert len(initial) == 2
    assert [f.name for f in folders.every() if f.read().role == "baseline"] == ["s-tfidf"]


def test_text_from_elsewhere_is_taught_and_drawn_by_its_weight(
    ready: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "more.txt"
    lines.write_text("\n".join(f"{text} elsewhere" for text, _ in documents(20, seed=3)))
    raw = yaml.safe_load(ready.dump())
    raw["data"]["transfer"] = [{"source": str(lines), "weight": 3.0}]
    raw["student"]["train"] |= {"epochs": 2.0}
    recipe = recipes.build(raw, "x")
    corpus = data.load(recipe)
    drawn: dict[str, list[int]] = {"distilled": [], "control": []}
    real = training._step

    def step(
        wrapped: Any, model: Any, part: Any, documents: Any, lengths: Any, objective: Any, *rest: Any
    ) -> Any:
        drawn["distilled" if objective.needs_teacher else "control"] += part.row_id[documents].tolist()
        return real(wrapped, model, part, documents, lengths, objective, *rest)

    monkeypatch.setattr(training, "_step", step)
    stages.train_students(job_of(recipe))
    ids, counts = np.unique(drawn["distilled"], return_counts=True)
    often = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    transfer = corpus.splits["transfer"]
    assert {often[i] for i in transfer.row_id[-20:].tolist()} == {6}, "two epochs of three draws"
    others = [*transfer.row_id[:-20].tolist(), *corpus.splits["train"].row_id.tolist()]
    assert {often[i] for i in others} == {2}
    assert len(often) == len(others) + 20
    assert set(drawn["control"]) == set(corpus.splits["train"].row_id.tolist())
    steps = {name: folders.find(name).metrics()["train"]["steps"] for name in ("s", "s-control")}
    assert steps == {"s": 2 * -(-(len(others) + 60) // 16), "s-control": steps["s"]}
    cached = logits.Logits(logits.every()[0])
    assert np.isfinite(cached(transfer.row_id)).all(), "one cache holds the rows of every source"


def test_a_finished_group_trains_nothing_again(ready: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stages.train_students(job_of(ready))
    stamps = {f.name: (f.path / "metrics.json").stat().st_mtime_ns for f in first}
    monkeypatch.setattr(fitting, "train", None)
    monkeypatch.setattr(inference, "predict", None)
    again = stages.train_students(job_of(ready))
    assert {f.name: (f.path / "metrics.json").stat().st_mtime_ns for f in again} == stamps
    assert [f.name for f in again] == ["s", "s-control", "s-tfidf"]


def test_a_group_that_failed_in_the_middle_goes_on_there(
    ready: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.train

    def no_control(model: Any, rows: Any, objective: Any, *rest: Any, **more: Any) -> Any:
        if not objective.needs_teacher:
            raise ValueError("broken")
        return real(model, rows, objective, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "train", no_control)
        with pytest.raises(ValueError, match="broken"):
            stages.train_students(job_of(ready))
    assert folders.find("s").read().status == "finished"
    failed = folders.find("s-control").read()
    assert (failed.status, failed.error) == ("failed", "ValueError: broken")
    stamp = (folders.find("s").path / "metrics.json").stat().st_mtime_ns
    job = StudentJob(**failed.command)
    assert [f.read().status for f in stages.train_students(job)] == ["finished"] * 3
    assert (folders.find("s").path / "metrics.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_student_of_a_teacher_that_has_not_finished_is_refused(status: str, ready: Recipe) -> None:
    folders.find("t").update(status=status)
    with pytest.raises(UsageError, match=f"t has not finished .{status}.; distill teacher --resume t"):
        stages.train_students(job_of(ready))
    assert [f.name for f in folders.every()] == ["t"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze_layers": 9}, "train.freeze_layers: 9 layers to freeze, and the model has 2"),
        ({"precision": "fp16"}, "train.precision: fp16 needs a GPU"),
    ],
)
def test_training_that_cannot_be_is_refused_before_there_is_a_folder_or_a_logit(
    settings: dict[str, Any], words: str, ready: Recipe
) -> None:
    raw = yaml.safe_load(ready.dump())
    for section in ("teacher", "student"):
        raw[section]["train"] |= settings
    before = {path.name for path in folders.runs_folder().iterdir()}
    for work in (teach, lambda recipe, name: stages.train_students(job_of(recipe))):
        with pytest.raises(RecipeError, match=words):
            work(recipes.build(raw, "x"), "refused")
    assert {path.name for path in folders.runs_folder().iterdir()} == before


def test_tfidf_does_not_teach(ready: Recipe) -> None:
    folders.find("t").update(role="baseline")
    with pytest.raises(UsageError, match="--teacher: t is TF-IDF, whose logits cannot be cached"):
        stages.train_students(job_of(ready))


def test_class_weights_are_those_of_the_training_rows_for_teacher_student_control_and_tfidf(
    ready: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = yaml.safe_load(ready.dump())
    raw["task"]["class_weights"] = "balanced"
    weighed = recipes.build(raw, "x")
    counts = np.bincount(np.asarray(data.load(weighed).splits["train"].labels))
    seen: dict[bool, set[Any]] = {}
    real = training._step

    def step(
        wrapped: Any, model: Any, part: Any, documents: Any, lengths: Any, objective: Any, *rest: Any
    ) -> Any:
        seen.setdefault(objective.needs_teacher, set()).add(objective.class_weights)
        return real(wrapped, model, part, documents, lengths, objective, *rest)

    monkeypatch.setattr(training, "_step", step)
    baseline = catalog.load("student", "tfidf")
    fitted = baseline.fit
    given: list[Any] = []

    def fit(*rest: Any) -> Any:
        given.append(rest[-1])
        return fitted(*rest)

    monkeypatch.setattr(baseline, "fit", fit)
    teach(weighed, "weighed")
    stages.train_students(job_of(weighed, teacher="weighed"))
    (own,), (distilled,) = seen[False], seen[True]
    assert given == [own]
    assert own == distilled == pytest.approx(counts.sum() / (2 * counts))
    figures = [folders.find(name).metrics()["validation"]["nll"] for name in ("t", "weighed")]
    assert figures[0] != figures[1]


def test_labels_of_transfer_rows_are_never_read(ready: Recipe, tmp_path: Path) -> None:
    corpus = data.load(ready)
    assert corpus.splits["transfer"].labels is None
    source = tmp_path / "lies.csv"
    # The same rows, split by hand; in one file the labels of transfer are right, in the other all wrong.
    texts = {name: corpus.splits[name].texts() for name in corpus.splits}
    known = dict(documents(160))
    hashes = []
    for turn in (0, 1):
        files = {}
        for name, rows in texts.items():
            wrong = turn if name == "transfer" else 0
            table = [(text, ["bad", "good"][known[text] ^ wrong]) for text, _ in rows]
            files[str(name)] = str(write_csv(source.with_name(f"{name}{turn}.csv"), table))
        raw = yaml.safe_load(ready.dump())
        raw["data"] |= {"source": files, "splits": {n: {"from": n} for n in files}}
        recipe = recipes.build(raw, "lies.yaml")
        stages.train_students(job_of(recipe, group=f"g{turn}", control=False))
        hashes.append(models.weights_hash(models.load(folders.find(f"g{turn}").model).model))
    assert hashes[0] == hashes[1]


def test_a_full_disk_is_told_before_any_training_and_leaves_no_run(
    runs: Path, recipe_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"disk: the run needs about .* and 1\.0 kB are free"):
        teach(recipes.load(str(recipe_file())))
    assert [p.name for p in runs.iterdir() if p.is_dir()] == []


def test_a_second_process_in_a_run_is_turned_away(ready: Recipe) -> None:
    folder = folders.find("t")
    folder.update(status="interrupted")
    before = (folder.path / "metrics.json").read_bytes()
    with folder.locked(), pytest.raises(UsageError, match="another process is working in this run"):
        teach(recipes.load(str(folder.recipe)), resume="t")
    assert (folder.path / "metrics.json").read_bytes() == before


def test_a_name_that_is_taken_and_a_run_that_has_finished_are_refused_at_once(
    ready: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "load_corpus", None)  # nothing is read for that
    with pytest.raises(UsageError, match="run t exists already"):
        teach(ready)
    with pytest.raises(UsageError, match="t has finished already"):
        teach(ready, resume="t")


def test_a_run_that_fails_says_so_and_can_be_resumed(
    runs: Path, recipe_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.load(str(recipe_file()))

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("bug")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", broken)
        with pytest.raises(ZeroDivisionError):
            teach(recipe)
    run = folders.find("t").read()
    assert (run.status, run.error) == ("failed", "ZeroDivisionError: bug")
    assert teach(recipes.load(str(folders.find("t").recipe)), resume="t").read().status == "finished"


def test_a_resume_with_an_edited_recipe_is_refused_with_the_line(
    runs: Path, recipe_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.load(str(recipe_file({"teacher.train.evaluate_every": 2})))
    real, made = training._step, 0

    def dies(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 4:
            raise MemoryError
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", dies)
        with pytest.raises(Exception, match="out of memory"):
            teach(recipe)
    file = folders.find("t").recipe
    file.write_text(file.read_text().replace("learning_rate: 0.001", "learning_rate: 0.002", 1))
    with pytest.raises(
        DataError, match=r"cannot be resumed: recipe was learning_rate: 0\.001, and is learning_rate: 0\.002"
    ):
        teach(recipes.load(str(file)), resume="t")


def full_at(patch: pytest.MonkeyPatch, what: str) -> None:
    """Let the disk be full when something of this name is written after the first checkpoint."""
    real, log = files.sync_file, RunFolder.log

    def full(path: object) -> OSError:
        return OSError(errno.ENOSPC, "No space left on device", str(path))

    def sync_file(path: Path) -> None:
        if what in path.name and any(path.parents[1].glob("**/step-000000002")):
            raise full(path)
        real(path)

    def append(folder: RunFolder, step: int, *rest: Any, **more: Any) -> None:
        if what == "journal" and step == 4:
            with folder.journal.open("a") as file:
                file.write('{"time": 1.0, "st')
            raise full(folder.journal)
        log(folder, step, *rest, **more)

    patch.setattr(files, "sync_file", sync_file)
    patch.setattr(RunFolder, "log", append)


@pytest.mark.parametrize(
    "what", ["optimizer.safetensors", "journal", "predictions.safetensors", "metrics.json"]
)
def test_a_disk_that_fills_up_costs_one_line_and_a_resume(
    what: str, runs: Path, recipe_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.load(str(recipe_file({"teacher.train.evaluate_every": 2, "teacher.train.max_steps": 4})))
    whole = teach(recipe, "whole")
    with monkeypatch.context() as patch:
        full_at(patch, what)
        with pytest.raises(DiskError, match=r"no space left on device; .*--resume t goes on") as caught:
            teach(recipe)
    assert caught.value.exit_code == 4
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    folder = folders.find("t")
    assert folder.read().status == "failed"
    assert teach(recipes.load(str(folder.recipe)), resume="t").read().status == "finished"
    one, two = ((f.model / "model.safetensors").read_bytes() for f in (whole, folder))
    assert one == two
    assert [e["step"] for e in folder.entries()][-1] == 4
    assert not [path.name for path in folder.path.rglob(".*.tmp")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_small_disk_that_is_really_full_costs_one_line_and_a_resume(
    runs: Path, recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.load(str(recipe_file({"teacher.train.evaluate_every": 2, "teacher.train.max_steps": 4})))
    whole = (teach(recipe, "whole").model / "model.safetensors").read_bytes()
    with small_disk(tmp_path / "small", "8m") as small:
        monkeypatch.setenv("DISTILL_RUNS", str(small))
        monkeypatch.setattr(planning, "require_disk", lambda needed: None)
        ballast, real = small / "ballast", checkpoint.save

        def save(folder: Path, *rest: Any) -> Path:
            if folder.exists():  # the second one
                ballast.write_bytes(b"x" * (shutil.disk_usage(small).free - (100 << 10)))
            return real(folder, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", save)
            with pytest.raises(DiskError, match=r"no space left on device; .*--resume t goes on"):
                teach(recipe)
        kept = [path.name for path in folders.find("t").checkpoints.iterdir()]
        assert kept == ["step-000000002"], "what was whole stays whole"
        ballast.unlink()
        done = teach(recipes.load(str(folders.find("t").recipe)), resume="t")
        assert (done.model / "model.safetensors").read_bytes() == whole


def test_a_folder_that_loses_its_permissions_costs_one_line(
    ready: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *rest: Any, **more: Any) -> None:
        if ".step-" in self.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        real(self, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(DiskError, match=r"step-.*: permission denied; .*--resume u goes on"):
            teach(ready, "u")
    folder = folders.find("u")
    assert teach(recipes.load(str(folder.recipe)), resume="u").read().status == "finished"
    one, two = ((folders.find(n).model / "model.safetensors").read_bytes() for n in ("t", "u"))
    assert one == two


def test_a_plan_of_a_teacher_trains_nothing(ready: Recipe) -> None:
    before = [folder.path for folder in folders.every()]
    found = stages.plan_teacher(ready)
    assert found.title == f"teacher {ready.teacher.architecture}"
    assert found.cost.steps == folders.find("t").metrics()["train"]["steps"]
    assert [folder.path for folder in folders.every()] == before


def test_the_cache_is_made_once_and_grows_with_the_data(
    ready: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, teacher = data.load(ready), caching.find_teacher("t")
    first = caching.cache_logits(teacher, ready, corpus)
    assert len(first) == 130
    assert not np.isin(corpus.splits["test"].row_id, first._ids).any(), "test is not for students"
    computed: list[int] = []
    real = logits.fill

    def fill(*arguments: Any) -> int:
        computed.append(real(*arguments))
        return computed[-1]

    monkeypatch.setattr(logits, "fill", fill)
    caching.cache_logits(teacher, ready, corpus)
    assert computed == []
    source = Path(str(ready.data.source))
    more = write_csv(source.with_name("more.csv"), documents(200))
    raw = yaml.safe_load(ready.dump())
    raw["data"]["source"] = str(more)
    larger = recipes.build(raw, "more.yaml")
    grown = caching.cache_logits(teacher, larger, data.load(larger))
    assert grown.folder == first.folder
    # New rows, and those that were test before and are not now.
    wanted = set(
        np.concatenate(
            [data.load(larger).splits[n].row_id for n in ("train", "validation", "transfer")]
        ).tolist()
    )
    assert computed == [len(wanted - set(first._ids.tolist()))]
    assert len(grown) == 130 + computed[0]


def test_a_student_over_a_given_cache_refuses_one_of_another_teacher(ready: Recipe) -> None:
    raw = yaml.safe_load(ready.dump())
    raw["teacher"]["train"]["seed"] = 5
    teach(recipes.build(raw, "x"), "other")
    cache = logits.every()[0].name
    with pytest.raises(DataError, match="another teacher's weights"):
        stages.train_students(job_of(ready, teacher="other", logits=cache))


def inside(recipe: Recipe, *terms: dict[str, Any], **student: Any) -> Recipe:
    """Give a recipe's student other terms."""
    raw = yaml.safe_load(recipe.dump())
    raw["student"] |= {"losses": list(terms), **student}
    return recipes.build(raw, "tiny")


def test_a_live_teacher_stands_beside_the_student_and_not_beside_its_control(
    ready: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: dict[str, bool] = {}
    real = training.train

    def train(*arguments: Any, **more: Any) -> Any:
        folder, pair = arguments[6], arguments[-1]
        beside[folder.name] = pair is not None
        return real(*arguments, **more)

    monkeypatch.setattr(fitting, "train", train)
    monkeypatch.setattr(caching, "cache_logits", None)  # no term reads logits: none are computed
    narrow = {"config": {**ready.student.config, "hidden_size": 16}}
    recipe = inside(ready, {"kind": "hard"}, {"kind": "hidden_mse"}, {"kind": "relation"}, **narrow)
    stages.train_students(job_of(recipe))
    assert beside == {"s": True, "s-control": False}
    ours, control = ({n for e in folders.find(name).entries() for n in e["metrics"]} for name in beside)
    inner = {"train/loss_hidden_mse", "train/loss_relation"}
    assert inner <= ours
    assert not inner & control
    one, two = folders.find("s"), folders.find("s-control")
    assert one.read().facts["initial_weights"] == two.read().facts["initial_weights"]
    assert one.metrics()["model"]["parameters"] == two.metrics()["model"]["parameters"]
    assert set(models.load(one.model).state_dict()) == set(models.load(two.model).state_dict())


def test_terms_of_the_inside_and_of_logits_go_together(ready: Recipe) -> None:
    recipe = inside(ready, {"kind": "soft", "temperature": 2.0}, {"kind": "attention"})
    stages.train_students(job_of(recipe, control=False))
    run = folders.find("s")
    assert {"train/loss_soft", "train/loss_attention"} <= {n for e in run.entries() for n in e["metrics"]}
    assert len(run.read().facts["logits"]) == 1
    assert run.suspects.is_file()


@pytest.mark.parametrize(
    ("teachers", "term", "student", "said"),
    [
        ([], {}, {}, "cosine needs the teacher itself, and --logits gives its logits alone; add --teacher"),
        (["t", "t"], {}, {}, "cosine compares layers with those of one teacher, not 2"),
        (["t"], {"kind": "hidden_mse", "layer_map": [[1, 9]]}, {}, "layer 9 is out of range; the teacher has 2 layers"),
        (["t"], {}, {"max_length": 200}, "student.max_length is 200, and the teacher beside it reads 128 tokens"),
    ],
)  # fmt: skip
def test_a_live_teacher_that_cannot_be_there_is_told_before_anything_is_cached_or_trained(
    teachers: list[str], term: dict[str, Any], student: dict[str, Any], said: str, ready: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe = inside(ready, {"kind": "soft"}, {"kind": "cosine", **term}, **student)
    monkeypatch.setattr(caching, "cache_logits", None)
    job = StudentJob(
        teachers, recipe.dump(), "tiny", "bert_miniature", "s", 1, control=True, logits=logits.every()[0].name
    )
    with pytest.raises((UsageError, RecipeError)) as caught:
        stages.train_students(job)
    assert said in str(caught.value)
    assert [one.name for one in folders.every()] == ["t"]
    if teachers == ["t"]:
        with pytest.raises(RecipeError, match="the teacher"):
            stages.plan_students(recipe, teachers)


def test_a_resume_beside_another_teacher_is_refused(ready: Recipe) -> None:
    recipe = inside(
        ready, {"kind": "cosine"}, train={**ready.student.train.model_dump(), "evaluate_every": 2}
    )
    with power_cut(4):
        stages.train_students(job_of(recipe, control=False))
    raw = yaml.safe_load(ready.dump())
    raw["teacher"]["train"]["seed"] = 5
    shutil.rmtree(folders.find("t").path)
    teach(recipes.build(raw, "x"))
    with pytest.raises(DataError, match="s: cannot be resumed: live teacher's weights was"):
        stages.train_students(job_of(recipe, control=False))


def test_a_damaged_cache_is_refused_and_the_shard_is_named(ready: Recipe) -> None:
    shard = next(logits.every()[0].glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"shard {shard.name} is damaged"):
        stages.train_students(job_of(ready))
    assert [f.name for f in folders.every()] == ["t"]


class Knowing:
    """Cached logits of a teacher that is too sure of itself, right of four validation rows in five."""

    folder = Path("knowing")

    def __init__(self, corpus: data.Corpus) -> None:
        self.logits: dict[int, float] = {}
        for name, rows in corpus.splits.items():
            labels = rows.labels if rows.labels is not None else np.zeros(len(rows))
            for number, (row, label) in enumerate(zip(rows.row_id, labels, strict=True)):
                wrong = number % 5 == 0 if name == "validation" else number in (3, 4)
                self.logits[int(row)] = (5.0 - number % 7 / 10) * (1 if bool(label) != wrong else -1)

    def __call__(self, row_ids: Any) -> Any:
        first = np.array([self.logits[int(row)] for row in row_ids], np.float32)
        return np.stack([-first, first], axis=1)

    def require(self, row_ids: Any) -> None:
        assert {int(row) for row in row_ids} <= self.logits.keys()


def test_calibrated_targets_are_the_teachers_logits_over_a_temperature_that_the_run_tells(
    ready: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load(ready.dump())
    raw["student"] |= {"calibrate": True, "losses": [{"kind": "dkd"}]}
    recipe, corpus = recipes.build(raw, "x"), data.load(ready)
    knowing = Knowing(corpus)
    monkeypatch.setattr(caching, "cache_logits", lambda *_: knowing)
    seen: dict[int, Any] = {}
    real = training._step

    def step(wrapped: Any, model: Any, rows: Any, documents: Any, *rest: Any) -> Any:
        lookup = rest[5]
        seen.update(zip(rows.row_id[documents].tolist(), lookup(rows.row_id[documents]), strict=True))
        return real(wrapped, model, rows, documents, *rest)

    monkeypatch.setattr(training, "_step", step)
    stages.train_students(job_of(recipe, control=False))
    folder, rows = folders.find("s"), corpus.splits["train"]
    fitted = folder.read().facts["calibration"]
    assert fitted == folder.metrics()["calibration"]
    assert fitted["rows"] == 20
    assert fitted["temperature"] > 3
    assert fitted["nll_after"] < fitted["nll_before"]
    # dkd alone has nothing to say of rows without labels: they are not read.
    assert sorted(seen) == sorted(rows.row_id.tolist())
    np.testing.assert_allclose(
        np.stack([seen[int(row)] for row in rows.row_id]),
        knowing(rows.row_id) / fitted["temperature"],
        rtol=1e-6,
    )
    told = " ".join(capsys.readouterr().err.split())
    assert "transfer: not used, for every term of student.losses needs a label" in told
    assert f"the teacher's logits are divided by T = {fitted['temperature']:.2f}, fitted on 20" in told
    listed = json.loads(folder.suspects.read_text())
    assert [one["row_id"] for one in listed["suspects"]] == rows.row_id[[3, 4]].tolist()
    assert (
        f"{listed['doubted']} of {len(rows)} training labels look wrong to the teacher (p < 0.1; it contradicts 2)"
        in told
    )
    assert str(folder.suspects) in told


def test_doubts_are_those_of_the_cached_logits_and_a_control_has_none(ready: Recipe) -> None:
    stages.train_students(job_of(ready, seeds=2))
    corpus = data.load(ready)
    rows, cache = corpus.splits["train"], logits.Logits(logits.every()[0])
    wrong = rows.row_id[cache(rows.row_id).argmax(1) != rows.labels]
    for name in ("s", "s-seed1"):
        listed = json.loads(folders.find(name).suspects.read_text())
        assert {one["row_id"] for one in listed["suspects"]} <= set(wrong.tolist())
        assert len(listed["suspects"]) == min(20, len(wrong)) > 0
        assert "calibration" not in folders.find(name).metrics()
    assert not any(folders.find(name).suspects.exists() for name in ("s-control", "s-tfidf", "t"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_run_costs_nothing_but_a_resume(number: int, runs: Path, recipe_file: Write) -> None:
    file = recipe_file({"teacher.train.epochs": 12.0, "teacher.train.evaluate_every": 5})
    process = subprocess.Popen(
        [sys.executable, "-m", "distill", "teacher", "--recipe", str(file), "--name", "mine"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    folder = RunFolder(runs / "mine")
    wait_for(folder.journal.exists, process)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert "Traceback" not in told
    assert "--resume mine" in told
    assert folder.read().status == "interrupted"
    done = int(max(folder.checkpoints.iterdir()).name.removeprefix("step-"))
    assert 5 <= done < 84

    finished = teach(recipes.load(str(folder.recipe)), resume="mine")
    assert finished.read().status == "finished"
    whole = teach(recipes.load(str(file)), "whole")
    hashes = {models.weights_hash(models.load(f.model).model) for f in (finished, whole)}
    assert len(hashes) == 1
    assert finished.metrics()["test"] == whole.metrics()["test"]
