"""What is installed: every folder, every recipe, the type marker; and files that keep the registry's promises."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill import catalog
from distill.schema import Student, Teacher

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FILES = [(section, name) for section in ("teacher", "student") for name in catalog.names(section)]


def module(section: str, name: str) -> Any:
    return importlib.import_module(f"distill.{section}s.{name}")


def test_the_packages_are_the_folders() -> None:
    """setuptools installs what is listed, and is silent of a folder that is not."""
    inits = [
        path.parent
        for top in ROOT.iterdir()
        if (top / "__init__.py").is_file()
        for path in top.rglob("__init__.py")
    ]
    mapped = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}
    expected = {
        mapped.get(str(path.relative_to(ROOT)), ".".join(path.relative_to(ROOT).parts)) for path in inits
    }
    assert set(SETUPTOOLS["packages"]) == expected
    assert len(SETUPTOOLS["packages"]) == len(expected)
    for package, folder in SETUPTOOLS["package-dir"].items():
        assert Path(importlib.import_module(package).__file__ or "").parent == ROOT / folder, package


def test_every_file_that_is_not_python_is_installed() -> None:
    for package in SETUPTOOLS["packages"]:
        folder = ROOT / SETUPTOOLS["package-dir"][package]
        installed = {
            path for pattern in SETUPTOOLS["package-data"].get(package, []) for path in folder.glob(pattern)
        }
        others = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert installed == others, package
    assert (ROOT / "distill" / "py.typed").is_file()


def test_every_recipe_in_the_folder_is_found() -> None:
    found = {path.stem for path in (ROOT / "recipes").rglob("*.y*ml")}
    assert set(catalog.recipes()) == found
    assert "quickstart" in found


def test_every_file_in_the_folder_is_found() -> None:
    for section in ("teacher", "student"):
        found = {p.stem for p in (ROOT / f"{section}s").glob("*.py") if not p.stem.startswith("_")}
        assert set(catalog.names(section)) == found


@pytest.mark.parametrize(("section", "name"), FILES)
def test_an_architecture_has_what_the_engine_asks_of_it(section: str, name: str) -> None:
    found = module(section, name)
    assert issubclass(found.Config, Teacher if section == "teacher" else Student)
    assert found.Config.model_fields["architecture"].annotation.__args__ == (name,)
    if hasattr(found, "fit"):
        assert callable(found.load_predictor)
    else:
        assert callable(found.build)
    if hasattr(found, "MODEL_TYPE"):
        assert callable(found.positions), "a checkpoint from elsewhere needs its length"
    assert (found.__doc__ or "").strip()


@pytest.mark.parametrize(("section", "name"), FILES)
def test_an_architectures_defaults_are_a_valid_section(section: str, name: str) -> None:
    found = module(section, name)
    for keys in ({}, *getattr(found, "PRESETS", {}).values()):
        assert found.Config(architecture=name, **keys).architecture == name


def test_no_two_students_share_a_name() -> None:
    every = [*catalog.names("student")]
    for name in catalog.names("student"):
        every += getattr(module("student", name), "PRESETS", {})
    assert len(every) == len(set(every)) == len(catalog.presets())


def test_importing_an_architecture_does_not_import_torch() -> None:
    """A recipe is checked with the architectures' schemas, and must be checked in milliseconds."""
    script = """
import importlib, json, sys
found = {}
for name in json.load(sys.stdin):
    importlib.import_module(name)
    found[name] = [heavy for heavy in ("torch", "transformers", "sklearn", "datasets") if heavy in sys.modules]
print(json.dumps(found))
"""
    names = [f"distill.{section}s.{name}" for section, name in FILES]
    names += [f"distill.{name}" for name in ("cli", "recipe", "catalog", "yaml_strict", "runs", "hub", "data", "labels", "sources")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert json.loads(done.stdout) == {name: [] for name in names}


def test_the_version_is_said_once() -> None:
    from importlib.metadata import entry_points, version

    assert version("distill") == PROJECT["project"]["version"]
    scripts = [point.value for point in entry_points(group="console_scripts") if point.name == "distill"]
    assert scripts == [PROJECT["project"]["scripts"]["distill"]]
