"""Recipes: one TOML document, validated whole before anything is opened."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rotdistill_core.errors import PluginError, RecipeError, format_validation_errors, suggest
from rotdistill_core.plugin.registry import (
    OBSERVERS,
    STEPS,
    installed_plugins,
    load_plugin,
    step_class,
)
from rotdistill_core.plugin.step import validator_of
from rotdistill_core.recipe.document import Document, Recipe
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe

MAX_BYTES = 1_000_000
NO_STEPS = "step: at least one [[step]] table is needed."


def load_recipe(path: Path, sets: Sequence[str] = ()) -> ResolvedRecipe:
    """Read and validate a recipe.

    Args:
        path: the TOML file.
        sets: overrides `key.path=value`; the first part may be a step id, the value is TOML or a bare string.

    Raises:
        RecipeError: everything that is wrong with it, in one report.
    """
    text = _read(path)
    return resolve_recipe(path, text, _extend(path, _parse(path, text)), sets)


def resolve_recipe(
    path: Path, text: str, tables: dict[str, Any], sets: Sequence[str] = ()
) -> ResolvedRecipe:
    """Return the recipe in `tables`, which become its own; see `load`."""
    steps = _step_tables(tables) or []
    problems = [] if steps else [NO_STEPS]
    problems += [p for item in sets for p in _override(tables, steps, item)]
    tables.pop("step", None)
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        recipe = None
        problems += format_validation_errors(error, tables, _known_keys())
    recipe_step, step_problems = _parse_steps(steps)
    problems += step_problems
    for name in watching if isinstance(watching := tables.get("observers"), list) else ():
        try:
            load_plugin(OBSERVERS, str(name))
        except PluginError as error:
            problems.append(f"observers: {error}")
    variants = tables.get("variants", {})
    ids = [_step_id(raw) for raw in steps]
    for variant, names in variants.items() if isinstance(variants, dict) else ():
        for name in names if isinstance(names, list) else ():
            if name not in ids:
                problems.append(
                    f'variants.{variant}: no step has the id "{name}".{suggest(str(name), map(str, ids))}'
                )
    if problems or recipe is None:
        raise RecipeError(*(f"{path}: {p}" for p in problems))
    return ResolvedRecipe(path, text, recipe, tuple(recipe_step))


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(
                f"{path}: larger than {MAX_BYTES} bytes; a recipe is a short document."
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        others = sorted(
            str(p)
            for folder in {path.parent, Path("recipes")}
            for p in folder.glob("*.toml")
            if p.name != "pyproject.toml"
        )
        raise RecipeError(
            f"{path}: cannot be read: {error.strerror}.{suggest(str(path), others)}"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(text)
        json.dumps(
            tables, default=str
        )  # nested too deeply to be walked: better refused here than anywhere after
        return tables
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: is not valid TOML: {error}.") from error


def _step_tables(tables: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the [[step]] tables of a document, or None when its `step` is something else."""
    steps = tables.get("step", [])
    return (
        steps if isinstance(steps, list) and all(isinstance(raw, dict) for raw in steps) else None
    )


def _step_id(raw: Mapping[str, Any]) -> Any:
    return raw.get("id", raw.get("use"))


def _extend(path: Path, tables: dict[str, Any]) -> dict[str, Any]:
    """Apply `extends`: one level, tables merged by key, steps replaced by id (or added when the id is new)."""
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    if not isinstance(parent, str) or "\0" in parent:
        raise RecipeError(f"{path}: extends: must be the path of one recipe.")
    base_path = path.parent / parent
    base = _parse(base_path, _read(base_path))
    if "extends" in base:
        raise RecipeError(
            f"{path}: extends: {parent} itself extends another recipe; one level only."
        )
    merged = {**base, **tables}
    for key in base.keys() & tables.keys() - {"variants"}:
        if isinstance(base[key], dict) and isinstance(tables[key], dict):
            merged[key] = {**base[key], **tables[key]}
    by_id = {**_by_id(base_path, base), **_by_id(path, tables)}
    return {**merged, "step": [raw for same_id in by_id.values() for raw in same_id]}


def _by_id(path: Path, tables: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the steps of a document by id. Two of one id stay two, so that they are reported."""
    steps = _step_tables(tables)
    if steps is None:
        raise RecipeError(f"{path}: {NO_STEPS}")
    found: dict[str, list[dict[str, Any]]] = {}
    for raw in steps:
        found.setdefault(str(_step_id(raw)), []).append(raw)
    return found


def _override(tables: dict[str, Any], steps: Sequence[dict[str, Any]], item: str) -> list[str]:
    """Apply one `--set` to the tables, or to the step that it names; return what is wrong with it."""
    key, equals, text = item.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        return [f"--set {item}: write it as key.path=value, for example chop.layers=24."]
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    target = next((raw for raw in steps if _step_id(raw) == parts[0]), None)
    if target is None and parts[0] not in Recipe.model_fields:
        known = [*(str(_step_id(raw)) for raw in steps), *Recipe.model_fields]
        return [f'--set {item}: no step or table is called "{parts[0]}".{suggest(parts[0], known)}']
    inner: Any = tables if target is None else target
    for part in parts[:-1] if target is None else parts[1:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            return [f"--set {item}: {part} is a value and has no keys."]
    inner[parts[-1]] = value
    return []


def _parse_steps(steps: Sequence[Mapping[str, Any]]) -> tuple[list[RecipeStep], list[str]]:
    """Validate the options of all steps; return the valid steps and what is wrong with the others."""
    recipe_step: list[RecipeStep] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, raw in enumerate(steps, 1):
        options = dict(raw)
        use, name = options.get("use"), options.pop("id", options.get("use"))
        where = f'step "{name}" (#{number})'
        if not isinstance(use, str):
            problems.append(
                f"step #{number}: use: missing; name one of {', '.join(installed_plugins(STEPS))}."
            )
            continue
        if not isinstance(name, str) or name in seen:
            problems.append(f"{where}: id: must be a unique string.")
        seen.add(str(name))
        try:
            cls, origin = step_class(use)
            # As JSON, because strictly validated Python values may not be lists where a tuple is declared.
            step: Any = validator_of(cls).validate_json(
                json.dumps(options, default=str), strict=True
            )
            recipe_step.append(RecipeStep(str(name), step, origin))
        except PluginError as error:
            problems.append(f"{where}: {error}")
        except ValidationError as error:
            names = [field.name for field in dataclasses.fields(cls) if field.name != "use"]
            problems += [
                f"{where}: {p}" for p in format_validation_errors(error, options, {(): names})
            ]
    return recipe_step, problems


def _known_keys() -> dict[tuple[str, ...], list[str]]:
    """Return the keys that a recipe may have, by the path of their table."""
    known: dict[tuple[str, ...], list[str]] = {(): [*Recipe.model_fields, "step", "extends"]}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Document):
            known[name,] = list(field.annotation.model_fields)
    return known
