"""The guard is on where a recipe has texts outside the domain, and can be left out by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from pydantic import TypeAdapter, ValidationError

from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.guard import (
    DEFAULT_GUARD,
    HARMLESS_KL,
    Guard,
    guard_of,
    is_guarded,
    largest_allowed_kl,
)
from rotdistill_core.planning.text_counts import TextCounts
from rotdistill_core.plugin.registry import step_class
from rotdistill_core.testing import pico_samples

OUTSIDE = pico_samples(texts=10, guard=4)
NONE_OUTSIDE = pico_samples(texts=10)


@pytest.mark.parametrize(
    ("option", "limit"), [(None, DEFAULT_GUARD), (1.5, 1.5), (1.0, 1.0), ("off", None)]
)
def test_with_texts_outside_the_domain(option: Guard | None, limit: float | None) -> None:
    assert guard_of(option, OUTSIDE, "refit") == limit


@pytest.mark.parametrize("option", [None, "off"])
def test_without_texts_outside_the_domain_there_is_no_guard(option: Guard | None) -> None:
    assert guard_of(option, NONE_OUTSIDE, "refit") is None


def test_a_limit_that_nothing_can_measure_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^refit: guard needs texts .* samples\.guard"):
        guard_of(1.5, NONE_OUTSIDE, "refit")


@pytest.mark.parametrize(
    ("option", "texts", "guarded"),
    [(None, 4, True), (None, 0, False), ("off", 4, False), (1.02, 4, True)],
)
def test_what_a_plan_counts(option: Guard | None, texts: int, guarded: bool) -> None:
    counts = TextCounts(0, {"fit": 9}, {"fit": 3, "guard-validation": texts}, 0, 0)
    assert is_guarded(option, counts) is guarded


@pytest.mark.parametrize(
    ("before", "allowed"),
    [(0.0, HARMLESS_KL), (0.01, HARMLESS_KL), (2.0, 2.04), (HARMLESS_KL, HARMLESS_KL * 1.02)],
)
def test_a_kl_that_does_no_harm_is_always_allowed(before: float, allowed: float) -> None:
    assert largest_allowed_kl(1.02, before) == pytest.approx(allowed)


@pytest.mark.parametrize("option", [0.9, -1.0, "nothing", True])
def test_other_options_are_refused(option: object) -> None:
    @dataclass
    class Options:
        guard: Guard | None = None

    with pytest.raises(ValidationError):
        TypeAdapter(Options).validate_python({"guard": option}, strict=True)


@pytest.mark.parametrize(
    "name", ["writer-refit", "lm-head-ridge", "prompt-kl", "transport", "soups"]
)
def test_transfer_steps_are_guarded_by_default(name: str) -> None:
    guard = step_class(name)[0].__dataclass_fields__["guard"].default
    assert guard_of(guard, OUTSIDE, name) == DEFAULT_GUARD
