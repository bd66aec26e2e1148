"""Intervals of known figures: they cover the truth as often as they say, pairing narrows them, what is equal has none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rotdistill_core.evaluation.intervals import Estimate, bootstrap, estimates
from rotdistill_core.evaluation.rows import MetricRow

TEXTS = 20


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    maker = np.random.default_rng(3)
    trials, inside = 400, 0
    for trial in range(trials):
        own = maker.gamma(4.0, 0.25, TEXTS)  # what each text is like: mean 1, skewed as KL is
        counts = maker.integers(20, 80, TEXTS).astype(float)
        values = own + maker.normal(0, 0.5, TEXTS) / np.sqrt(counts)
        found = bootstrap(values, counts, seed=trial)
        inside += found.low <= 1.0 <= found.high
    assert 0.92 <= inside / trials <= 0.98


def test_tokens_of_one_text_are_not_taken_for_independent() -> None:
    maker = np.random.default_rng(0)
    own, counts = maker.normal(1, 0.5, TEXTS), np.full(TEXTS, 60.0)
    found = bootstrap(own, counts)
    wanted = (
        2 * 2.09 * own.std(ddof=1) / math.sqrt(TEXTS)
    )  # Student's interval of the mean of texts
    assert found.high - found.low == pytest.approx(wanted, rel=0.15)


def test_the_value_counts_every_token_alike() -> None:
    assert bootstrap(np.array([1.0, 4.0]), np.array([3.0, 1.0])).value == pytest.approx(7 / 4)


def test_one_text_has_no_interval_and_is_never_beyond_noise() -> None:
    found = bootstrap(np.array([2.0]), np.array([9.0]))
    assert (found.value, math.isnan(found.low), math.isnan(found.high)) == (2.0, True, True)
    assert not found.beyond_noise()


def test_a_seed_repeats_its_draws() -> None:
    values, counts = np.random.default_rng(1).normal(size=(2, TEXTS)) ** 2 + 1
    assert bootstrap(values, counts, 5) == bootstrap(values, counts, 5)
    assert bootstrap(values, counts, 5) != bootstrap(values, counts, 6)


def rows(variant: str, values: list[float]) -> list[MetricRow]:
    whole = MetricRow(
        variant, "kl", sum(values) / len(values), "heldout", None, None, 10 * len(values)
    )
    return [
        whole,
        *(
            MetricRow(variant, "kl", value, "heldout", None, "en", 10, f"t{k}")
            for k, value in enumerate(values)
        ),
    ]


def judged(**variants: list[float]) -> dict[str, Estimate]:
    return estimates(
        [row for name, values in variants.items() for row in rows(name, values)], "base"
    )["kl"]


def test_a_variant_that_equals_base_has_changed_by_exactly_nothing() -> None:
    values = np.random.default_rng(2).gamma(2, 2, TEXTS).tolist()
    change = judged(base=values, same=values)["same"].change
    assert change is not None
    assert (change.value, change.low, change.high, change.beyond_noise()) == (0, 0, 0, False)


def test_pairing_sees_a_change_that_two_intervals_apart_do_not() -> None:
    maker = np.random.default_rng(4)
    hard = maker.gamma(2, 2, TEXTS)  # texts differ much, the variants little
    found = judged(base=hard.tolist(), better=(hard - 0.2 + maker.normal(0, 0.05, TEXTS)).tolist())
    own, change, base = found["better"].own, found["better"].change, found["base"].own
    assert change is not None
    assert change.high - change.low < 0.1 * (own.high - own.low)
    assert change.beyond_noise()
    assert change.high < 0
    assert base.low < own.high
    assert change.value == pytest.approx(own.value - base.value)


def test_noise_alone_is_not_beyond_noise() -> None:
    maker, beyond = np.random.default_rng(7), 0
    for _ in range(200):
        one, two = maker.normal(1, 0.3, (2, TEXTS)).tolist()
        change = judged(base=one, other=two)["other"].change
        assert change is not None
        beyond += change.beyond_noise()
    assert 1 <= beyond <= 24


def test_without_base_changes_are_against_the_first_and_on_shared_texts() -> None:
    found = judged(one=[1.0, 2.0, 3.0], two=[2.0, 3.0])
    assert found["one"].change is None
    change = found["two"].change
    assert change is not None
    assert (change.value, change.low, change.high) == (1.0, 1.0, 1.0)


def test_figures_without_texts_have_no_estimate() -> None:
    assert (
        estimates(
            [
                MetricRow("base", "parameters", 5.0),
                MetricRow("base", "kl", 1.0, "heldout", None, "en", 3),
            ],
            "base",
        )
        == {}
    )
