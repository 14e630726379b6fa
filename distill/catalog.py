"""The folder is the registry: a file in teachers/, students/ or recipes/ is an entry, and nothing else is.

Knows names and modules. An architecture's file holds, beside its functions, a schema class ``Config``
and, where sizes have names of their own, ``PRESETS``. None of them imports torch at its top, so that a
recipe is checked in milliseconds.
"""

from __future__ import annotations

import importlib
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distill.errors import RecipeError, UsageError, nearest

if TYPE_CHECKING:
    from distill.schema import Model


def _folder(package: str) -> Path:
    return Path(str(files(f"distill.{package}")))


def names(section: str) -> list[str]:
    """List the architectures of ``"teacher"`` or ``"student"``."""
    found = _folder(f"{section}s").glob("*.py")
    return sorted(path.stem for path in found if not path.stem.startswith("_"))


def recipes() -> dict[str, Path]:
    """List the recipes that ship, with their files."""
    return {path.stem: path for path in sorted(_folder("recipes").glob("*.yaml"))}


def load(section: str, name: str) -> ModuleType:
    """Import one architecture's file.

    Raises:
        RecipeError: there is no such file.
    """
    known = names(section)
    if name not in known:
        raise RecipeError(f"{section}.architecture: no {section} called {name!r}{nearest(name, known)}")
    return importlib.import_module(f"distill.{section}s.{name}")


def reader(model_type: str) -> tuple[str, str] | None:
    """Find the architecture, as section and name, whose file reads models of this transformers type."""
    for section in ("teacher", "student"):
        for name in names(section):
            if getattr(load(section, name), "MODEL_TYPE", None) == model_type:
                return section, name
    return None


def schema(section: str, name: str, where: str) -> type[Model]:
    """Return an architecture's schema class."""
    try:
        config: type[Model] = load(section, name).Config
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return config


def presets() -> dict[str, dict[str, Any]]:
    """List every name that ``--student`` takes, with the recipe keys that it stands for."""
    result: dict[str, dict[str, Any]] = {}
    for name in names("student"):
        result[name] = {"architecture": name}
        for short, keys in getattr(load("student", name), "PRESETS", {}).items():
            result[short] = {"architecture": name, **keys}
    return result


def preset(name: str) -> dict[str, Any]:
    """Return the recipe keys that a student's name stands for.

    Raises:
        UsageError: no student has that name.
    """
    known = presets()
    if name not in known:
        raise UsageError(f"--student: no student called {name!r}{nearest(name, known)}")
    return known[name]
