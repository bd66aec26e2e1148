"""TODO: rotdistill_core.evaluation.gates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rotdistill_core.evaluation.rows import MetricRow, overall_figures
from rotdistill_core.recipe.document import Check


def broken_gates(rows: Sequence[MetricRow], check: Check) -> dict[str, list[str]]:
    """Return variant -> what breaks the recipe's checks. Ratios are to `base`, else the first that has the metric; 0.1 % is rounding."""
    found: dict[str, list[str]] = {}
    for variant, metric in dict.fromkeys(
        (row.variant, row.metric) for row in rows if not math.isfinite(row.value)
    ):
        found.setdefault(variant, []).append(f"{metric} is not a number.")
    table = overall_figures(rows)
    for key, metric, sign in (
        ("kl_ratio", "kl", 1),
        ("guard", "guard_kl", 1),
        ("facts", "factual_completeness", -1),
    ):
        limit, base = (
            getattr(check, key),
            next((n for n in ("base", *table) if metric in table.get(n, ())), None),
        )
        for name in (n for n in table if limit is not None and n != base):
            own, its = table[name].get(metric, math.nan), table[base][metric] if base else math.nan
            if not sign * own <= sign * limit * its + 1e-3 * its + 1e-6 and (
                base is None or metric in table[name]
            ):
                found.setdefault(name, []).append(
                    f"{metric} is {own:.4g}; check.{key} = {limit:g} of {base}'s {its:.4g}."
                )
    return found
