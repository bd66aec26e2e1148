"""A step that takes captured states needs a capture step before it."""

from __future__ import annotations

import pytest

from rotdistill_core.errors import RecipeError
from rotdistill_core.planning.requirements import (
    hook_arguments,
    require_captured_states,
    required_results,
)
from rotdistill_core.plugin.registry import step_class
from rotdistill_core.recipe.resolved import RecipeStep


def recipe_step(use: str) -> RecipeStep:
    cls, origin = step_class(use)
    return RecipeStep(f"my {use}", cls(), origin)


def test_the_arguments_of_a_hook_are_the_results_that_it_takes() -> None:
    assert {"activations", "maps"} <= set(hook_arguments(recipe_step("basis-fold")))
    assert required_results(recipe_step("basis-fold")) == ["captured states", "maps"]
    assert required_results(recipe_step("residuals")) == []


def test_a_step_that_is_given_what_it_takes_passes() -> None:
    require_captured_states(recipe_step("fidelity"), captured=True)
    require_captured_states(recipe_step("residuals"), captured=False)


def test_a_recipe_without_a_capture_is_asked_to_add_one() -> None:
    with pytest.raises(RecipeError, match=r'^step "my fidelity": needs captured states; put a'):
        require_captured_states(recipe_step("fidelity"), captured=False)


def test_a_variant_without_the_capture_of_another_is_named() -> None:
    with pytest.raises(RecipeError, match=r'before it in "base" and "cut"\. Put "states" before'):
        require_captured_states(
            recipe_step("fidelity"), captured=False, variants=["base", "cut"], captures=["states"]
        )
