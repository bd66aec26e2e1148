"""Metric rows, the lines of results.jsonl, and the saved variant that evaluators score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rotdistill_core.evaluation.metrics import FAILED, UNPROMPTED_METRICS, teacher_metric

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.linalg.maps import Maps


class MetricRow(NamedTuple):
    """The value of one metric for one variant: over all texts, or over a part of them."""

    variant: str
    metric: str
    value: float
    split: str | None = None
    layer: int | None = None
    """Layer boundary of the figure; None where it is not about one layer."""
    language: str | None = None
    n: int | None = None
    """Number of tokens or texts in the mean."""
    text: str | None = None
    """Id of the one text that the figure is about; it enters the overall mean with weight `n`."""

    @property
    def is_overall(self) -> bool:
        """Whether the figure is over all layers, languages and texts."""
        return self.layer is None and self.language is None and self.text is None


@dataclass(frozen=True)
class Variant:
    """A saved variant, as evaluators see it."""

    name: str
    weights: Weights
    """The checkpoint as saved."""
    maps: Maps
    seconds: float
    """Time that its steps took, evaluation apart."""
    folder: Path
    """The checkpoint: a plain Hugging Face folder."""


def rows_as_json(rows: Sequence[MetricRow]) -> list[dict[str, object]]:
    """Return rows as the objects of results.jsonl.

    JSON has no value that is not finite: `nan` and `inf` become text.
    """
    return [
        row._asdict() | {"value": row.value if math.isfinite(row.value) else str(row.value)}
        for row in rows
    ]


def row_from_json(values: Mapping[str, Any]) -> MetricRow:
    """Return the row that `rows_as_json` described."""
    return MetricRow(**{**values, "value": float(values["value"])})


def overall_figures(rows: Iterable[MetricRow]) -> dict[str, dict[str, float]]:
    """Return variant -> metric -> value of the rows over all layers, languages and texts."""
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.is_overall:
            table.setdefault(row.variant, {})[row.metric] = row.value
    return table


def unprompted_teacher(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return metric -> figure of the teacher without its system prompt, compared with itself.

    Args:
        figures: `overall_figures` of a run. Only one that bakes a prompt in has such figures, and
            each variant has the same.
    """
    names = {metric: teacher_metric(metric) for metric in UNPROMPTED_METRICS}
    return {
        metric: row[name]
        for row in figures.values()
        for metric, name in names.items()
        if name in row
    }


def failure_row(variant: str, broken_checks: Sequence[str]) -> MetricRow:
    """Return the row that marks a variant which broke checks."""
    return MetricRow(variant, FAILED, float(len(broken_checks)))


def failed_variants(rows: Iterable[MetricRow]) -> list[str]:
    """Return the variants that a row marks as failed, in the order of the rows."""
    return list(dict.fromkeys(row.variant for row in rows if row.metric == FAILED))
