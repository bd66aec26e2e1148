"""What aligners measured, in a table each: a figure with its nulls, and the aligner's own figures.

The plots show the course over the layers; the tables show both ends and the mean, so that they are
as long for 100 layers as for two. Every single figure is in `report.json`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rotdistill_core.linalg.diagnostics import LayerDiagnostics

SHOWN_FIGURES = {
    "cosine_before": "cosine before the map",
    "cosine_after": "cosine after the map",
    "cosine_shuffled": "null: a map from shuffled rows",
    "cosine_random": "null: a random rotation",
    "cosine_mean": "null: the teacher's mean",
    "scale": "scale of the map",
    "heads.identity_score": "heads left in place",
    "heads.score": "heads matched",
    "heads.random_score": "null: heads at random",
    "neurons.identity_score": "neurons left in place",
    "neurons.score": "neurons matched",
    "neurons.random_score": "null: neurons at random",
}
"""Figure of `LayerDiagnostics` -> its title, in the order of the table."""
MAX_OWN = 40
"""Largest number of figures of an aligner's own that are shown."""
MAX_VALUES = 3
"""Largest number of different texts of one name that are shown."""
MAX_LETTERS = 120
"""Longest text of an aligner that is shown."""


class FigureRow(NamedTuple):
    """One figure over all layer boundaries where it was measured, as text."""

    name: str
    lowest: str
    """With the boundary where it is."""
    mean: str
    highest: str


@dataclass(frozen=True)
class AlignmentTable:
    """What is shown of one alignment step."""

    rows: list[FigureRow]
    remarks: list[str]
    """What is no number: `name: value (number of boundaries)`."""


def alignment_table(layers: Mapping[int, LayerDiagnostics]) -> AlignmentTable:
    """Return the figures that an aligner measured: those of all aligners, then its own (`extra`).

    Args:
        layers: layer boundary -> what was measured there.
    """
    rows: list[FigureRow] = []
    for name, title in SHOWN_FIGURES.items():
        values = {layer: _shown_value(each, name) for layer, each in layers.items()}
        rows += _figure_rows(title, values)
    own: dict[str, dict[int, Any]] = {}
    for layer, each in layers.items():
        for name, value in _leaves(each.extra):
            own.setdefault(name, {})[layer] = value
    remarks: list[str] = []
    for name, values in list(own.items())[:MAX_OWN]:
        if all(_is_number(value) for value in values.values()):
            rows += _figure_rows(_short(name), values)
        else:
            remarks.append(f"{_short(name)}: {_listed(list(values.values()))}")
    if len(own) > MAX_OWN:
        remarks.append(f"{len(own) - MAX_OWN} more figures are in report.json")
    return AlignmentTable(rows, remarks)


def _shown_value(diagnostics: LayerDiagnostics, name: str) -> Any:
    part, _, figure = name.rpartition(".")
    source = getattr(diagnostics, part) if part else diagnostics
    return getattr(source, figure) if source is not None else None


def _figure_rows(title: str, values: Mapping[int, Any]) -> Iterator[FigureRow]:
    """Yield the row of a figure, unless it was measured nowhere."""
    measured = {layer: value for layer, value in values.items() if value is not None}
    if not measured:
        return
    lowest = min(measured, key=measured.__getitem__)
    highest = max(measured, key=measured.__getitem__)
    yield FigureRow(
        title,
        f"{measured[lowest]:.4g} ({lowest})",
        f"{math.fsum(measured.values()) / len(measured):.4g}",
        f"{measured[highest]:.4g} ({highest})",
    )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `outer.inner` and value of figures that may be tables of figures."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def _listed(values: Sequence[Any]) -> str:
    """Return different values as text, the most frequent first, each with its number."""
    counts = Counter(_as_text(value) for value in values).most_common()
    shown = [f"{text} ({count})" for text, count in counts[:MAX_VALUES]]
    more = len(counts) - MAX_VALUES
    return "; ".join([*shown, f"{more} more in report.json"] if more > 0 else shown)


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return _short(f"{value:.4g}" if isinstance(value, float) else str(value))


def _short(text: str) -> str:
    return text if len(text) <= MAX_LETTERS else f"{text[:MAX_LETTERS]}…"
