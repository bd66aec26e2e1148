"""Quality gates: figures of a variant that must not be much worse than those of the baseline.

The options of `[check]` that set a gate are ratios. A variant that breaks one is marked as failed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rotdistill_core.evaluation.rows import MetricRow, overall_figures
from rotdistill_core.recipe.document import Check

RELATIVE_ROUNDING = 1e-3
"""Share of the baseline's figure that counts as rounding."""
ABSOLUTE_ROUNDING = 1e-6


@dataclass(frozen=True)
class Gate:
    """A limit of one metric, as a multiple of the baseline's figure."""

    metric: str
    limit: float
    higher_is_better: bool

    def violated(self, value: float, baseline: float) -> bool:
        """Return whether a value is on the wrong side of the limit; nan on either side is.

        The limit is `limit * baseline`, plus 0.1 % of the baseline and 1e-6 for rounding.
        """
        sign = -1 if self.higher_is_better else 1
        bound = sign * self.limit * baseline + RELATIVE_ROUNDING * baseline + ABSOLUTE_ROUNDING
        return not sign * value <= bound


def gates_of(check: Check) -> dict[str, Gate]:
    """Return option name -> gate for the gates that a recipe sets."""
    gates = {}
    if check.kl_ratio is not None:
        gates["kl_ratio"] = Gate("kl", check.kl_ratio, higher_is_better=False)
    if check.guard is not None:
        gates["guard"] = Gate("guard_kl", check.guard, higher_is_better=False)
    if check.facts is not None:
        gates["facts"] = Gate("factual_completeness", check.facts, higher_is_better=True)
    return gates


def broken_gates(rows: Sequence[MetricRow], check: Check, baseline: str) -> dict[str, list[str]]:
    """Return variant -> the checks that it breaks, in words.

    A figure that is not finite breaks a check by itself. Where `baseline` lacks a gate's metric,
    the first variant that has it is the reference.
    """
    failures: dict[str, list[str]] = {}
    not_finite = ((row.variant, row.metric) for row in rows if not math.isfinite(row.value))
    for variant, metric in dict.fromkeys(not_finite):
        failures.setdefault(variant, []).append(f"{metric} is not a number.")
    table = overall_figures(rows)
    for option, gate in gates_of(check).items():
        for variant, failure in _violations(table, option, gate, baseline):
            failures.setdefault(variant, []).append(failure)
    return failures


def _violations(
    table: dict[str, dict[str, float]], option: str, gate: Gate, baseline: str
) -> list[tuple[str, str]]:
    """Return (variant, failure in words) for every variant that violates one gate."""
    measured = [name for name in table if gate.metric in table[name]]
    if not measured:
        missing = f"{gate.metric} was not measured; check.{option} = {gate.limit:g} needs it."
        return [(name, missing) for name in table]
    reference = baseline if baseline in measured else measured[0]
    limit = table[reference][gate.metric]
    violations = []
    for name in measured:
        value = table[name][gate.metric]
        if name != reference and gate.violated(value, limit):
            words = f"{gate.metric} is {value:.4g}; "
            words += f"check.{option} = {gate.limit:g} of {reference}'s {limit:.4g}."
            violations.append((name, words))
    return violations
