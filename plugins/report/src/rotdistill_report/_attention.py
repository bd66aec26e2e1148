"""Attention maps of heads that a permutation moved, beside the teacher's: before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST = 3
"""Heads that are shown of a layer."""


def chosen(card: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (teacher's head, student's head) pairs of a layer: those that moved first."""
    pairs = [(j, i) for j, i in enumerate(card["heads"]["permutation"]) if i >= 0]
    return sorted(pairs, key=lambda pair: pair[0] == pair[1])[:MOST]


def moved(card: Mapping[str, Any]) -> int:
    """Return how many heads of a layer the permutation moves."""
    return sum(j != i for j, i in enumerate(card["heads"]["permutation"]))


def draw(figure: Figure, path: Path, card: Mapping[str, Any]) -> None:
    """Draw the teacher's heads, the student's at the same place, and the student's that the permutation puts there."""
    from safetensors.numpy import load_file

    maps, pairs = load_file(path), chosen(card)
    axes = figure.subplots(3, len(pairs), sharex=True, sharey=True, squeeze=False)
    for column, (theirs, mine) in enumerate(pairs):
        before = min(theirs, len(maps["student"]) - 1)
        rows = (
            ("teacher", maps["teacher"][theirs], theirs),
            ("before", maps["student"][before], before),
            ("after", maps["student"][mine], mine),
        )
        for row, (who, values, head) in enumerate(rows):
            here = axes[row][column]
            image = here.imshow(values, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            here.set_title(f"{who}: head {head}", fontsize=8.5)
            here.grid(visible=False)
    figure.supxlabel("attends to token", fontsize=9.5)
    figure.supylabel("token", fontsize=9.5)
    figure.colorbar(image, ax=axes, label="attention, 0 to 1", shrink=0.6)
