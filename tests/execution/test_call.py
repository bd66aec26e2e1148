"""The contract of a step's hook: argument names, the type of its result, exactness."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest

from rotdistill_core import hookimpl, step
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.errors import CheckFailed, PluginError, RecipeError
from rotdistill_core.execution.call import call_step, check_hook, prove_exact
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.plugin.origin import Origin
from rotdistill_core.recipe.resolved import RecipeStep

AVAILABLE: dict[str, Any] = {"maps": Maps(), "activations": None, "pair": None, "out": None}


@step
class Align:
    """Return the maps that it was given."""

    use: Literal["align-it"] = "align-it"

    @hookimpl
    def align(self, maps: Maps, pair: Pair) -> Maps:
        return maps


@step
class NeedsActivations:
    use: Literal["needs"] = "needs"

    @hookimpl
    def align(self, maps: Maps, activations: ActivationStore) -> Maps:
        return maps


@step
class Unmarked:
    use: Literal["unmarked"] = "unmarked"

    def align(self, maps: Maps) -> Maps:
        return maps


@step
class AsksForMore:
    use: Literal["more"] = "more"

    @hookimpl
    def align(self, maps: Maps, weather: str) -> Maps:
        return maps


@step
class Forgetful:
    use: Literal["forgetful"] = "forgetful"

    @hookimpl
    def align(self, maps: Maps) -> None:
        """Return nothing."""


@step
class Wordy:
    use: Literal["wordy"] = "wordy"

    @hookimpl
    def evaluate(self, pair: Pair) -> dict[str, float]:
        return {"kl": 1.0}


@step
class ClaimsExactness:
    use: Literal["claims"] = "claims"
    exact: ClassVar[bool] = True

    @hookimpl
    def fold(self, weights: Any) -> Any:
        return weights


def placed(cls: type) -> RecipeStep:
    return RecipeStep("it", cls(), Origin("it", "acme-it", "1.0", "acme"))


def test_a_hook_gets_the_arguments_that_it_takes() -> None:
    check_hook(placed(Align))
    assert call_step(placed(Align), AVAILABLE) is AVAILABLE["maps"]


def test_a_hook_without_activations_before_it_asks_for_a_capture() -> None:
    with pytest.raises(RecipeError, match='step "it": needs captured states; put a capture step'):
        call_step(placed(NeedsActivations), AVAILABLE)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Unmarked, "align is not marked with @hookimpl"), (AsksForMore, "weather")],
)
def test_a_hook_unlike_its_specification_is_refused(cls: type, reason: str) -> None:
    with pytest.raises(PluginError, match=r'step "it" of acme-it 1\.0') as caught:
        check_hook(placed(cls))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Forgetful, "align must return Maps, not NoneType"),
        (Wordy, "evaluate must return list, not dict"),
    ],
)
def test_a_result_of_another_type_is_refused(cls: type, reason: str) -> None:
    with pytest.raises(PluginError, match=rf'step "it" of acme-it 1\.0: {reason}'):
        call_step(placed(cls), AVAILABLE)


def test_an_exact_step_must_be_undoable() -> None:
    class Weights:
        undo = None

    claims = placed(ClaimsExactness)
    with pytest.raises(CheckFailed, match="do not come from a fold that can be undone"):
        prove_exact(None, claims, Weights(), Weights(), None, None)  # type: ignore[arg-type]
