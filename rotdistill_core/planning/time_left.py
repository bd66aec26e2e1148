"""The time that a run still takes: what its plan says of the rest, at the pace of what is done."""

from __future__ import annotations

import time
from collections.abc import Callable

from rotdistill_core.planning.plan import Plan, PlanLine
from rotdistill_core.planning.times import A_MOMENT

PRIOR = 0.1
"""Share of the whole time that the plan's own pace counts for: a first short step says little."""


class TimeLeft:
    """The time that is left of a run, from the events of its observers.

    At the start it is the time of the plan. What is finished gives the pace: the seconds that it
    took, divided by those that were planned. Work that takes longer than planned counts as if it
    were finished now, unless its own progress says how much of it is left.

    Args:
        planned: the plan of the run.
        now: the clock, seconds.
    """

    def __init__(self, planned: Plan, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = self._event = now()
        self._total = planned.totals.seconds
        """None if the plan does not know it."""
        self._waiting: dict[tuple[str, str], PlanLine] = {
            (line.id, variant): line for line in planned.todo for variant in line.variants
        }
        """Id and variant -> a result that has to be made. Variants share a line and its result."""
        # Results without a variant are made before the first step.
        before = [line for line in planned.todo if not line.variants]
        self._done = 0.0
        """Planned seconds of what is finished."""
        self._current = sum(map(_seconds, before)) + (planned.loading or 0.0)
        """Planned seconds of what is at work; 0 if that is not known."""
        self._is_before = True
        self._count: Count | None = None
        """How far the work has come, as it says itself; None if it has not said so."""

    def begins(self, step_id: str, variant: str) -> None:
        """Take that a step begins."""
        if self._is_before:
            self._done, self._is_before = self._current, False
        self._count = None
        self._event = self._now()
        self._current = _seconds(self._waiting.get((step_id, variant)))

    def progresses(self, done: int, total: int) -> None:
        """Take how far the work has come: parts that are done, and all of them."""
        if not self._count or not self._count.goes_on(done, total):
            self._count = Count(done, total, self._now())
        self._count.take(done, self._now())

    def ends(self, result: str, variant: str) -> None:
        """Take that a step, or a checkpoint, of a variant is made or was found."""
        self._count = None
        self._event = self._now()
        self._current = 0.0
        line = self._waiting.get((result, variant))
        if line:
            self._done += _seconds(line)
            self._waiting = {key: each for key, each in self._waiting.items() if each is not line}

    def seconds(self) -> float | None:
        """Return the seconds that are left.

        None if the plan does not know how long the run takes, or if work that is not finished takes
        longer than planned and has not shown how fast it is.
        """
        if self._total is None:
            return None
        planned = self._planned_seconds(self._total)
        if self._count is None or self._count.is_over:
            return planned
        now = self._now()
        counted = self._count.seconds(now)
        if counted is None:
            is_late = now - self._event > self._current and planned < now - self._count.began
            return None if is_late or planned < A_MOMENT else planned
        pace = self._pace(self._event - self._began, self._done)
        return max(planned, counted + pace * max(self._total - self._done - self._current, 0.0))

    def _planned_seconds(self, total: float) -> float:
        """Return the seconds that are left according to the plan and the pace, total planned."""
        at_work = self._now() - self._event
        took, done = self._event - self._began, self._done
        if self._current and at_work > self._current:
            took, done = took + at_work, done + self._current
            return max(self._pace(took, done) * (total - done), 0.0)
        pace, rest = self._pace(took, done), total - done
        # Between two steps a checkpoint is saved, or something found: no event says so.
        return max(pace * rest - min(at_work, pace * (self._current or rest)), 0.0)

    def _pace(self, took: float, done: float) -> float:
        """Return how many seconds a planned second takes."""
        prior = PRIOR * (self._total or 0.0)
        return (took + prior) / (done + prior) if done + prior else 1.0


class Count:
    """How far one piece of work has come, and how fast.

    Args:
        done: parts that are done, some perhaps by an earlier run.
        total: all parts.
        now: seconds.
    """

    def __init__(self, done: int, total: int, now: float) -> None:
        self._first = self._done = done
        self._total = total
        self.began = self._last = now

    def goes_on(self, done: int, total: int) -> bool:
        """Return whether such a progress is of the same piece of work."""
        return total == self._total and done >= self._done

    def take(self, done: int, now: float) -> None:
        """Take a progress."""
        if done > self._done:
            self._done, self._last = done, now

    @property
    def is_over(self) -> bool:
        """Whether all parts are done."""
        return self._done >= self._total

    @property
    def rate(self) -> float | None:
        """The parts that are made in a second; None before one was made."""
        made, took = self._done - self._first, self._last - self.began
        return made / took if made and took > 0 else None

    def seconds(self, now: float) -> float | None:
        """Return the seconds that the parts take which are left; None before one was made."""
        made, left = self._done - self._first, self._total - self._done
        if not made:
            return None
        each, waited = (self._last - self.began) / made, now - self._last
        if waited > each:  # this part takes longer than the others
            return left * (now - self.began) / made
        return left * each - waited


def _seconds(line: PlanLine | None) -> float:
    return (line.seconds or 0.0) if line else 0.0
