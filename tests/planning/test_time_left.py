"""The time that is left: the plan's at the start, corrected by the pace of what is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rotdistill_core.planning.machine import Machine
from rotdistill_core.planning.plan import CHECKPOINTS, Plan, PlanLine
from rotdistill_core.planning.rates import ASSUMED
from rotdistill_core.planning.text_counts import TextCounts
from rotdistill_core.planning.time_left import TimeLeft

MACHINE = Machine(ram=1, gpus=(), disk=1, cores=1, profile=replace(ASSUMED, loading=4.0))


class Clock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def line(name: str, seconds: float | None, *variants: str, reused: bool = False) -> PlanLine:
    return PlanLine(id=name, variants=list(variants), reused=reused, why="", seconds=seconds)


LINES = (
    line("models", 6.0),
    line("residuals", 40.0, "base", "full"),
    line("refit", 30.0, "full"),
    line("old", 0.0, "full", reused=True),
    line(CHECKPOINTS, 10.0, "base"),
    line(CHECKPOINTS, 10.0, "full"),
)


def plan_of(*lines: PlanLine) -> Plan:
    return Plan(
        folder=Path("runs/trial"),
        lines=list(lines),
        models={},
        texts=TextCounts(0, {}, {}, 0, 0),
        machine=MACHINE,
        baseline_memory=1,
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def left(clock: Clock) -> TimeLeft:
    return TimeLeft(plan_of(*LINES), clock)


def run(left: TimeLeft, clock: Clock, pace: float) -> list[float | None]:
    """Let a run go on at a pace; return what is left after each event."""
    found = [left.seconds()]
    clock.seconds += pace * 10
    for step, variant, seconds in (
        ("residuals", "base", 40),
        (CHECKPOINTS, "base", 10),
        ("residuals", "full", 0),
        ("old", "full", 0),
        ("refit", "full", 30),
        (CHECKPOINTS, "full", 10),
    ):
        if step != CHECKPOINTS:
            left.begins(step, variant)
        clock.seconds += pace * seconds
        left.ends(step, variant)
        found.append(left.seconds())
    return found


def test_at_the_start_it_is_the_time_of_the_plan(left: TimeLeft) -> None:
    assert left.seconds() == plan_of(*LINES).totals.seconds == 100.0


def test_a_run_as_planned_counts_down_to_nothing(left: TimeLeft, clock: Clock) -> None:
    assert run(left, clock, 1.0) == pytest.approx([100, 50, 40, 40, 40, 10, 0])


@pytest.mark.parametrize("pace", [0.5, 2.0, 3.0])
def test_the_pace_of_what_is_done_is_that_of_the_rest(
    left: TimeLeft, clock: Clock, pace: float
) -> None:
    found = run(left, clock, pace)
    assert found[0] == 100
    true = [pace * rest for rest in (50, 40, 40, 40, 10, 0)]
    # A tenth of the plan counts as done at the plan's own pace.
    for told, rest in zip(found[1:], true, strict=True):
        assert told is not None
        assert abs(told - rest) <= 0.2 * rest * max(pace, 1 / pace) / 2
    assert found[-1] == 0


def test_time_passes_inside_a_step(left: TimeLeft, clock: Clock) -> None:
    clock.seconds += 10
    left.begins("residuals", "base")
    assert left.seconds() == pytest.approx(90)
    clock.seconds += 15
    assert left.seconds() == pytest.approx(75)


def test_a_step_that_takes_longer_than_planned_slows_the_rest(left: TimeLeft, clock: Clock) -> None:
    clock.seconds += 10
    left.begins("residuals", "base")
    clock.seconds += 40
    assert left.seconds() == pytest.approx(50)
    clock.seconds += 60  # as long again, and more
    told = left.seconds()
    assert told is not None
    assert 50 < told < 50 * 110 / 50


def test_time_passes_between_steps_too(left: TimeLeft, clock: Clock) -> None:
    clock.seconds += 10
    left.begins("residuals", "base")
    clock.seconds += 40
    left.ends("residuals", "base")
    clock.seconds += 7  # a checkpoint is saved
    assert left.seconds() == pytest.approx(43)


def test_it_is_never_negative(left: TimeLeft, clock: Clock) -> None:
    clock.seconds += 10_000
    told = left.seconds()
    assert told is not None
    assert told >= 0
    run(left, clock, 50.0)
    assert left.seconds() == 0


def test_a_plan_without_times_has_none_left(clock: Clock) -> None:
    unknown = TimeLeft(plan_of(line("refit", None, "full")), clock)
    unknown.begins("refit", "full")
    unknown.ends("refit", "full")
    assert unknown.seconds() is None


def test_a_plan_of_nothing_has_no_time_left(clock: Clock) -> None:
    nothing = TimeLeft(plan_of(line("old", 0.0, "full", reused=True)), clock)
    clock.seconds += 3
    assert nothing.seconds() == 0


def test_a_late_last_step_takes_what_its_own_progress_says(left: TimeLeft, clock: Clock) -> None:
    run(left, clock, 1.0)
    left.begins("answers", "full")  # of which the plan knows nothing
    left.progresses(0, 10)
    assert left.seconds() is None  # no rate yet, and no moment
    for done in range(1, 10):
        clock.seconds += 20
        left.progresses(done, 10)
        assert left.seconds() == pytest.approx(20 * (10 - done))
    clock.seconds += 15
    assert left.seconds() == pytest.approx(5)
    clock.seconds += 25  # the last answer takes long
    assert left.seconds() == pytest.approx(220 / 9)
    left.progresses(10, 10)
    assert left.seconds() == 0


def test_steps_that_follow_a_late_one_count_as_well(left: TimeLeft, clock: Clock) -> None:
    clock.seconds += 10
    left.begins("residuals", "base")
    left.progresses(0, 10)
    clock.seconds += 80
    left.progresses(4, 10)
    told = left.seconds()
    assert told is not None
    assert told >= 120 + 50  # its own, and what is planned for the others


def test_parts_of_an_earlier_run_say_nothing_of_the_rate(left: TimeLeft, clock: Clock) -> None:
    run(left, clock, 1.0)
    left.begins("answers", "full")
    left.progresses(500, 502)
    clock.seconds += 30
    left.progresses(501, 502)
    assert left.seconds() == pytest.approx(30)
    left.progresses(1, 7)  # another piece of work
    assert left.seconds() is None
