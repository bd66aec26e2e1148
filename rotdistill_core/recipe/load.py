"""Read a recipe and validate all of it, before any model is opened.

Everything that is wrong is reported at once, each problem with its key path and the nearest name.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rotdistill_core.data.text_files import NotUtf8Error, decode_utf8
from rotdistill_core.errors import (
    FEW,
    LONGEST_NAME,
    PluginError,
    RecipeError,
    first_few,
    format_validation_errors,
    suggest,
)
from rotdistill_core.plugin.origin import Origin
from rotdistill_core.plugin.registry import (
    ENGINES,
    OBSERVERS,
    STEPS,
    engine_class,
    installed_plugins,
    load_plugin,
    step_class,
)
from rotdistill_core.plugin.step import keeps_all_rows, needs_all_rows, validator_of
from rotdistill_core.recipe.document import NAME_PATTERN, Document, Recipe
from rotdistill_core.recipe.extends import (
    ENGINE,
    Inherited,
    extended,
    extended_steps,
    inherited,
    named_steps,
    step_id,
)
from rotdistill_core.recipe.lines import Places, Source
from rotdistill_core.recipe.resolved import RecipeEngine, RecipeStep, ResolvedRecipe
from rotdistill_core.store.plain import read_bytes

MAX_BYTES = 1_000_000
"""Largest recipe; more is no recipe but a mistake."""
MAX_COUNT = 1000
"""Largest number of steps, and of variants; the time of a plan grows with both."""
MAX_PARTS = 64
"""Largest number of parts of a dotted key. The parser's time grows with their square."""
TOO_MANY_PARTS = re.compile(rf"""(?<!["'\w-])(?:["'\w-]++\.){{{MAX_PARTS}}}""")
INT64 = range(-(2**63), 2**63)
"""The integers of TOML."""
NO_STEPS = "step: at least one [[step]] table is needed."
MIXED = (
    " The step also has the options of the extended recipe; write `inherit = false` in it to take "
    "over none."
)
"""Added to what is wrong with a step that has options of two recipes."""

DEFAULT_ENGINE = "transformers"
SECRET_KEYS = {"key", "api_key", "apikey", "authorization", "bearer", "password", "secret", "token"}
SECRET_VALUE = re.compile(r"(sk|pk|rk|hf|gsk|xai|ghp|nvapi)[-_]\S{8,}|Bearer\s", re.IGNORECASE)
"""How keys of servers begin."""
SECRET_IN_URL = re.compile(r"//[^/\s]*@|[?&][\w-]*(key|token|secret|password)=", re.IGNORECASE)
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
NO_SECRETS = (
    "a secret has no place in a recipe, which every run keeps. Put it into an environment variable "
    'and name that one: key_env = "NAME".'
)

Overrides = Sequence[str] | Mapping[str, object]
"""`["chop.layers=24"]` as on the command line, or `{"chop.layers": 24}`."""
At = Callable[[Sequence[str]], str]
"""Path of a key -> the beginning of a message about it, such as `line 12: `."""
NOTHING_INHERITED = Inherited()
"""For a recipe that extends none."""


def load_recipe(path: str | Path, sets: Overrides = ()) -> ResolvedRecipe:
    """Read and validate a recipe.

    Args:
        path: the TOML file.
        sets: overrides of options. A key is `step-id.field` or `table.key`; on the command line
            the value is TOML or a bare string.

    Raises:
        RecipeError: everything that is wrong with it, in one report.
    """
    path = Path(path)
    return _loaded(path, _read(path), sets)


def with_overrides(recipe: ResolvedRecipe, sets: Overrides) -> ResolvedRecipe:
    """Return a recipe as it would have been read with more overrides.

    Args:
        recipe: the recipe, from the text that it was read from.
        sets: the overrides that come after its own.

    Raises:
        RecipeError: see `load_recipe`; or its own overrides are not known.
    """
    if recipe.given is None:
        raise RecipeError(
            f"{recipe.path}: the overrides that it was read with are not known, so it takes no "
            "more. Load it from its file, with all of them."
        )
    new = _as_values(sets)
    # In the order in which they are given: the last one of a key, or of a table, counts.
    own = {key: value for key, value in recipe.given.items() if key not in new}
    return _loaded(recipe.path, recipe.text, {**own, **new})


