"""Bootstrap intervals: coverage, pairing, and what has no interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rotdistill_core.evaluation.intervals import Estimate, bootstrap, estimates
from rotdistill_core.evaluation.rows import MetricRow

TEXTS = 20


def rows_of(variant: str, values: list[float]) -> list[MetricRow]:
    """Return the rows of a KL that was measured on texts t0, t1, ..."""
    mean = sum(values) / len(values)
    overall = MetricRow(variant, "kl", mean, "heldout", n=10 * len(values))
    by_text = [
        MetricRow(variant, "kl", value, "heldout", language="en", n=10, text=f"t{k}")
        for k, value in enumerate(values)
    ]
    return [overall, *by_text]


def kl_estimates(**variants: list[float]) -> dict[str, Estimate]:
    rows = [row for name, values in variants.items() for row in rows_of(name, values)]
    return estimates(rows, "base")["kl"]


def test_the_interval_covers_the_truth_at_about_its_level() -> None:
    random = np.random.default_rng(3)
    trials = 400
    covered = 0
    for trial in range(trials):
        truth = random.gamma(4.0, 0.25, TEXTS)  # mean 1, skewed as KL is
        counts = random.integers(20, 80, TEXTS).astype(float)
        measured = truth + random.normal(0, 0.5, TEXTS) / np.sqrt(counts)
        interval = bootstrap(measured, counts, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.92 <= covered / trials <= 0.98


def test_tokens_of_one_text_do_not_count_as_independent() -> None:
    values, counts = np.random.default_rng(0).normal(1, 0.5, TEXTS), np.full(TEXTS, 60.0)
    interval = bootstrap(values, counts)
    student = 2 * 2.09 * values.std(ddof=1) / math.sqrt(TEXTS)  # of the mean of texts
    assert interval.high - interval.low == pytest.approx(student, rel=0.15)


def test_the_value_is_weighted_by_tokens() -> None:
    assert bootstrap(np.array([1.0, 4.0]), np.array([3.0, 1.0])).value == pytest.approx(7 / 4)


def test_one_text_has_no_interval_and_is_never_beyond_noise() -> None:
    interval = bootstrap(np.array([2.0]), np.array([9.0]))
    assert interval.value == 2.0
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert not interval.beyond_noise()


def test_a_seed_repeats_its_draws() -> None:
    values, counts = np.random.default_rng(1).normal(size=(2, TEXTS)) ** 2 + 1
    assert bootstrap(values, counts, 5) == bootstrap(values, counts, 5)
    assert bootstrap(values, counts, 5) != bootstrap(values, counts, 6)


def test_a_variant_that_equals_the_baseline_changes_by_exactly_zero() -> None:
    values = np.random.default_rng(2).gamma(2, 2, TEXTS).tolist()
    change = kl_estimates(base=values, same=values)["same"].change
    assert change is not None
    assert (change.value, change.low, change.high, change.beyond_noise()) == (0, 0, 0, False)


def test_pairing_detects_a_change_that_two_separate_intervals_do_not() -> None:
    random = np.random.default_rng(4)
    hard = random.gamma(2, 2, TEXTS)  # texts differ much, the variants little
    better = hard - 0.2 + random.normal(0, 0.05, TEXTS)
    found = kl_estimates(base=hard.tolist(), better=better.tolist())
    base, own, change = found["base"].own, found["better"].own, found["better"].change
    assert change is not None
    assert change.high - change.low < 0.1 * (own.high - own.low)
    assert change.beyond_noise()
    assert change.high < 0
    assert base.low < own.high
    assert change.value == pytest.approx(own.value - base.value)


def test_noise_alone_is_rarely_beyond_noise() -> None:
    random = np.random.default_rng(7)
    beyond = 0
    for _ in range(200):
        one, two = random.normal(1, 0.3, (2, TEXTS)).tolist()
        change = kl_estimates(base=one, other=two)["other"].change
        assert change is not None
        beyond += change.beyond_noise()
    assert 1 <= beyond <= 24


def test_without_the_baseline_changes_are_against_the_first_variant_on_shared_texts() -> None:
    found = kl_estimates(one=[1.0, 2.0, 3.0], two=[2.0, 3.0])
    assert found["one"].change is None
    change = found["two"].change
    assert change is not None
    assert (change.value, change.low, change.high) == (1.0, 1.0, 1.0)


def test_variants_that_share_no_text_have_no_change() -> None:
    rows = [
        MetricRow("base", "kl", 1.0, text="t0"),
        MetricRow("other", "kl", 2.0, text="t1"),
    ]
    assert estimates(rows, "base")["kl"]["other"].change is None


def test_metrics_without_rows_of_single_texts_have_no_estimate() -> None:
    rows = [
        MetricRow("base", "parameters", 5.0),
        MetricRow("base", "kl", 1.0, "heldout", language="en", n=3),
    ]
    assert estimates(rows, "base") == {}
