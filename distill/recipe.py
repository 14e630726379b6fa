"""How a recipe is read: found, extended, changed by ``--set``, and checked. Knows no data, no model and no torch.

A recipe is YAML: it holds what differs from the defaults in schema.py, may extend another recipe, and is
changed on the command line with ``--set teacher.train.learning_rate=3e-5``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from distill import catalog, yaml_strict
from distill.errors import RecipeError, nearest
from distill.files import expanded
from distill.schema import Model, Recipe, Student


def find(name: str) -> Path:
    """Find a recipe's file by its path or, for those that ship, its name."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = expanded(name)
        if not path.is_file():
            beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise RecipeError(f"no recipe file {name}{nearest(path.name, beside)}")
        return path
    shipped = catalog.recipes()
    if name not in shipped:
        raise RecipeError(f"no recipe called {name!r}{nearest(name, shipped)}")
    return shipped[name]


def _read(path: Path) -> dict[str, Any]:
    value = yaml_strict.read(path)
    if not isinstance(value, dict):
        raise RecipeError(f"{path.name}: a recipe is a mapping of keys to values")
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay ``over`` on ``base``: mappings are merged, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _extended(name: str, seen: Sequence[Path] = ()) -> dict[str, Any]:
    path = find(name).resolve()
    if path in seen:
        raise RecipeError(f"{path.name}: extends itself by way of {' -> '.join(p.name for p in seen)}")
    raw = _read(path)
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise RecipeError(f"{path.name}: extends: must be one recipe's name or path")
    beside = path.parent / parent
    above = str(beside) if parent.endswith((".yaml", ".yml")) and beside.is_file() else parent
    try:
        find(above)
    except RecipeError as error:
        raise RecipeError(f"{path.name}: extends: {error}") from None
    return _merge(_extended(above, [*seen, path]), raw)


def _override(raw: dict[str, Any], setting: str) -> None:
    """Apply one ``a.b=c`` of ``--set``, or ``a.0.b=c`` in a list; the value is a YAML scalar or list."""
    keys, equals, value = setting.partition("=")
    if not equals or not keys.strip():
        raise RecipeError(f"--set {setting}: must be key=value, as in teacher.train.learning_rate=3e-5")
    *path, last = keys.strip().split(".")
    if not all((*path, last)):
        raise RecipeError(f"--set {setting}: empty key; must be as teacher.train.learning_rate=3e-5 is")
    at: dict[str, Any] | list[Any] = raw
    before = ""
    for key in path:
        _refuse_new_list(at, key, before, setting)
        inner = at.setdefault(key, {}) if isinstance(at, dict) else at[_item(at, key, before, setting)]
        if not isinstance(inner, dict | list):
            raise RecipeError(f"--set {setting}: {key} is not a section")
        at, before = inner, key
    _refuse_new_list(at, last, before, setting)
    parsed = yaml_strict.parse(value, f"--set {keys}")
    if isinstance(at, list):
        at[_item(at, last, before, setting)] = parsed
    else:
        at[last] = parsed


def _refuse_new_list(at: Any, key: str, name: str, setting: str) -> None:
    """Refuse to set an item of what is not in the recipe: the default's items would be lost."""
    if at == {} and key.isdecimal():
        raise RecipeError(
            f"--set {setting}: {name} is not written in the recipe, so it has no item {key}; set it as a whole: {name}=[…]"
        )


def _item(items: list[Any], key: str, name: str, setting: str) -> int:
    """Read a part of a key that stands for an item of a list."""
    if not (key.isdecimal() and int(key) < len(items)):
        has = f"items 0 to {len(items) - 1}" if items else "no items"
        raise RecipeError(
            f"--set {setting}: {name} is a list of {has}: {name}.0 sets one of them, {name}=[…] the whole"
        )
    return int(key)


