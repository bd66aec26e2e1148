"""One parameter of a soup at a time, in blocks of rows: float32 sums of what lies memory-mapped on disk, and one rounding at the end.

Whatever the number of ingredients, memory holds the parameter that is made and a few blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import SetupError

BLOCK = 1 << 19
"""Entries of a block: sums stay in the processor's cache."""
FLOOR = 1e-30
"""Added to every Fisher information."""
PARALLEL = 0.9995
"""Cosine beyond which slerp is taken along the straight line (mergekit's default)."""

Rows = Callable[[int, int], Tensor]
"""Rows [a, b) of a parameter."""


@dataclass(frozen=True)
class Ingredient:
    """What goes into a soup: a view with the student's names and shapes."""

    name: str
    """As the recipe names it."""
    view: Weights
    special: Mapping[str, Rows]
    """Parameter -> its rows, where they are not those of a stored tensor."""
    absent: Tensor | None = None
    """Rows of the student's vocabulary that the ingredient has no token for [vocab]; there its view has the student's."""

    def open(self, name: str) -> Rows:
        """Return the rows of one parameter."""
        if name in self.special:
            return self.special[name]
        tensor = self.view[name]
        return lambda a, b: tensor[a:b]


Mixer = Callable[[Sequence[Rows], int, int, Tensor], Tensor]
"""From the opened parts, the student first, a range of rows and the parts' coefficients `[n + 1, rows or 1]`: those rows of the soup."""


@dataclass(frozen=True)
class Mixture:
    """How one parameter is made."""

    name: str
    parts: Sequence[Ingredient]
    """The student, and what is merged."""
    coefficients: Tensor
    """Of each of the parts [n + 1]."""
    means: bool
    """Coefficients are shares of a mean: what an ingredient without a token does not take, the others do. Else the student does."""
    mix: Mixer

    def entry(self, shape: tuple[int, ...], dtype: torch.dtype, vocabulary: bool) -> LazyTensor:
        """Return the parameter as an entry that is computed when read; `vocabulary`: its rows are tokens."""

        def read() -> Tensor:
            made = torch.empty(shape, dtype=dtype)
            opened = [part.open(self.name) for part in self.parts]
            for a, b in blocks(shape):
                block = self.mix(opened, a, b, self._shares(a, b, vocabulary))
                if not torch.isfinite(block.sum()):
                    self._blame(opened, a, b)
                made[a:b] = block
            return made

        return LazyTensor(shape, dtype, read)

    def _shares(self, a: int, b: int, vocabulary: bool) -> Tensor:
        """Return the coefficients of rows [a, b), `[n + 1, b - a]`, or `[n + 1, 1]` where all have them."""
        gone = [
            None if part.absent is None or not vocabulary else part.absent[a:b]
            for part in self.parts
        ]
        if not any(g is not None and bool(g.any()) for g in gone):
            return self.coefficients[:, None]
        shares = self.coefficients[:, None].repeat(1, b - a)
        for k, g in enumerate(gone):
            if g is not None:
                shares[k, g] = 0.0
        total, left = self.coefficients.sum(), shares.sum(0)
        if self.means:
            shares *= torch.where(left != 0, total / torch.where(left != 0, left, 1.0), 0.0)
            shares[0, left == 0] = total
        else:
            shares[0] += total - left
        return shares

    def _blame(self, opened: Sequence[Rows], a: int, b: int) -> None:
        for part, rows in zip(self.parts, opened, strict=True):
            bad = int((~torch.isfinite(rows(a, b))).sum())
            if bad:
                raise SetupError(
                    f"soups: {part.name}: {self.name} has {bad} values that are NaN or Inf in rows {a} to {b - 1}, and would spoil the "
                    "soup. Nothing was merged; leave the ingredient out, or save it again from a run that did not diverge."
                )


def blocks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return ranges of rows of about `BLOCK` entries."""
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return [(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]


def wide(X: Tensor) -> Tensor:
    """Return a block in the dtype of sums: float32, or float64 where it is that already."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def along_rows(coefficient: Tensor, X: Tensor) -> Tensor:
    """Return coefficients `[rows or 1]` so that they multiply the rows of X."""
    return coefficient.to(X).reshape(-1, *[1] * (X.ndim - 1))


