"""The JSON schema of recipes, for editors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import PydanticUserError

from rotdistill_core.errors import PluginError
from rotdistill_core.plugin.origin import Origin
from rotdistill_core.plugin.registry import (
    ENGINES,
    STEPS,
    engine_class,
    installed_plugins,
    step_class,
)
from rotdistill_core.plugin.step import validator_of
from rotdistill_core.recipe.document import Recipe

STEP_KEYS: dict[str, Any] = {
    "id": {"type": "string", "description": "Unique name of the step; defaults to `use`."},
    "inherit": {
        "type": "boolean",
        "description": "Under `extends`, `false` takes over no option of the parent's step.",
    },
}
"""Keys of every step besides its options."""
EXTENDING_STEP: dict[str, Any] = {
    "type": "object",
    "description": "Options to change in the step of this id, of the recipe that is extended.",
    "properties": STEP_KEYS,
    "required": ["id"],
    "not": {"required": ["use"]},
}
"""A step without a method. Which options it may have depends on the other recipe."""


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes for the plugins installed here.

    It is written for editors: each `const` becomes an `enum` of one value, and `use` is required.
    Validators of older drafts ignore `const` and would accept any step.
    """
    document = Recipe.model_json_schema(ref_template="#/$defs/{model}")
    defs: dict[str, Any] = document.setdefault("$defs", {})
    references = []
    for name, one in _schemas(STEPS, step_class, defs):
        one["properties"] |= STEP_KEYS
        defs[f"step.{name}"] = one
        references.append({"$ref": f"#/$defs/step.{name}"})
    defs["extending step"] = EXTENDING_STEP
    engines = []
    for name, one in _schemas(ENGINES, engine_class, defs):
        defs[f"engine.{name}"] = one
        engines.append({"$ref": f"#/$defs/engine.{name}"})
    document["properties"]["engine"] = {
        "anyOf": engines,
        "description": "What answers for the teacher; by default the teacher itself, here.",
    }
    references.append({"$ref": "#/$defs/extending step"})
    document["properties"]["step"] = {"type": "array", "items": {"anyOf": references}}
    document["properties"]["extends"] = {
        "type": "string",
        "description": "Path of a recipe whose tables and steps are taken over. Tables merge by "
        "key, steps of one id by option; `[variants]` is replaced whole.",
    }
    document.pop("required", None)
    return _enums(document)  # type: ignore[no-any-return]


def _schemas(
    group: str, class_of: Callable[[str], tuple[type, Origin]], defs: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schema of the options of each plugin of a group; what they share goes to `defs`."""
    for name in installed_plugins(group):
        try:
            one = validator_of(class_of(name)[0]).json_schema(ref_template="#/$defs/{model}")
        except (PluginError, PydanticUserError):
            continue  # a broken plugin does not take the others' schema away
        defs.update(one.pop("$defs", {}))
        one["required"] = sorted({*one.get("required", []), "use"})
        yield name, one


def _enums(node: Any) -> Any:
    """Return a schema with every `const` as an `enum`, and without pydantic's `discriminator`."""
    if isinstance(node, list):
        return [_enums(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    converted: dict[str, Any] = {}
    for key, value in node.items():
        if key == "const":
            converted["enum"] = [value]
        elif key != "discriminator":
            converted[key] = _enums(value)
    return converted
