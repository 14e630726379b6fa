"""The matrix in docs/reliability.md: no promise without a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAD = "| what happens | what is promised | test |"


def promises() -> list[str]:
    lines = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("| ") and line != HEAD]


@pytest.mark.parametrize("row", promises())
def test_every_promise_names_a_test_that_there_is(row: str) -> None:
    named = row.rsplit(" | ", 1)[-1]
    tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", named)
    assert tests or "`make soak`" in named
    for file, name in tests:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
