"""Sums of float64 tensors that do not depend on the order of their terms.

A float64 sum changes its last bits with the order and the grouping of its terms, and so with the
number of processes that share the work. Here each term is written in fixed point, as two int64
limbs, before it is added. Integers add up to the same bits in any order and any grouping.

Fixed point: a term `m` becomes `hi + lo · 2^-40` in units of `2^-scale`, with `hi` the integer
part and `|lo| <= 2^40`. A term of at least `2^12` units is kept bit by bit, because a float64 of
that size has no digit below `2^-40`. Smaller terms are off by at most `2^-41` units. With `scale`
from the bound B of the sum, the first are all terms above `2^-48 B`, and the others are off by less
than `2^-100 B`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rotdistill_core.errors import RotdistillError
from rotdistill_core.linalg.precision import SUM_DTYPE, sum_device
from rotdistill_core.linalg.solvers import require_finite

LOW_BITS = 40
"""Binary digits of the lower limb."""
HIGH_BITS = 62
"""The terms of the upper limb add up to at most `2^62` in size: no partial sum leaves an int64."""
MAX_TERMS = 1 << 22
"""Terms of a sum. The lower limbs of so many add up to at most `2^62`."""
MAX_EXPONENT = 900
"""Bounds between `2^-900` and `2^900` have a unit that float64 can hold."""


CHUNK = 1 << 16
"""Entries that are written in fixed point at once on a CPU: what fits its caches."""
SIZE_DIGITS = 31
"""Binary digits of the halves in which processes tell each other the size of their terms."""


class SumTooLarge(RotdistillError):
    """The terms of an exact sum are larger than its bound allows."""


class Sum(Protocol):
    """A sum of tensors of one shape."""

    def add(self, term: Tensor) -> None:
        """Add a tensor, on its device."""

    def value(self) -> Tensor:
        """Return the sum in float64, on the host."""


class FloatSum:
    """A sum in float64, whose last bits depend on the order of its terms."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._total = torch.zeros(tuple(shape), dtype=SUM_DTYPE)

    @classmethod
    def of(cls, total: Tensor) -> FloatSum:
        """Return the sum of one term."""
        one = cls(())
        one._total = total
        return one

    def add(self, term: Tensor) -> None:
        """Add a tensor. The sum moves to its device, or to the host without float64."""
        self._total = self._total.to(sum_device(term.device))
        self._total += term.to(self._total)

    def value(self) -> Tensor:
        """Return the sum in float64, on the host."""
        self._total = self._total.cpu()
        return self._total


@dataclass(frozen=True)
class ExactState:
    """All of an `ExactSum`, to be stored or sent. States of one scale add up field by field."""

    limbs: Tensor
    """`[2, *shape]`, int64: upper and lower limbs, on the host."""
    scale: int
    """The unit is `2^-scale`."""
    terms: int
    """Number of terms."""
    size: int
    """Upper bound of what the upper limbs of the terms add up to in size."""


