"""Counts of work become seconds by the rates of a machine, and seconds become words."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest

from rotdistill_core.planning.cost import (
    Cost,
    CostContext,
    Kernel,
    capture_cost,
    checkpoint_cost,
    comparison_cost,
    evaluation_cost,
    forward_cost,
    generation_cost,
    models_cost,
)
from rotdistill_core.planning.rates import ASSUMED, Rates
from rotdistill_core.planning.times import (
    added_seconds,
    seconds_by_kind,
    seconds_of,
    time_in_words,
)

ONE = Rates(**{field.name: 1.0 for field in fields(Rates)})
UNIT = replace(
    ASSUMED, host=ONE, written_bytes=1.0, read_bytes=1.0, copied_bytes=1.0, gpu=replace(ONE)
)


def seconds(cost: Cost) -> float:
    return seconds_of(cost, ASSUMED, on_gpu=False)


def longer(context: CostContext, factor: int) -> CostContext:
    """Return a context with so many times the texts."""
    texts = context.texts
    grown = replace(
        texts,
        rows={split: factor * rows for split, rows in texts.rows.items()},
        texts={split: factor * count for split, count in texts.texts.items()},
        questions_asked=factor * texts.questions_asked,
        answer_tokens=factor * texts.answer_tokens,
    )
    return replace(context, texts=grown)


def test_each_kind_of_work_takes_time_at_its_own_rate() -> None:
    cost = Cost(
        operations=100.0,
        kernels={Kernel.FLOAT64: 30.0, Kernel.SOLVES: 20.0},
        activations=2.0,
        layer_calls=3.0,
        streamed_bytes=4.0,
        exact_terms=5.0,
        disk_bytes=6.0,
        read_bytes=7.0,
        traffic_bytes=8.0,
    )
    assert seconds_of(cost, UNIT, on_gpu=False) == 100 + 2 + 3 + 4 + 5 + 6 + 7
    assert seconds_of(cost, UNIT, on_gpu=True) == 100 + 2 + 3 + 4 + 5 + 6 + 7 + 8
    assert seconds_by_kind(cost, UNIT, on_gpu=False)["products"] == 50
    slow = replace(UNIT, host=replace(ONE, solves=0.5))
    assert seconds_of(cost, slow, on_gpu=False) == 127 + 20


@pytest.mark.parametrize("kernel", Kernel)
def test_every_kernel_has_a_rate(kernel: Kernel) -> None:
    cost = Cost(operations=12.0, kernels={kernel: 12.0})
    rates = replace(ONE, **{kernel.value: 4.0})
    assert seconds_of(cost, replace(UNIT, host=rates), on_gpu=False) == 3.0


def test_the_time_of_two_costs_is_the_sum_of_their_times(pico_context: CostContext) -> None:
    one = capture_cost(pico_context)
    two = evaluation_cost(pico_context)
    assert seconds(one + two) == pytest.approx(seconds(one) + seconds(two))
    assert seconds(one.repeated(3)) == pytest.approx(
        3 * (seconds(one) - one.disk_bytes / ASSUMED.written_bytes)
        + one.disk_bytes / ASSUMED.written_bytes
    )


@pytest.mark.parametrize("name", ["capture", "evaluation", "answers"])
def test_more_texts_take_longer(pico_context: CostContext, name: str) -> None:
    def cost(context: CostContext) -> Cost:
        texts = context.texts
        asked = texts.questions_asked, texts.answer_tokens
        return {
            "capture": capture_cost(context),
            "evaluation": evaluation_cost(context),
            "answers": generation_cost(context.teacher, texts, *asked, 4),
        }[name]

    times = [seconds(cost(longer(pico_context, factor))) for factor in (1, 2, 8, 64, 512)]
    assert all(a < b for a, b in pairwise(times))
    # Many texts take a multiple of the time of few; what does not depend on them is small by then.
    assert times[-1] == pytest.approx(8 * times[-2], rel=0.1)


def test_half_the_numbers_are_products_of_another_dtype(pico_context: CostContext) -> None:
    walks = [forward_cost(pico_context.student, 100, number) for number in (2, 4, 8)]
    assert {walk.operations for walk in walks} == {walks[0].operations}
    kinds = [{*walk.kernels} for walk in walks]
    assert kinds == [{Kernel.BFLOAT16}, set(), {Kernel.FLOAT64}]


def test_answers_that_grow_together_share_the_reading_of_weights(
    pico_context: CostContext,
) -> None:
    def streamed(questions: int) -> float:
        texts = pico_context.texts
        return generation_cost(
            pico_context.teacher, texts, questions, 8 * questions, 4
        ).streamed_bytes

    weights = 8 * pico_context.teacher.parameters() * 4
    assert streamed(1) > weights
    assert streamed(64) < 64 * streamed(1)
    assert streamed(65) > streamed(64) + weights


def test_a_twin_of_the_teacher_is_compared_with_transformers_once(
    pico_context: CostContext,
) -> None:
    twin = replace(pico_context, same=True)
    both = models_cost(pico_context)
    assert both.operations > models_cost(twin).operations > 0
    saved = checkpoint_cost(pico_context, 4)
    assert saved.operations == comparison_cost(pico_context.student, pico_context.texts).operations


def test_the_sum_of_times_is_unknown_if_one_is() -> None:
    assert added_seconds([1.0, 2.0, 0.0]) == 3.0
    assert added_seconds([]) == 0.0
    assert added_seconds([1.0, None]) is None


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "a moment"),
        (1.9, "a moment"),
        (3.4, "about 3 seconds"),
        (12, "about 10 seconds"),
        (44, "about 45 seconds"),
        (88, "about 90 seconds"),
        (100, "about 2 minutes"),
        (245, "about 4 minutes"),
        (26 * 60, "about 25 minutes"),
        (89 * 60, "about 90 minutes"),
        (3 * 3600, "about 3 hours"),
        (50 * 3600, "about 2 days"),
        (123 * 86400, "about 100 days"),
        (None, "its time is not known"),
    ],
)
def test_times_are_rounded_as_estimates_are(number: float | None, words: str) -> None:
    assert time_in_words(number) == words


def test_words_do_not_get_shorter_as_times_get_longer() -> None:
    units = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
    said = []
    for step in range(1, 200):
        word = time_in_words(1.08**step + 2).split()
        said.append(int(word[1]) * units[word[2]])
        assert said[-1] / 1.35 < 1.08**step + 2 < said[-1] * 1.5
    assert said == sorted(said)


def test_an_assumed_gpu_of_twice_the_operations_takes_half_the_time() -> None:
    cost = Cost(operations=1e15, activations=1e12, streamed_bytes=1e12)
    slow, fast = (ASSUMED.on_gpu(operations) for operations in (1e14, 2e14))
    assert seconds_of(cost, slow, on_gpu=True) == pytest.approx(
        2 * seconds_of(cost, fast, on_gpu=True)
    )
    assert math.isclose(fast.gpu.bfloat16, 2e14)
    assert not fast.gpu_measured
