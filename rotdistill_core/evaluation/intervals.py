"""How sure a figure is: intervals by resampling texts, of each variant and of its change against another on the same draws.

Tokens of one text depend on each other, so whole texts are drawn. What it covers is the choice of held-out texts, and nothing else:
not the texts that a step was fitted on, nor its seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rotdistill_core.evaluation.rows import MetricRow


DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; the ends are nan where there is only one text."""

    value: float
    low: float
    high: float

    def beyond_noise(self) -> bool:
        """Return whether 0 lies outside."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Estimate:
    """A figure of a variant, and its change against the variant that it is compared with."""

    own: Interval
    change: Interval | None


def bootstrap(values: NDArray[np.float64], counts: NDArray[np.float64], seed: int = 0) -> Interval:
    """Return the mean of values `[t]`, one per text, weighted by counts `[t]`, and its interval over draws of t texts.

    The same number of texts and seed give the same draws, so with the differences of two variants as values this is the paired
    interval of their change: exactly 0 for variants that agree on every text.

    Percentiles are widened for few texts: the percentile interval of the mean is short by `sqrt((t - 1) / t)` and by the ratio of
    Gauss to Student (Hesterberg, "What Teachers Should Know About the Bootstrap", arXiv:1411.5279, "expanded percentile").
    """
    import numpy as np  # here and not above: a recipe is read, and its observers with it, before anything is computed
    from scipy import special

    n = len(values)
    value = float(counts @ values / counts.sum())
    if n < 2:
        return Interval(value, math.nan, math.nan)
    weights = (
        np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS) * counts
    )  # [draws, t]
    means = weights @ values / weights.sum(1)
    tail = float(special.ndtr(math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, (1 - LEVEL) / 2)))
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(value, float(low), float(high))


Texts = dict[str, tuple[float, float]]
"""Text -> its figure, and its weight in the mean."""


def values_by_text(rows: Iterable[MetricRow]) -> dict[str, dict[str, Texts]]:
    """Return metric -> variant -> texts, for every metric that has rows of single texts."""
    seen: dict[str, dict[str, Texts]] = {}
    for row in rows:
        if row.text is not None:
            seen.setdefault(row.metric, {}).setdefault(row.variant, {})[row.text] = (
                float(row.value),
                float(row.n or 1),
            )
    return seen


def mean_interval(texts: Texts, seed: int = 0) -> Interval:
    """Return the mean over texts, and its interval."""
    import numpy as np

    values, counts = np.array(list(texts.values())).T
    return bootstrap(values, counts, seed)


def paired_change(texts: Texts, first: Texts, seed: int = 0) -> Interval | None:
    """Return the change from `first` on the texts that both have, and its paired interval; None where they share none."""
    import numpy as np

    shared = [text for text in texts if text in first]
    if not shared:
        return None
    return bootstrap(
        np.array([texts[t][0] - first[t][0] for t in shared]),
        np.array([texts[t][1] for t in shared]),
        seed,
    )


def estimates(
    rows: Iterable[MetricRow], base: str, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """Return metric -> variant -> estimate, for every metric that has rows of single texts.

    Changes are against `base`, or the first variant that has the metric where that has none, on the texts that both have.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for metric, variants in values_by_text(rows).items():
        reference = base if base in variants else next(iter(variants))
        for variant, texts in variants.items():
            change = (
                paired_change(texts, variants[reference], seed) if variant != reference else None
            )
            found.setdefault(metric, {})[variant] = Estimate(mean_interval(texts, seed), change)
    return found