class ExactSum:
    """A sum in fixed point: the same bits in any order and any grouping of its terms.

    The bound has to be the same wherever parts of one sum are added up, so it comes from the
    problem and not from the data: n rows of width d and RMS 1 have products of at most `n d`.
    """

    def __init__(self, shape: Sequence[int], bound: float, where: str = "sum") -> None:
        """Begin an empty sum.

        Args:
            shape: of all terms.
            bound: what the largest entries of all terms add up to in size, at most.
            where: names the place in errors.

        Raises:
            ValueError: the bound is not a positive number between `2^-900` and `2^900`.
        """
        exponent = math.frexp(bound)[1] if bound > 0 and math.isfinite(bound) else None
        if exponent is None or abs(exponent) > MAX_EXPONENT:
            raise ValueError(f"{where}: no sum can have the bound {bound}.")
        # One digit is left for what rounding adds, and for a bound that is close.
        self._begin(torch.zeros(2, *shape, dtype=torch.int64), HIGH_BITS - 1 - exponent, where)

    def _begin(self, limbs: Tensor, scale: int, where: str) -> None:
        self._limbs = limbs
        self._scale = scale
        self._where = where
        self._terms = 0
        self._size = 0

    def add(self, term: Tensor) -> None:
        """Add a tensor of the shape of the sum; the sum moves to its device.

        Raises:
            RotdistillError: a value is NaN or Inf. The sum stays as it was.
            SumTooLarge: the sum could leave its limbs. It stays as it was.
            ValueError: the shape is another.
        """
        if term.shape != self._limbs.shape[1:]:
            raise ValueError(
                f"{self._where}: a term of shape {tuple(term.shape)} in a sum of shape "
                f"{tuple(self._limbs.shape[1:])}."
            )
        size = self._size_of(term)
        self._require_room(1, size)
        device = sum_device(term.device)
        self._limbs = self._limbs.to(device)
        values = term.to(device).reshape(-1)
        high, low = self._limbs.view(2, -1)
        for part in _chunks(len(values), device):
            # Exact: a power of two changes only the exponent.
            scaled = values[part].to(SUM_DTYPE) * 2.0**self._scale
            high[part] += scaled.to(torch.int64)  # the integer part
            # Exact: these are the digits of `scaled` after the point.
            scaled.frac_().mul_(2.0**LOW_BITS).round_()
            low[part] += scaled.to(torch.int64)
        self._terms += 1
        self._size += size

    def _size_of(self, term: Tensor) -> int:
        """Return what the largest entry of a term is at most, in units of the upper limb."""
        if not term.numel():
            return 1
        low, high = map(float, term.aminmax())
        if not math.isfinite(low + high):
            require_finite(term, self._where)
        largest = max(-low, high) * 2.0**self._scale
        # What is Inf in these units has no size; it needs more room than there is.
        return math.ceil(largest) + 1 if math.isfinite(largest) else (1 << HIGH_BITS) + 1

    def merge(self, other: ExactSum) -> None:
        """Add the terms of another sum.

        Raises:
            SumTooLarge: the two together could leave their limbs. The sum stays as it was.
            ValueError: the two have different shapes or bounds.
        """
        if (self._limbs.shape, self._scale) != (other._limbs.shape, other._scale):
            raise ValueError(f"{self._where}: sums of different shapes or bounds are not one sum.")
        self._require_room(other._terms, other._size)
        self._limbs += other._limbs.to(self._limbs.device)
        self._terms += other._terms
        self._size += other._size

    def combine(self, add_up: Callable[[Tensor], None], device: torch.device) -> None:
        """Add the terms of the same sum in all other processes.

        Args:
            add_up: replaces an int64 tensor by the sum of those of all processes.
            device: where that is done; the same kind in all processes.

        Raises:
            SumTooLarge: all terms together could leave their limbs. It is raised in all processes,
                and the sum is of no further use.
        """
        high, low = divmod(self._size, 1 << SIZE_DIGITS)
        counts = torch.tensor([self._terms, high, low])
        add_up(counts)
        self._terms, high, low = map(int, counts.tolist())
        self._size = (high << SIZE_DIGITS) + low
        self._require_room(0, 0)
        self._limbs = self._limbs.to(sum_device(device))
        add_up(self._limbs)

    def _require_room(self, terms: int, size: int) -> None:
        """Raise unless so many terms of this size in all fit into the limbs."""
        if self._size + size > 1 << HIGH_BITS:
            raise SumTooLarge(
                f"{self._where}: the terms are larger than the bound of their exact sum allows; "
                f"the largest sum is {2.0 ** (HIGH_BITS - self._scale):.3g}. Nothing was added."
            )
        if self._terms + terms > MAX_TERMS:
            raise RotdistillError(
                f"{self._where}: an exact sum takes {MAX_TERMS:,} terms at most; nothing was added."
            )

    def value(self) -> Tensor:
        """Return the sum in float64, on the host, with a relative error of at most 2.3e-16.

        It is a function of the limbs' integer alone, so it has the same bits wherever that has.
        """
        limbs = self._limbs.cpu()
        high, low = limbs.view(2, -1)
        value = torch.empty(limbs.shape[1:], dtype=SUM_DTYPE)
        for part in _chunks(len(low), limbs.device):
            hi, lo = high[part], low[part]
            # Carry what the lower limb has above its digits. Then its rest is exact in float64.
            carry = (lo + (1 << (LOW_BITS - 1))) >> LOW_BITS
            rest = lo - (carry << LOW_BITS)
            units = (hi + carry).to(SUM_DTYPE) + rest.to(SUM_DTYPE) * 2.0**-LOW_BITS
            value.view(-1)[part] = units * 2.0**-self._scale
        return value

    def state(self, copy: bool = True) -> ExactState:
        """Return everything, on the host; without `copy` limbs on the host are those of the sum."""
        limbs = self._limbs.to("cpu", copy=copy)
        return ExactState(limbs, self._scale, self._terms, self._size)

    @classmethod
    def restore(cls, state: ExactState, where: str = "sum") -> ExactSum:
        """Return the sum that `state` described; further terms can be added to it."""
        restored = cls.__new__(cls)
        restored._begin(state.limbs.clone(), state.scale, where)
        restored._terms = state.terms
        restored._size = state.size
        return restored


def _chunks(entries: int, device: torch.device) -> Iterator[slice]:
    """Yield the entries that are handled at once: all on a GPU, what fits the caches on a CPU."""
    step = CHUNK if device.type == "cpu" else max(entries, 1)
    for k in range(0, entries, step):
        yield slice(k, k + step)
