"""Caveats: why the result of a step, with these options, is not what it looks like.

A step states its own caveats, so the report needs no option of any plugin.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

MIN_RIDGE = 1e-6
"""A smaller ridge, as a share of the mean diagonal, lets the fit follow rounding errors."""


class CaveatKind(StrEnum):
    """What a caveat is about; it decides when the report shows it."""

    CONTROL = "control"
    """A control stands in for the real thing. Shown if every edited variant has the step: a
    variant without the control, next to one with it, is what a control is for."""
    NO_RIDGE = "no ridge"
    """A regression is not regularised. Shown if any variant has the step."""
    RANDOM_MAP = "random map"
    """The step's map is random on purpose. Not shown: it is why the map is no better than
    chance."""


class Caveat(NamedTuple):
    """One reason not to trust a result, in one sentence for the report."""

    kind: CaveatKind
    text: str


def ridge_caveats(ridges: Sequence[float]) -> list[Caveat]:
    """Return the caveat of a regression whose largest candidate for λ is as good as none.

    Args:
        ridges: candidates for λ, as multiples of the mean diagonal.
    """
    largest = max(ridges)
    if largest >= MIN_RIDGE:
        return []
    text = f"λ is at most {largest:g} of the mean diagonal: the fit follows noise."
    return [Caveat(CaveatKind.NO_RIDGE, text)]
