"""The ready-made examples: bash and YAML that parse, and command lines that are those of the tool."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from distill import recipe as recipes
from distill.cli import app

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = sorted(path for path in (DOCS / "examples").iterdir())
VERBS = "teacher|student|sweep|cache|pretrain|demo"


def parse(words: list[str]) -> dict[str, Any]:
    """Read a command line as the tool does, and run nothing."""
    command: Any = typer.main.get_command(app)
    name, found, rest = command.resolve_command(command.make_context("distill", list(words)), words)
    context = found.make_context(name, rest)
    values: dict[str, Any] = context.params
    return values


def command_lines(text: str) -> list[list[str]]:
    """Find the calls of ``distill`` in a script, with the lines that they go on in."""
    found = re.findall(rf"distill ((?:{VERBS}) [^)`\n&;|]*)", text.replace("\\\n", " "))
    return [shlex.split(line) for line in found]


def scripts(value: Any) -> Iterator[str]:
    """Find the shell scripts inside a YAML document: its texts of several lines."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from scripts(each)
    elif isinstance(value, str) and "\n" in value:
        yield value


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_parses_and_calls_the_tool_as_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    shells = [text] if path.suffix == ".sh" else []
    if path.suffix == ".yaml":
        shells = [script for document in yaml.safe_load_all(text) for script in scripts(document)]
    for script in shells:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)  # noqa: S607
    lines = command_lines(text)
    assert len(lines) == (1 if path.stem == "fsdp2" else 2), "a run is begun, and gone on with"
    for line in lines:
        values = parse(line)
        assert (values["recipe"] is None) != (values["resume"] is None)
        if values["recipe"]:
            recipes.load(values["recipe"], values["set_"] or [])


def test_the_guide_shows_command_lines_of_the_tool() -> None:
    lines = command_lines((DOCS / "scale.md").read_text(encoding="utf-8"))
    assert lines
    for line in lines:
        parse(line)


def test_accelerate_reads_its_example_as_it_is_meant() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(DOCS / "examples" / "fsdp2.yaml"))
    assert found.distributed_type == "FSDP"
    assert found.fsdp_config["fsdp_version"] == 2


def test_an_option_that_there_is_not_is_noticed() -> None:
    with pytest.raises(Exception, match="--recipy"):
        parse(shlex.split("teacher --recipy imdb"))
