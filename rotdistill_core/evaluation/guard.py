"""The guard: how much an edit may cost on texts outside the domain.

Every transfer step has an option `guard`. It is on wherever a recipe names texts outside the domain
(`samples.guard`), because a gain in the domain is easily paid for elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError

if TYPE_CHECKING:
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.planning.text_counts import TextCounts

Guard = Annotated[float, Field(ge=1)] | Literal["off"]
"""Largest KL on the guard's validation half, as a multiple of the KL before the edit; `"off"`:
whatever it is."""

DEFAULT_GUARD = 1.02
"""The multiple where a recipe sets none: 2 % worse."""
HARMLESS_KL = 0.05
"""A KL that is allowed whatever it was before, nats per token. A student that is its teacher has a
KL of 0 there, and any multiple of that would refuse every edit."""


def guard_of(option: Guard | None, samples: Samples, step: str) -> float | None:
    """Return the multiple that a step's option stands for; None for no limit.

    Args:
        option: the option; None if the recipe leaves it out.
        samples: all texts.
        step: the name of the step, for the message.

    Raises:
        RecipeError: a limit is set, and there are no texts outside the domain.
    """
    if option == "off":
        return None
    if len(samples.layout.prediction_rows(Split.GUARD_VALIDATION)[0]):
        return DEFAULT_GUARD if option is None else option
    if option is None:
        return None
    raise RecipeError(
        f"{step}: guard needs texts outside the domain. Name a file of them as samples.guard, or "
        "leave out `guard`."
    )


def is_guarded(option: Guard | None, texts: TextCounts) -> bool:
    """Return whether a step with this option will score the guard's texts."""
    return option != "off" and texts.texts_of(Split.GUARD_VALIDATION) > 0


def largest_allowed_kl(guard: float, before: float) -> float:
    """Return the largest KL that an edit may have outside the domain, nats per token.

    Args:
        guard: multiple of the KL before.
        before: the KL before the edit, nats per token.
    """
    return max(guard * before, HARMLESS_KL)
