"""One parameter of a merge, computed in blocks of rows from tensors that lie memory-mapped on disk.

Sums are float32, and there is one rounding at the end. Whatever the number of ingredients, memory
holds the parameter that is made and a few blocks.
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

Rows = Callable[[int, int], Tensor]
"""Returns rows [a, b) of a parameter."""
Kernel = Callable[[Sequence[Rows], int, int, Tensor], Tensor]
"""Computes rows [a, b) of a merged parameter.

Arguments: the parameter in each part, the student first; a and b; the coefficients of the parts
`[n + 1, b - a]`, or `[n + 1, 1]` where all rows have the same.
"""


@dataclass(frozen=True)
class Ingredient:
    """A model that is merged: a view with the student's names and shapes."""

    name: str
    """As the recipe names it."""
    view: Weights
    special: Mapping[str, Rows]
    """Parameter -> its rows, where they are not those of a stored tensor."""
    absent: Tensor | None = None
    """Mask of student tokens that the ingredient lacks `[vocab]`; there its view has the student's
    rows."""

    def open(self, name: str) -> Rows:
        """Return the rows of one parameter."""
        return self.special[name] if name in self.special else rows_of(self.view[name])


def rows_of(tensor: Tensor) -> Rows:
    """Return the rows of a tensor at hand."""

    def read(a: int, b: int) -> Tensor:
        return tensor[a:b]

    return read


@dataclass(frozen=True)
class Mixture:
    """How one parameter is made."""

    name: str
    parts: Sequence[Ingredient]
    """The student, and what is merged."""
    coefficients: Tensor
    """One for each part `[n + 1]`, float64."""
    is_mean: bool
    """Whether the coefficients are shares of a mean.

    Then the share of an ingredient that lacks a token goes to the others, else to the student.
    """
    kernel: Kernel

    def lazily(self, shape: tuple[int, ...], dtype: torch.dtype, vocabulary: bool) -> LazyTensor:
        """Return the parameter, computed when read. `vocabulary`: its rows are tokens."""

        def read() -> Tensor:
            merged = torch.empty(shape, dtype=dtype)
            opened = [part.open(self.name) for part in self.parts]
            for a, b in blocks(shape):
                coefficients = self._coefficients(a, b, vocabulary)
                block = self.kernel(opened, a, b, coefficients)
                if not torch.isfinite(block.sum()):
                    self._require_finite(opened, a, b)
                merged[a:b] = block
            return merged

        return LazyTensor(shape, dtype, read)

    def _coefficients(self, a: int, b: int, vocabulary: bool) -> Tensor:
        """Return the coefficients of rows [a, b): `[n + 1, b - a]`, or `[n + 1, 1]` where alike."""
        absent = {
            k: part.absent[a:b]
            for k, part in enumerate(self.parts)
            if vocabulary and part.absent is not None
        }
        if not any(bool(rows.any()) for rows in absent.values()):
            return self.coefficients[:, None]
        shares = self.coefficients[:, None].repeat(1, b - a)
        for k, rows in absent.items():
            shares[k, rows] = 0.0
        total, left = self.coefficients.sum(), shares.sum(0)
        if self.is_mean:
            # Scale the remaining shares up to the old total; where none remain the student has all.
            shares *= torch.where(left != 0, total / torch.where(left != 0, left, 1.0), 0.0)
            shares[0, left == 0] = total
        else:
            shares[0] += total - left
        return shares

    def _require_finite(self, opened: Sequence[Rows], a: int, b: int) -> None:
        for part, rows in zip(self.parts, opened, strict=True):
            bad = int((~torch.isfinite(rows(a, b))).sum())
            if bad:
                raise SetupError(
                    f"soups: {part.name}: {self.name} has {bad} values that are NaN or Inf in rows "
                    f"{a} to {b - 1}, and would spoil the soup. Nothing was merged; leave the "
                    "ingredient out, or save it again from a run that did not diverge."
                )


def blocks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return ranges of rows [a, b) of about `BLOCK` entries."""
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return [(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]


def upcast(X: Tensor) -> Tensor:
    """Return a block in the dtype of sums: float32, or float64 where it is that already."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def along_rows(coefficient: Tensor, X: Tensor) -> Tensor:
    """Return coefficients `[rows or 1]` in the shape and dtype that multiplies the rows of X."""
    return coefficient.to(X).reshape(-1, *[1] * (X.ndim - 1))
