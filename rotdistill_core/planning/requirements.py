"""The results of earlier steps that a step's hook takes, and the check that there are any."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.resolved import RecipeStep

RESULTS = {"activations": "captured states", "maps": "maps"}
"""Argument of a stage hook -> the result of earlier steps that it stands for."""


def hook_arguments(recipe_step: RecipeStep) -> list[str]:
    """Return the names of the arguments that the step's stage hook takes, in order."""
    hook = getattr(recipe_step.step, recipe_step.stage)
    return list(inspect.signature(hook).parameters)


def required_results(recipe_step: RecipeStep) -> list[str]:
    """Return the results of earlier steps that the step needs: `captured states`, `maps`."""
    arguments = needed_arguments(recipe_step)
    return [result for argument, result in RESULTS.items() if argument in arguments]


def needed_arguments(recipe_step: RecipeStep) -> list[str]:
    """Return the arguments that the step's stage hook cannot do without: they have no default."""
    hook = getattr(recipe_step.step, recipe_step.stage)
    parameters = inspect.signature(hook).parameters.values()
    return [each.name for each in parameters if each.default is each.empty]


def require_captured_states(
    recipe_step: RecipeStep,
    captured: bool,
    variants: Sequence[str] = (),
    captures: Sequence[str] = (),
) -> None:
    """Check that a step which takes captured states is given some.

    Maps need no such check: without an aligner before it a step is given none, which is valid.

    Args:
        recipe_step: the step.
        captured: whether a step before it captures states.
        variants: the variants that it is checked for; named in the error.
        captures: ids of all capture steps of the recipe; named in the error.

    Raises:
        RecipeError: the step takes captured states and there are none.
    """
    if captured or "activations" not in needed_arguments(recipe_step):
        return
    problem = f'step "{recipe_step.id}": needs captured states'
    if not captures:
        raise RecipeError(f'{problem}; put a capture step (use = "residuals") before it.')
    raise RecipeError(
        f"{problem}, but no capture step runs before it in {_quoted(variants)}. "
        f"Put {_quoted(captures)} before it, and list it in {_quoted(variants)}, "
        "or in no variant, so that it always runs."
    )


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(f'"{name}"' for name in names)