def line(opened: Sequence[Rows], a: int, b: int, shares: Tensor) -> Tensor:
    """Return `Σ c_i x_i`: means, task arithmetic, slerp. What has no share is not read."""
    total: Tensor | None = None
    for rows, share in zip(opened, shares, strict=True):
        if not bool(share.any()):
            continue
        X = rows(a, b)
        if total is None:
            total = wide(X) * along_rows(share, wide(X[:0]))
        elif len(share) == 1:
            total = total.add_(X, alpha=float(share))
        else:
            total = total.addcmul_(wide(X), along_rows(share, total))
    return wide(opened[0](a, b)) if total is None else total


def weighted(precision: Sequence[Rows]) -> Mixer:
    """Return the mixer `Σ c_i F_i x_i / Σ c_i F_i` for diagonal Fisher informations F_i, the student's first.

    (Matena and Raffel, Merging Models with Fisher-Weighted Averaging, arXiv:2111.09832.) Where nobody's information says anything
    it is the plain mean.
    """

    def mix(opened: Sequence[Rows], a: int, b: int, shares: Tensor) -> Tensor:
        some = [
            (rows, F, share)
            for rows, F, share in zip(opened, precision, shares, strict=True)
            if bool(share.any())
        ]
        blocks = [wide(rows(a, b)) for rows, _, _ in some]
        weights = [
            along_rows(share, X) * (F(a, b).to(X) + FLOOR)
            for X, (_, F, share) in zip(blocks, some, strict=True)
        ]
        return torch.stack([W * X for W, X in zip(weights, blocks, strict=True)]).sum(
            0
        ) / torch.stack(weights).sum(0)

    return mix


def slerp(name: str, one: Ingredient, two: Ingredient, t: float) -> tuple[float, float]:
    """Return the coefficients of spherical interpolation between two parameters, seen as vectors.

    (Shoemake, Animating Rotation with Quaternion Curves, 1985.) Nearly parallel ones are mixed along the straight line.
    """
    A, B = one.open(name), two.open(name)
    dot = a2 = b2 = 0.0
    for a, b in blocks(one.view.entries[name].shape):
        x, y = (wide(rows(a, b)).flatten() for rows in (A, B))
        dot, a2, b2 = dot + float(x @ y), a2 + float(x @ x), b2 + float(y @ y)
    cosine = max(-1.0, min(1.0, dot / max(math.sqrt(a2 * b2), 1e-30)))
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def trimmed(name: str, base: Ingredient, part: Ingredient, density: float) -> float:
    """Return the magnitude from which on a share `density` of `part - base` is kept, exactly, in two passes and no sorting.

    Floats of one sign are ordered as their bits are: a histogram of the upper 16 bits finds the bin, one of the lower 16 the value.
    """
    shape = base.view.entries[name].shape
    wanted = max(1, int(density * math.prod(shape)))
    S, X = base.open(name), part.open(name)
    found = 0
    for low in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.long)
        for a, b in blocks(shape):
            bits = (X(a, b).float() - S(a, b).float()).abs_().flatten().view(torch.int32)
            if low == 0:
                bits = bits[bits >> 16 == found >> 16]
            counts += torch.bincount((bits >> low) & 0xFFFF, minlength=1 << 16)
        above = counts.flip(0).cumsum(0).flip(0)  # how many are in this bin or above it
        there = int((above >= wanted).nonzero().max())
        wanted -= int(above[there] - counts[there])
        found |= there << low
    return float(torch.tensor(found, dtype=torch.int32).view(torch.float32))


def elected(thresholds: Sequence[float], strength: float) -> Mixer:
    """Return the mixer of TIES: trim each difference from the student, elect a sign per entry, and average those that agree.

    (Yadav et al., TIES-Merging, arXiv:2306.01708; trimmed parameter by parameter.)
    """

    def mix(opened: Sequence[Rows], a: int, b: int, shares: Tensor) -> Tensor:
        start = wide(opened[0](a, b))
        deltas = []
        for rows, share, least in zip(opened[1:], shares[1:], thresholds, strict=True):
            delta = wide(rows(a, b)) - start
            deltas.append((along_rows(share, delta), delta.masked_fill_(delta.abs() < least, 0.0)))
        sign = torch.stack([c * delta for c, delta in deltas]).sum(0) >= 0
        above, below = torch.zeros_like(start), torch.zeros_like(start)
        for c, delta in deltas:
            agree = ((c * delta > 0) & sign) | ((c * delta < 0) & ~sign)
            above.addcmul_(delta * agree, c)
            below.addcmul_(agree.to(start), c)
        return start + strength * above / torch.where(below != 0, below, 1.0)

    return mix
