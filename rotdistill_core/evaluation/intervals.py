"""Confidence intervals of a figure and of its change against another variant.

Tokens of one text depend on each other, so the bootstrap draws whole texts. The intervals cover
the choice of held-out texts. They do not cover the texts that a step was fitted on, nor its seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from rotdistill_core.evaluation.rows import MetricRow

DRAWS = 1000
"""Bootstrap draws of an interval."""
LEVEL = 0.95
"""Confidence level of an interval."""


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; the ends are nan where only one text was measured."""

    value: float
    low: float
    high: float

    def beyond_noise(self) -> bool:
        """Return whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Estimate:
    """A figure of a variant, and its change against the variant that it is compared with."""

    own: Interval
    change: Interval | None


class TextFigure(NamedTuple):
    """The figure of one text."""

    value: float
    weight: float
    """Weight of the text in the mean over texts: its number of tokens."""


FiguresByText = Mapping[str, TextFigure]
"""Text id -> the figure of that text."""


def bootstrap(values: NDArray[np.float64], counts: NDArray[np.float64], seed: int = 0) -> Interval:
    """Return the weighted mean of values `[t]`, one per text with weights `[t]`, and its interval.

    Each draw resamples t texts with replacement. The same t and seed give the same draws. With the
    differences of two variants as values the result is therefore the paired interval of their
    change: exactly 0 for variants that agree on every text.

    The percentile interval of a mean is too short for few texts, by `sqrt((t - 1) / t)` and by the
    ratio of Gauss to Student. Its percentiles are widened accordingly: the "expanded percentile" of
    Hesterberg, "What Teachers Should Know About the Bootstrap", arXiv:1411.5279.
    """
    n = len(values)
    value = float(counts @ values / counts.sum())
    if n < 2:
        return Interval(value, math.nan, math.nan)
    # One row per draw: how often each text was drawn, times its weight. [draws, t]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    weights = drawn * counts
    means = weights @ values / weights.sum(1)
    # Student's quantile with t - 1 degrees of freedom, as the probability of a normal one.
    tail = float(special.ndtr(math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, (1 - LEVEL) / 2)))
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(value, float(low), float(high))


def figures_by_text(rows: Iterable[MetricRow]) -> dict[str, dict[str, dict[str, TextFigure]]]:
    """Return metric -> variant -> text -> figure, of the rows that are about single texts."""
    figures: dict[str, dict[str, dict[str, TextFigure]]] = {}
    for row in rows:
        if row.text is not None:
            texts = figures.setdefault(row.metric, {}).setdefault(row.variant, {})
            texts[row.text] = TextFigure(float(row.value), float(row.n or 1))
    return figures


def mean_interval(texts: FiguresByText, seed: int = 0) -> Interval:
    """Return the mean over texts and its interval."""
    values, weights = np.array(list(texts.values())).T
    return bootstrap(values, weights, seed)


def paired_change(texts: FiguresByText, reference: FiguresByText, seed: int = 0) -> Interval | None:
    """Return the change from `reference` on the texts that both have, with its paired interval.

    None where they share no text.
    """
    shared = [text for text in texts if text in reference]
    if not shared:
        return None
    differences = np.array([texts[text].value - reference[text].value for text in shared])
    weights = np.array([texts[text].weight for text in shared])
    return bootstrap(differences, weights, seed)


def estimates(
    rows: Iterable[MetricRow], baseline: str, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """Return metric -> variant -> estimate, for every metric with rows of single texts.

    Changes are against `baseline`, on the texts that both variants have. Where the baseline lacks
    a metric, the first variant that has it is the reference.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for metric, variants in figures_by_text(rows).items():
        reference = baseline if baseline in variants else next(iter(variants))
        found[metric] = {}
        for variant, texts in variants.items():
            change = None
            if variant != reference:
                change = paired_change(texts, variants[reference], seed)
            found[metric][variant] = Estimate(mean_interval(texts, seed), change)
    return found