def _loaded(path: Path, text: str, sets: Overrides) -> ResolvedRecipe:
    """Return the recipe in a text; see `load_recipe`."""
    tables = _parse(path, text)
    parent = _parent(path, tables)
    if parent is None:
        return resolve_recipe(path, text, tables, sets)
    own_steps = _required_steps(path, tables)
    parent_tables = _parse(parent.path, parent.text)
    parent_steps = _step_tables(parent_tables) or []
    merged = {**extended(tables, parent_tables), "step": extended_steps(own_steps, parent_steps)}
    taken_over = inherited(own_steps, parent_tables, parent_steps)
    return resolve_recipe(path, text, merged, sets, taken_over, parent)


def resolve_recipe(
    path: Path,
    text: str,
    tables: dict[str, Any],
    sets: Overrides = (),
    taken_over: Inherited = NOTHING_INHERITED,
    parent: Source | None = None,
) -> ResolvedRecipe:
    """Return the recipe in `tables`, a parsed TOML document that is changed in place.

    Args:
        path: where the recipe is; for messages, and for paths relative to it.
        text: the recipe as it was written.
        tables: its tables, after `extends`.
        sets: see `load_recipe`.
        taken_over: what is known of the recipe that it extends.
        parent: the file of that recipe; for the lines in messages.

    Raises:
        RecipeError: see `load_recipe`.
    """
    places = Places(Source(path, text), parent)
    step_tables = _step_tables(tables) or []
    _require_sizes(path, tables, step_tables)
    # New variants, here or in an override, do not turn a toggle into a step that always runs.
    toggles = taken_over.toggles | named_steps(tables)
    problems = _apply_overrides(tables, step_tables, sets)
    if numbers := first_few(_number_problems({**tables, "step": step_tables})):
        raise RecipeError(*(f"{path}: {problem}" for problem in numbers))
    ids = [step_id(table) for table in step_tables]
    no_longer_named = toggles - named_steps(tables)
    left_out = tuple(name for name in ids if isinstance(name, str) and name in no_longer_named)
    if len(left_out) == len(ids):
        problems.insert(0, NO_STEPS)
    tables.pop("step", None)
    at = partial(places.of_key, dict(tables))
    engine, engine_problems = _parse_engine(path.parent, tables.pop(ENGINE, {}), at)
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        recipe = None
        problems += format_validation_errors(error, tables, _known_keys(), at)
    steps, step_problems = _parse_steps(step_tables, taken_over.mixed_steps, places)
    problems += [*step_problems, *engine_problems]
    problems += first_few(_observer_problems(tables, at))
    problems += first_few(_variant_problems(tables, ids, at))
    if recipe is not None:
        problems += _marked_problems(recipe, at)
    if problems or recipe is None or engine is None:
        raise RecipeError(*(f"{path}: {problem}" for problem in problems))
    kept = tuple(step for step in steps if step.id not in left_out)
    resolved = ResolvedRecipe(
        path, text, recipe, kept, engine, left_out, _as_words(sets), _as_values(sets)
    )
    if missing := first_few(_missing_rows(resolved)):
        raise RecipeError(*(f"{path}: {problem}" for problem in missing))
    return resolved


def _read(path: Path, suggested: bool = True) -> str:
    """Return the text of a recipe.

    Args:
        path: its file.
        suggested: whether a missing one makes recipes with a similar name known.

    Raises:
        RecipeError: it cannot be read, or is no UTF-8.
    """
    try:
        content = read_bytes(path, MAX_BYTES)
        return decode_utf8(content).replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = suggest(str(path), _recipes_near(path)) if missing and suggested else ""
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.{hint}") from error
    except NotUtf8Error as error:
        raise RecipeError(f"{path}: {error}.") from error


def _recipes_near(path: Path) -> list[str]:
    """Return the recipes in a path's folder and in recipes/, for suggestions."""
    folders = {path.parent, Path("recipes")}
    found = [file for folder in folders for file in folder.glob("*.toml")]
    return sorted(str(file) for file in found if file.name != "pyproject.toml")


def _parse(path: Path, text: str) -> dict[str, Any]:
    if TOO_MANY_PARTS.search(text):
        raise RecipeError(f"{path}: a key has more than {MAX_PARTS} parts; no key of a recipe has.")
    try:
        tables = tomllib.loads(text)
        # A document nested too deeply to be walked is refused here rather than anywhere later.
        json.dumps(tables, default=str)
    except (ValueError, RecursionError) as error:  # Python refuses integers of 4300 digits
        raise RecipeError(f"{path}: is not valid TOML: {str(error).split(';')[0]}.") from error
    return tables


