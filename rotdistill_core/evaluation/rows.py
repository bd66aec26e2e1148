"""TODO: rotdistill_core.evaluation.rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.linalg.maps import Maps


def rows_as_json(rows: Sequence[MetricRow]) -> list[dict[str, object]]:
    """Return rows as the objects of results.jsonl; a value that is not finite, which JSON does not have, is text: `nan`, `inf`."""
    return [
        row._asdict() | {"value": row.value if math.isfinite(row.value) else str(row.value)}
        for row in rows
    ]


def overall_figures(rows: Sequence[MetricRow]) -> dict[str, dict[str, float]]:
    """Return variant -> metric -> value for the figures over all layers, languages and texts."""
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.layer is None and row.language is None and row.text is None:
            table.setdefault(row.variant, {})[row.metric] = row.value
    return table


class MetricRow(NamedTuple):
    """One result: the value of a metric for a variant."""

    variant: str
    metric: str
    value: float
    split: str | None = None
    layer: int | None = None
    language: str | None = None
    n: int | None = None
    text: str | None = None
    """The text that it is about: its share of the figure over all texts, with weight `n`. Its language is given too."""


@dataclass(frozen=True)
class Variant:
    """A saved variant, as evaluators see it."""

    name: str
    weights: Weights
    """The checkpoint as saved."""
    maps: Maps
    seconds: float
    folder: Path
    """Where the checkpoint lies: a plain Hugging Face folder."""