def _is_at(model: Any, location: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Find the schema class in which the last key of ``location`` stands."""
    for part in location[:-1]:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        if field is None:
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        kinds = [getattr(kind, "__origin__", kind) for kind in kinds]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if inner:
            model = inner[0]
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


_SCALARS = ("str", "int", "float", "bool")
"""What pydantic adds to an error's location for each type that a value may have."""


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> RecipeError:
    """Turn pydantic's report into one line with the nearest right name."""
    first, *others = error.errors()
    if first["loc"] and first["loc"][-1] in _SCALARS:
        # One wrong value, and an error for each type that it could have: the one that went deepest says most.
        at_same = [e for e in others if e["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
        others = [e for e in others if e not in at_same]
        first = max([first, *at_same], key=lambda e: len(e["loc"]))
    *path, last = first["loc"] or ("",)
    # pydantic puts the names of types between the keys; an unknown key may look like one.
    location = tuple(part for part in path if not (isinstance(part, str) and "[" in part))
    if first["type"] == "extra_forbidden" or not (isinstance(last, str) and "[" in last):
        location = (*location, last)
    if len(location) > 1 and location[-1] in _SCALARS:
        location = location[:-1]
    key = ".".join(str(part) for part in location)
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        at = _is_at(model, location)
        known = {f.alias or n for n, f in at.model_fields.items()} if at else set()
        return RecipeError(f"{where}: unknown key {key}{nearest(location[-1], known)}{more}")
    if first["type"] == "missing":
        return RecipeError(f"{where}: {key} is missing{more}")
    given = first.get("input")
    shown = ""
    if given is None or isinstance(given, str | int | float):
        shown = f", not {'null' if given is None else f'{given!r:.60}'}"
    message = (
        first["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "must be")
        .replace("List should", "must")
    )
    kind = first["type"]
    if kind in ("model_type", "dict_type"):
        message = "must be a section of keys and values"
    elif kind in ("float_type", "int_type") and isinstance(given, str):
        message += " (without quotes)"
    elif kind == "list_type":
        message = "must be a list, as in [a, b]"
    return RecipeError(f"{where}: {key + ': ' if key else ''}{message}{shown}{more}")


def _architecture(raw: dict[str, Any], section: str, where: str) -> type[Model]:
    """Load the schema of the architecture that a section names."""
    part = raw.get(section, {})
    if not isinstance(part, dict):
        raise RecipeError(f"{where}: {section}: must be a section of keys and values, not {part!r:.60}")
    name = part.get("architecture")
    known = ", ".join(catalog.names(section))
    if name is None:
        raise RecipeError(f"{where}: {section}.architecture is missing (there are: {known})")
    if not isinstance(name, str):
        raise RecipeError(f"{where}: {section}.architecture: must be one of {known}, not {name!r:.60}")
    return catalog.schema(section, name, where)


def build(raw: dict[str, Any], where: str) -> Recipe:
    """Check a recipe's values against the schema of the architectures that it names.

    Raises:
        RecipeError: with the key, what was expected there, and the nearest right name.
    """
    teacher = _architecture(raw, "teacher", where)
    student = _architecture(raw, "student", where)
    schema = create_model(
        "Recipe",
        __base__=Recipe,
        teacher=(teacher, ...),
        student=(student, ...),
    )
    try:
        recipe = schema.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, schema, where) from None
    if recipe.task.metric is not None:
        from distill.tasks import check_metric

        try:
            check_metric(recipe.task.kind, recipe.task.metric)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
    return recipe


def load(name: str, settings: Sequence[str] = (), student: str | None = None) -> Recipe:
    """Read a recipe.

    Args:
        name: a shipped recipe's name or a file's path.
        settings: ``a.b=c`` each, laid over the recipe in order.
        student: a name from ``students/`` (or one of its presets) to take the place of the recipe's own;
            what the recipe says of losses, view and training stays, what is the old architecture's goes.

    Raises:
        RecipeError: the recipe or a setting is wrong.
    """
    raw = _extended(name)
    where = Path(name).name
    if student is not None:
        kept = raw.get("student")
        kept = kept if isinstance(kept, dict) else {}
        shared = {key: value for key, value in kept.items() if key in Student.model_fields}
        preset = catalog.preset(student)
        if shared.get("architecture") != preset["architecture"]:
            shared = {k: v for k, v in shared.items() if k not in ("checkpoint", "tokenizer", "config")}
            kept = shared
        raw["student"] = _merge(kept, preset)
    for setting in settings:
        _override(raw, setting)
    return build(raw, where)


def descriptions() -> dict[str, str]:
    """List the recipes that ship, with the line that describes each."""
    return {name: str(_extended(name).get("description", "")) for name in catalog.recipes()}
