"""YAML as a person reads it: 1.2 scalars, no duplicate keys, no tags, bounded size. Knows no schema.

PyYAML's ``safe_load`` reads ``1e-5`` as a string and ``no`` as False, and keeps the last of two equal
keys; each of these has spoiled somebody's long run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from distill.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_ALIASES = 20
MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the YAML 1.2 core schema's scalars and unique keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - replaces the parent's table


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes what either version of YAML would not read as text."""


def _resolver(tag: str, pattern: str, first: str) -> None:
    for kind in (_Loader, _Dumper):
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolver("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_resolver("null", r"^(?:~|null|Null|NULL|)$", "~nN")
_resolver("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789")
_resolver(
    "float",
    r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*(?:\.|\.?[eE][-+]?[0-9]+)"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    "-+.0123456789",
)
# An empty scalar has no first character: PyYAML looks it up under "".
_Loader.yaml_implicit_resolvers[""] = [("tag:yaml.org,2002:null", re.compile(r"^$"))]


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, list | dict):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key in result:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def read(path: Path) -> Any:
    """Read a YAML file, and of one that is larger than a recipe can be no more than that.

    Raises:
        RecipeError: it cannot be read, or what :func:`parse` refuses.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        # The last character may be cut in two; such a file is refused for its length.
        return parse(content.decode("utf-8", "ignore" if len(content) > MAX_BYTES else "strict"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None


def parse(text: str, where: str) -> Any:
    """Read YAML text.

    Args:
        text: the YAML.
        where: the file's name, for messages.

    Returns:
        Plain Python values: dict, list, str, int, float, bool, None.

    Raises:
        RecipeError: not YAML, a key twice, a tag, or larger or deeper than a recipe can be.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise RecipeError(f"{where}: larger than 1 MiB; a recipe is one screen")
    try:
        open_anchors: list[str | None] = []
        aliases = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.events.CollectionStartEvent):
                open_anchors.append(event.anchor)
            elif isinstance(event, yaml.events.CollectionEndEvent):
                open_anchors.pop()
            elif isinstance(event, yaml.events.AliasEvent):
                aliases += 1
                if any(open_anchors):  # what is copied holds no copies: a few would make millions
                    raise RecipeError(f"{where}: *{event.anchor} stands inside an anchor; write it out flat")
            if len(open_anchors) > MAX_DEPTH:
                raise RecipeError(f"{where}: nested deeper than {MAX_DEPTH}; write it out flat")
            if aliases > MAX_ALIASES:
                raise RecipeError(f"{where}: over {MAX_ALIASES} aliases; write it out flat")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader, made stricter
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or "not YAML"
        if "constructor for the tag" in problem:
            problem = f"a recipe has no tags ({problem.rsplit(' ', 1)[-1]})"
        raise RecipeError(f"{where}{line}: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None


def dump(value: Any) -> str:
    """Write plain values as YAML that :func:`parse` reads back to the same values."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
