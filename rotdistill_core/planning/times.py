"""From the counts of a cost to seconds, and from seconds to words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rotdistill_core.planning.cost import Cost
from rotdistill_core.planning.rates import Profile

if TYPE_CHECKING:
    from collections.abc import Iterable

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
A_MOMENT = 2.0
"""Seconds below which a time is "a moment"."""
UNKNOWN_TIME = "its time is not known"


def seconds_by_kind(cost: Cost, profile: Profile, on_gpu: bool) -> dict[str, float]:
    """Return the seconds of a cost by kind of work, on an otherwise idle machine.

    The kinds count as if one came after the other, although a disk writes while processors compute.

    Args:
        cost: what is done, by one process.
        profile: the rates of the machine.
        on_gpu: whether models compute on a GPU.
    """
    rates = profile.gpu if on_gpu else profile.host
    # A step may add to the operations of a part without saying of which kind they are.
    plain = max(cost.operations - sum(cost.kernels.values()), 0.0)
    found = {
        "products": plain / rates.float32,
        "activations": cost.activations / rates.activations,
        "layer calls": cost.layer_calls * rates.layer_call,
        "token by token": cost.streamed_bytes / rates.streamed_bytes,
        "exact sums": cost.exact_terms / rates.exact_terms,
        "written": cost.disk_bytes / profile.written_bytes,
        "read": cost.read_bytes / profile.read_bytes,
        "copied": cost.traffic_bytes / profile.copied_bytes if on_gpu else 0.0,
    }
    for kernel, operations in cost.kernels.items():
        found[kernel] = operations / getattr(rates, kernel)
    return {kind: seconds for kind, seconds in found.items() if seconds}


def seconds_of(cost: Cost, profile: Profile, on_gpu: bool) -> float:
    """Return the seconds of a cost; see `seconds_by_kind`."""
    return sum(seconds_by_kind(cost, profile, on_gpu).values())


def added_seconds(times: Iterable[float | None]) -> float | None:
    """Return the sum of times; None if one of them is not known."""
    known = list(times)
    return None if None in known else math.fsum(filter(None, known))


def time_in_words(seconds: float | None) -> str:
    """Return a time for people, as exact as an estimate is: "about 4 minutes"."""
    if seconds is None:
        return UNKNOWN_TIME
    if seconds < A_MOMENT:
        return "a moment"
    if seconds < 1.5 * MINUTE:
        return f"about {_rounded(seconds)} seconds"
    for unit, name, most in ((MINUTE, "minutes", 1.5 * HOUR), (HOUR, "hours", 1.5 * DAY)):
        if seconds < most:
            return f"about {_rounded(seconds / unit)} {name}"
    return f"about {_rounded(seconds / DAY)} days"


def _rounded(number: float) -> int:
    """Return a number to one digit, or to the nearest multiple of five if it has two or more."""
    if number < 10:
        return max(round(number), 1)
    step = 5 * 10.0 ** (math.floor(math.log10(number)) - 1)
    return round(round(number / step) * step)
