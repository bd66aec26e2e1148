"""A resolved recipe as TOML that runs again."""

from __future__ import annotations

from typing import Any

import tomli_w

from rotdistill_core.characters import escaped_in_strings
from rotdistill_core.recipe.document import Recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe


def resolved_toml(loaded: ResolvedRecipe) -> str:
    """Return a recipe after `extends`, `--set` and defaults, as a TOML document.

    Loaded from the same folder, because paths of texts are relative to the recipe, it is the same
    recipe with the same digest. Options without a value are left out: TOML has no null, and their
    default is that they have none.
    """
    document = {**loaded.document(), "observers": loaded.recipe.observers}
    tables = {name: document[name] for name in Recipe.model_fields if name != "variants"}
    ordered = {**tables, "step": document["step"], "variants": document["variants"]}
    return escaped_in_strings(tomli_w.dumps(_without_none(ordered)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