def _require_sizes(
    path: Path, tables: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]
) -> None:
    """Check that a recipe is no list of thousands, before each entry is looked at.

    Raises:
        RecipeError: it has too many steps or variants.
    """
    variants = tables.get("variants")
    counts = {"step": len(steps), "variants": len(variants) if isinstance(variants, dict) else 0}
    problems = [
        f"{path}: {key}: there are {count}; {MAX_COUNT} are the most."
        for key, count in counts.items()
        if count > MAX_COUNT
    ]
    if problems:
        raise RecipeError(*problems)


def _number_problems(value: object, where: str = "") -> Iterator[str]:
    """Yield the integers that no integer of TOML is: nothing that computes can hold them."""
    if isinstance(value, int) and value not in INT64:
        yield f"{where}: must be an integer of 64 bits."
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _number_problems(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _number_problems(inner, where)


def _step_tables(tables: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the [[step]] tables of a document, or None when its `step` is anything else."""
    steps = tables.get("step", [])
    if isinstance(steps, list) and all(isinstance(table, dict) for table in steps):
        return steps
    return None


def _parent(path: Path, tables: dict[str, Any]) -> Source | None:
    """Remove `extends` from the tables, and return the recipe that it names.

    Raises:
        RecipeError: it is no path of a recipe, or that recipe extends another one: one level only.
    """
    parent = tables.pop("extends", None)
    if parent is None:
        return None
    if not isinstance(parent, str) or "\0" in parent:
        raise RecipeError(f"{path}: extends: must be the path of one recipe.")
    parent_path = path.parent / parent
    try:
        text = _read(parent_path, suggested=False)
    except RecipeError as error:
        raise RecipeError(f"{path}: extends: {error}") from error
    parent_tables = _parse(parent_path, text)
    if "extends" in parent_tables:
        raise RecipeError(
            f"{path}: extends: {parent} itself extends another recipe; one level only."
        )
    _required_steps(parent_path, parent_tables)
    return Source(parent_path, text)


def _required_steps(path: Path, tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the [[step]] tables of a document.

    Raises:
        RecipeError: its `step` is anything else.
    """
    steps = _step_tables(tables)
    if steps is None:
        raise RecipeError(f"{path}: {NO_STEPS}")
    return steps


def _apply_overrides(
    tables: dict[str, Any], steps: Sequence[dict[str, Any]], sets: Overrides
) -> list[str]:
    """Apply overrides to the tables, or to the steps that they name; return what is wrong with
    them."""
    problems = []
    if isinstance(sets, Mapping):
        for key, value in sets.items():
            problems += _override(tables, steps, key=key, value=value, where=f"set {key}")
        return problems
    for item in sets:
        key, equals, text = map(str.strip, item.partition("="))
        if not equals:
            problems.append(_write_as(f"--set {item}"))
            continue
        value = _toml_value(text)
        problems += _override(tables, steps, key=key, value=value, where=f"--set {item}")
    return problems


def _as_values(sets: Overrides) -> dict[str, object]:
    """Return valid overrides as keys with values."""
    if isinstance(sets, Mapping):
        return dict(sets)
    values: dict[str, object] = {}
    for each in sets:
        key, _, text = map(str.strip, each.partition("="))
        values.pop(key, None)
        values[key] = _toml_value(text)
    return values


def _as_words(sets: Overrides) -> tuple[str, ...]:
    """Return overrides as `--set` takes them."""
    if not isinstance(sets, Mapping):
        return tuple(sets)
    return tuple(f"{key}={_toml_text(value)}" for key, value in sets.items())


def _toml_text(value: object) -> str:
    """Return a value as TOML in one line."""
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(key)} = {_toml_text(inner)}" for key, inner in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_text, value))}]"
    return json.dumps(value, default=str)


def _write_as(where: str) -> str:
    return f"{where}: write it as key.path=value, for example chop.layers=24."


def _toml_value(text: str) -> object:
    """Return the TOML value that a text is, or the text itself."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):  # an integer of too many digits is a plain ValueError
        return text


def _override(
    tables: dict[str, Any],
    steps: Sequence[dict[str, Any]],
    *,
    key: str,
    value: object,
    where: str,
) -> list[str]:
    """Set one key in the tables, or in the step that it names; return what is wrong with it."""
    parts = key.split(".")
    if not all(parts) or len(parts) > MAX_PARTS:
        return [_write_as(f"{where:.{LONGEST_NAME}}")]
    first, *rest = parts
    step = next((table for table in steps if step_id(table) == first), None)
    if step is None and first not in (*Recipe.model_fields, ENGINE):
        known = [*(str(step_id(table)) for table in steps), *Recipe.model_fields, ENGINE]
        close = _steps_with_option(steps, parts) or suggest(first, known)
        return [f'{where}: no step or table is called "{first}".{close}']
    inner: Any = tables if step is None else step
    path = parts if step is None else rest
    if not path:
        return [_write_as(where)]
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            return [f"{where}: {part} is a value and has no keys."]
    inner[path[-1]] = value
    return []


def _steps_with_option(steps: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> str:
    """Return a hint with the options of steps that a key without a step's id may mean."""
    found = []
    for table in steps:
        try:
            cls, _ = step_class(str(table.get("use")))
        except PluginError:
            continue
        if parts[0] in (field.name for field in dataclasses.fields(cls)):
            found.append(f'"{".".join([str(step_id(table)), *parts])}"')
        if len(found) == FEW:
            break
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _parse_steps(
    tables: Sequence[Mapping[str, Any]], mixed_steps: frozenset[str], places: Places
) -> tuple[list[RecipeStep], list[str]]:
    """Validate all steps; return the valid ones, and the problems of the others.

    Args:
        tables: the [[step]] tables.
        mixed_steps: ids of the steps that have options of two recipes.
        places: where they are written.
    """
    steps: list[RecipeStep] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, table in enumerate(tables, 1):
        if len(problems) > FEW:
            break  # the recipe is wrong, and suggestions take time
        options = dict(table)
        use = options.get("use")
        name = options.pop("id", use)
        if not isinstance(use, str):
            problems.append(_missing_use(number, name))
            continue
        at = partial(_at_option, places, number, name, table)
        problems += [f"{at(['id'])}{problem}" for problem in _id_problems(name, seen)]
        seen.add(str(name))
        try:
            steps.append(RecipeStep(str(name), *_plugin_with_options(step_class, use, options, at)))
        except RecipeError as error:
            hint = MIXED if str(name) in mixed_steps else ""
            problems += [f"{problem}{hint}" for problem in error.problems]
    return steps, first_few(problems)


def _at_option(
    places: Places, number: int, name: object, table: Mapping[str, Any], keys: Sequence[str]
) -> str:
    """Return the beginning of a message about an option of the step with a number, from 1."""
    line = places.of_option(number - 1, table, keys)
    return f'{line}step "{name!s:.{LONGEST_NAME}}" (#{number}): '


def _missing_use(number: int, name: object) -> str:
    """Return what is wrong with a step without a method."""
    offered = ", ".join(installed_plugins(STEPS))
    if name is None:
        return f"step #{number}: use: missing; name one of {offered}."
    return (
        f'step "{name}" (#{number}): use: missing; name one of {offered}. Only a step of a recipe '
        "that is extended is changed without it, and no such step has this id."
    )


def _id_problems(name: object, taken: set[str]) -> Iterator[str]:
    """Yield what is wrong with a step's id: it becomes a part of paths, so it may not be one."""
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        yield (
            "id: must be a name: a letter or digit, then letters, digits, dots, dashes or "
            "underscores, 80 characters at most."
        )
    elif name in taken:
        yield "id: must be unique; an earlier step has it."


def _plugin_with_options(
    class_of: Callable[[str], tuple[type, Origin]],
    use: str,
    options: Mapping[str, Any],
    at: At,
) -> tuple[Any, Origin]:
    """Return what a plugin offers, with its options validated, and its origin.

    Args:
        class_of: name of a plugin -> its class and origin.
        use: the name.
        options: what the recipe has for it.
        at: path of an option -> the beginning of a message about it.

    Raises:
        RecipeError: no plugin offers it, or options are wrong.
    """
    try:
        cls, origin = class_of(use)
    except PluginError as error:
        raise RecipeError(f"{at(['use'])}{error}") from error
    try:
        # As JSON: strictly validated Python values may not be lists where a tuple is declared.
        document = json.dumps(options, default=str)
        made: Any = validator_of(cls).validate_json(document, strict=True)
    except ValidationError as error:
        fields = [field.name for field in dataclasses.fields(cls) if field.name != "use"]
        raise RecipeError(*format_validation_errors(error, options, {(): fields}, at)) from error
    return made, origin


def engine_of_run(table: Mapping[str, Any], folder: Path) -> RecipeEngine:
    """Return the engine that a run was made with.

    Args:
        table: the table [engine] of its resolved recipe; an empty one for the default.
        folder: the folder of the recipe, for paths in options.

    Raises:
        RecipeError: no plugin offers it now, an option is wrong, or it cannot work.
    """
    # The resolved recipe has options without a value, too.
    given = {key: value for key, value in table.items() if value is not None}
    engine, problems = _parse_engine(folder, given)
    if engine is None:
        raise RecipeError(*problems)
    engine.check()
    return engine


def _parse_engine(
    folder: Path, table: object, at: At = lambda _: ""
) -> tuple[RecipeEngine | None, list[str]]:
    """Return the engine of a recipe, or what is wrong with its table.

    Args:
        folder: that of the recipe.
        table: what the recipe has under `engine`; empty for the default.
        at: path of a key of the recipe -> the beginning of a message about it.
    """
    if not isinstance(table, dict):
        return None, ['engine: must be a table, such as [engine] with use = "transformers".']
    if secrets := first_few(_secret_problems(table, "engine")):
        return None, secrets
    options = {"use": DEFAULT_ENGINE, **table}
    use = options["use"]
    if not isinstance(use, str):
        return None, [f"engine.use: must be one of {', '.join(installed_plugins(ENGINES))}."]
    try:
        made = _plugin_with_options(
            engine_class, use, options, lambda keys: f"{at([ENGINE, *keys])}engine: "
        )
    except RecipeError as error:
        return None, list(error.problems)
    return RecipeEngine(*made, folder), []


def _secret_problems(value: object, where: str) -> Iterator[str]:
    """Yield the places of secrets below a table, without the secrets."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if str(key).lower().replace("-", "_") in SECRET_KEYS:
                yield f"{where}.{key}: {NO_SECRETS}"
            elif str(key).endswith("_env") and not _is_variable(inner):
                yield (
                    f"{where}.{key}: must be the name of an environment variable, in capitals, "
                    "such as SERVER_KEY. Its value, a secret, has no place in a recipe."
                )
            else:
                yield from _secret_problems(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _secret_problems(inner, where)
    elif isinstance(value, str) and (SECRET_VALUE.match(value) or SECRET_IN_URL.search(value)):
        yield f"{where}: {NO_SECRETS}"


def _is_variable(value: object) -> bool:
    return isinstance(value, str) and bool(VARIABLE.fullmatch(value))


def _variant_problems(tables: Mapping[str, Any], ids: Sequence[Any], at: At) -> Iterator[str]:
    """Yield the ids that variants name and no step has."""
    variants = tables.get("variants", {})
    for variant, names in variants.items() if isinstance(variants, dict) else ():
        for name in names if isinstance(names, list) else ():
            if name not in ids:
                close = suggest(str(name), map(str, ids))
                line = at(["variants", variant])
                yield f'{line}variants.{variant}: no step has the id "{name}".{close}'


def _observer_problems(tables: Mapping[str, Any], at: At) -> Iterator[str]:
    """Yield observers that cannot be loaded, default ones included."""
    observers = tables.get("observers", Recipe.model_fields["observers"].default)
    for name in observers if isinstance(observers, list) else ():
        try:
            load_plugin(OBSERVERS, str(name))
        except PluginError as error:
            yield f"{at(['observers'])}observers: {error}"


def _marked_problems(recipe: Recipe, at: At) -> Iterator[str]:
    """Yield marked variants that do not exist."""
    for key in ("baseline", "headline"):
        marked = getattr(recipe, key)
        if marked is not None and marked not in recipe.variants:
            close = suggest(marked, recipe.variants)
            yield f'{at([key])}{key}: there is no variant "{marked}".{close}'


def _missing_rows(recipe: ResolvedRecipe) -> Iterator[str]:
    """Yield steps that read captured rows of all texts after a capture that does not keep them."""
    found: dict[str, str] = {}
    for chain in recipe.chains(narrow=False).values():
        capture: RecipeStep | None = None
        for each in chain:
            if each.stage == "capture":
                capture = each
            elif capture and needs_all_rows(each.step) and not keeps_all_rows(capture.step):
                found[each.id] = capture.id
    for reader, capture_id in found.items():
        yield (
            f'step "{reader}": reads the captured rows of all texts, and step "{capture_id}" keeps '
            f'those of a part. Set store = "rows" in step "{capture_id}", and leave out its '
            "student_texts."
        )


def _known_keys() -> dict[tuple[str, ...], list[str]]:
    """Return the keys that a recipe may have, by the path of their table."""
    known: dict[tuple[str, ...], list[str]] = {
        (): [*Recipe.model_fields, ENGINE, "step", "extends"]
    }
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Document):
            known[name,] = [
                inner.alias or key for key, inner in field.annotation.model_fields.items()
            ]
    return known
