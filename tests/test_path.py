"""The whole path through the true command line: recipe, teacher, logits, students, comparison, prediction."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Write, distill


def test_a_csv_of_ones_own_goes_from_recipe_to_table(runs: Path, recipe_file: Write, tmp_path: Path) -> None:
    recipe = str(recipe_file())
    done = distill("teacher", "--recipe", recipe)
    assert done.returncode == 0, done.stderr
    assert "run1" in done.stdout
    assert "distill student --teacher run1" in done.stderr

    done = distill("student", "--teacher", "run1", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    names = sorted(path.parent.name for path in runs.glob("*/run.json"))
    assert names == ["run1", "run2", "run2-control", "run2-control-seed1", "run2-seed1", "run2-tfidf"]

    done = distill("compare", "run2", "--no-bench", "--report", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    assert "tfidf" in done.stdout
    assert {"comparison.csv", "comparison.json", "pareto.png"} <= {
        p.name for p in (tmp_path / "report").iterdir()
    }

    lines = tmp_path / "new.txt"
    lines.write_text("good great fine film\nbad poor dull film\n")
    done = distill("predict", "--run", "run2", str(lines))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(answer["probabilities"]) for answer in answers] == [{"bad", "good"}] * 2
