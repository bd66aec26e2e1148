"""One call of a step's hook, and the contract that the step is held to.

A step is called directly, not through pluggy: one instance answers one hook. The specification of
the hook is the contract. A step takes arguments that the specification names and returns the type
that it names. A step that declares itself exact proves that logits stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

from rotdistill_core.checkpoint.weights import Undo, Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import CheckFailed, PluginError
from rotdistill_core.execution.context import RunContext
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.certificate import certify, enforce_certificate
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.planning.requirements import hook_arguments, require_captured_states
from rotdistill_core.plugin.registry import plugin_manager
from rotdistill_core.recipe.resolved import RecipeStep
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.output import StepOutput

RESULT_TYPES: dict[str, type] = {
    "capture": ActivationStore,
    "align": Maps,
    "refine": Maps,
    "fold": Weights,
    "style": Weights,
    "evaluate": list,
}
"""Stage -> what its hook returns."""


def check_hook(recipe_step: RecipeStep) -> None:
    """Compare the hook of a step with its specification.

    Raises:
        PluginError: the hook is not marked, or takes an argument that the specification lacks.
    """
    manager = plugin_manager()
    try:
        manager.register(recipe_step.step)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{_origin(recipe_step)}: {error}") from error
    hooks = manager.get_hookcallers(recipe_step.step) or []
    if recipe_step.stage not in [hook.name for hook in hooks]:
        raise PluginError(
            f"{_origin(recipe_step)}: its method {recipe_step.stage} is not marked with @hookimpl."
        )


def call_step(recipe_step: RecipeStep, available: Mapping[str, object]) -> Any:
    """Call the hook of a step with those of the available arguments that it takes.

    The result has the type that `RESULT_TYPES` gives for the stage.

    Raises:
        RecipeError: the step takes captured activations and no step before it captures any.
        PluginError: the hook returns something else than its specification says.
    """
    hook = getattr(recipe_step.step, recipe_step.stage)
    require_captured_states(recipe_step, captured=available.get("activations") is not None)
    result = hook(**{name: available[name] for name in hook_arguments(recipe_step)})
    expected = RESULT_TYPES[recipe_step.stage]
    if not isinstance(result, expected):
        raise PluginError(
            f"{_origin(recipe_step)}: {recipe_step.stage} must return {expected.__name__}, "
            f"not {type(result).__name__}."
        )
    return result


def prove_exact(
    run: RunContext,
    recipe_step: RecipeStep,
    before: Weights,
    after: Weights,
    samples: Samples,
    out: StepOutput,
) -> str:
    """Measure the certificate of an exact step, record it, and store how to undo the step.

    Returns:
        The file that undoes the step, relative to the folder of runs.

    Raises:
        CheckFailed: logits change, or `unfold` does not give the old weights back.
    """
    where = f'step "{recipe_step.id}"'
    if not isinstance(after.undo, Undo):
        raise CheckFailed(
            f"{where} says it is exact, but its weights do not come from a fold that can be undone."
        )
    run.progress(0, 1, "certificate: logits, and the way back")
    unfolded = after.unfold(after.undo)
    certificate = certify(before, after, unfolded, samples.layout, run.pair.student.device)
    out.report.certificate = certificate
    undo = out.tensors(RunLayout.weights(recipe_step.id, RunLayout.UNDO), after.undo.tensors())
    enforce_certificate(certificate, run.recipe.check, where)
    return out.relative(undo)


def _origin(recipe_step: RecipeStep) -> str:
    return f'step "{recipe_step.id}" of {recipe_step.origin.release}'
