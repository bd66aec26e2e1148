"""Quality gates: which side of a limit a figure lies on."""

from __future__ import annotations

import math

import pytest

from rotdistill_core.evaluation.gates import Gate, broken_gates, gates_of
from rotdistill_core.evaluation.rows import MetricRow
from rotdistill_core.recipe.document import Check


@pytest.mark.parametrize(
    ("higher_is_better", "value", "violated"),
    [
        (False, 1.5, False),
        (False, 1.5009, False),  # rounding: 0.1 % of the baseline
        (False, 1.51, True),
        (False, -3.0, False),
        (True, 1.5, False),
        (True, 1.4991, False),
        (True, 1.49, True),
        (False, math.nan, True),
        (True, math.nan, True),
    ],
)
def test_a_gate_is_violated_on_the_wrong_side_of_its_limit(
    higher_is_better: bool, value: float, violated: bool
) -> None:
    gate = Gate("any", 1.5, higher_is_better)
    assert gate.violated(value, baseline=1.0) is violated


def test_a_baseline_that_is_not_a_number_violates_every_gate() -> None:
    assert Gate("kl", 1.5, higher_is_better=False).violated(1.0, math.nan)


def test_only_gates_that_the_recipe_sets_exist() -> None:
    assert gates_of(Check()) == {}
    assert gates_of(Check(facts=0.9)) == {
        "facts": Gate("factual_completeness", 0.9, higher_is_better=True)
    }


@pytest.mark.parametrize(
    ("option", "limit", "metric", "values", "failing"),
    [
        ("kl_ratio", 1.0, "kl", {"base": 1.0, "a": 1.0009, "b": 1.1}, {"b"}),
        ("guard", 2.0, "guard_kl", {"a": 1.0, "b": 2.1, "c": math.nan}, {"b", "c"}),
        ("facts", 0.9, "factual_completeness", {"base": 0.5, "a": 0.45, "b": 0.4}, {"b"}),
        ("kl_ratio", 0.5, "kl", {"base": 1.0, "a": 0.6}, {"a"}),
    ],
)
def test_gates_compare_variants_with_the_baseline(
    option: str, limit: float, metric: str, values: dict[str, float], failing: set[str]
) -> None:
    rows = [MetricRow(name, metric, value) for name, value in values.items()]
    assert set(broken_gates(rows, Check(**{option: limit}), "base")) == failing


def test_the_baseline_can_be_named() -> None:
    rows = [MetricRow(name, "kl", value) for name, value in {"one": 9.0, "two": 1.0}.items()]
    assert broken_gates(rows, Check(kl_ratio=2.0), "base") == {}
    (failure,) = broken_gates(rows, Check(kl_ratio=2.0), baseline="two")["one"]
    assert "check.kl_ratio = 2 of two's 1" in failure


def test_a_gate_whose_metric_was_not_measured_fails_every_variant() -> None:
    rows = [MetricRow(name, "kl", 1.0) for name in ("base", "a")]
    failures = broken_gates(rows, Check(guard=1.0), "base")
    assert set(failures) == {"base", "a"}
    assert "guard_kl was not measured" in failures["a"][0]


def test_a_variant_without_the_metric_passes_where_others_have_it() -> None:
    rows = [
        MetricRow("base", "factual_completeness", 0.5),
        MetricRow("silent", "kl", 1.0),
    ]
    assert broken_gates(rows, Check(facts=1.0), "base") == {}


def test_a_figure_that_is_not_finite_fails_its_variant_without_any_gate() -> None:
    rows = [MetricRow("base", "kl", 1.0), MetricRow("a", "kl", math.inf)]
    assert broken_gates(rows, Check(), "base") == {"a": ["kl is not a number."]}
