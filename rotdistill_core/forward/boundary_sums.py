"""The sums over the fit rows of one layer boundary: what a store of moments keeps of them.

Rows come in blocks of texts (`PackedTexts.fit_blocks`). A block adds its rows divided by their RMS,
and, for students in another basis than their teacher, its rows as they are. Rows of massive
activations, position 0 and rows without a partner are left out. The null pairs rows that are half
of a block apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.forward.row_rms import (
    CHUNK_ROWS,
    massive_activation_mask,
    massive_threshold,
    rms_histogram,
    rms_normalise,
)
from rotdistill_core.linalg.paired_sums import (
    ROWS,
    SQUARES,
    PairedSums,
    RowSums,
    triangle,
)
from rotdistill_core.linalg.precision import SUM_DTYPE


class Thresholds(NamedTuple):
    """The RMS above which rows of a boundary are massive activations."""

    student: float
    teacher: float

    @classmethod
    def of(cls, S: Tensor, T: Tensor) -> Thresholds:
        """Return those of paired sample rows `S [n, d_s]`, `T [n, d_t]`."""
        return cls(*(massive_threshold(rms_histogram(X)) for X in (S, T)))

    def usable(self, S: Tensor, T: Tensor) -> Tensor:
        """Return the mask [n] of paired rows of which neither is a massive activation."""
        return ~(
            massive_activation_mask(S, self.student) | massive_activation_mask(T, self.teacher)
        )


class Kinds(NamedTuple):
    """Which sums of a boundary are kept."""

    unit: bool = True
    """Of rows divided by their RMS: C_st and its null."""
    squares: bool = False
    """C_ss and C_tt of these rows too."""
    raw: bool = False
    """C_st of rows as they are."""


class BlockRows(NamedTuple):
    """The rows of a block that count."""

    rows: Tensor
    """Their numbers in the block [n]."""
    in_layout: Tensor
    """Their numbers in the whole layout [n]."""


def rows_of_blocks(layout: PackedTexts) -> Iterator[tuple[PackedTexts, BlockRows]]:
    """Yield the blocks of texts to fit on, each with its rows that count.

    Rows of the shared prefix belong to the first block that begins with it. Position 0 is left out.
    """
    prefix_is_free = True
    for block in layout.fit_blocks():
        in_layout = block.row_indices_in(layout)
        first = 0 if prefix_is_free else block.prefix
        prefix_is_free = prefix_is_free and not block.prefix
        rows = torch.arange(first, block.rows)
        rows = rows[in_layout[rows] != 0]
        yield block, BlockRows(rows, in_layout[rows])


class BoundarySums:
    """The sums of one boundary while blocks are added."""

    def __init__(
        self,
        d_s: int,
        d_t: int,
        rows: int,
        thresholds: Thresholds,
        kinds: Kinds,
        where: str,
    ) -> None:
        """Begin with no rows.

        Args:
            d_s: width of the student's stream.
            d_t: width of the teacher's stream.
            rows: how many rows there are at most, in all blocks.
            thresholds: above them rows are left out.
            kinds: which sums to keep.
            where: names the place in errors.
        """
        # Rows have an RMS of 1 at most, and those as they are once they are divided by this.
        bound = float(max(rows, 1) * max(d_s, d_t))
        self.thresholds = thresholds
        self._scales = [_power_of_two(threshold) for threshold in thresholds]
        self._sums: dict[str, PairedSums] = {}
        if kinds.unit:
            self._sums["unit"] = PairedSums(
                d_s, d_t, bound, shuffled=True, squares=kinds.squares, where=where
            )
        if kinds.raw:
            self._sums["raw"] = PairedSums(d_s, d_t, bound, where=where)

    def add(self, S: Tensor, T: Tensor, rows: Tensor, device: torch.device) -> None:
        """Add the rows of a block that are no massive activations.

        Args:
            S: the student's stream `[m, d_s]`.
            T: the teacher's row of each `[m, d_t]`.
            rows: numbers of the block's rows that count [n].
            device: where to multiply.

        Raises:
            RotdistillError: a value is not finite.
        """
        taken = rows[self.thresholds.usable(S[rows], T[rows])]
        others = taken.roll(len(taken) // 2)
        for k in range(0, len(taken), CHUNK_ROWS):
            chunk = slice(k, k + CHUNK_ROWS)
            X, Y, Y_other = S[taken[chunk]], T[taken[chunk]], T[others[chunk]]
            X, Y, Y_other = (rows.to(device, SUM_DTYPE) for rows in (X, Y, Y_other))
            if "unit" in self._sums:
                self._sums["unit"].add(*(rms_normalise(rows) for rows in (X, Y, Y_other)))
            if "raw" in self._sums:
                student, teacher = self._scales
                self._sums["raw"].add(X / student, Y / teacher, Y_other / teacher)

    def merge(self, other: BoundarySums) -> None:
        """Add the rows of other sums of the same boundary.

        Raises:
            SumTooLarge: the two go beyond the bound together.
        """
        for kind, sums in self._sums.items():
            sums.merge(other._sums[kind])

    def combine(self, add_up: Callable[[Tensor], None], device: torch.device) -> None:
        """Add the rows of the same boundary in all other processes; see `ExactSum.combine`.

        Raises:
            SumTooLarge: together they go beyond the bound, in all processes.
        """
        for sums in self._sums.values():
            sums.combine(add_up, device)

    def value(self, kind: str) -> RowSums:
        """Return the sums of `unit` or of `raw` rows."""
        sums = self._sums[kind].value()
        return sums.scaled(*self._scales) if kind == "raw" else sums

    def values(self) -> dict[str, Tensor]:
        """Return all sums in float64 by name, for a file; see `read_sums`.

        Of symmetric ones it is a triangle.
        """
        tensors: dict[str, Tensor] = {}
        for kind in self._sums:
            value = self.value(kind)
            tensors[f"{kind}.{ROWS}"] = torch.tensor(value.rows)
            for name in self._sums[kind].names:
                tensor = getattr(value, name)
                tensors[f"{kind}.{name}"] = triangle(tensor) if name in SQUARES else tensor
        return tensors

    def state(self) -> dict[str, Tensor]:
        """Return everything as tensors by name; see `load`."""
        return {
            f"{kind}.{name}": tensor
            for kind, sums in self._sums.items()
            for name, tensor in sums.state().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: the tensors are of sums of another shape or bound.
        """
        for kind, sums in self._sums.items():
            begin = f"{kind}."
            sums.load({k.removeprefix(begin): t for k, t in tensors.items() if k.startswith(begin)})


def read_sums(tensors: Mapping[str, LazyTensor], kind: str, squares: bool) -> RowSums:
    """Return the sums of `unit` or of `raw` rows from what `BoundarySums.values` gave.

    Args:
        tensors: the stored values.
        kind: `unit` or `raw`.
        squares: whether to read C_ss and C_tt.
    """
    begin = f"{kind}."
    left_out = set() if squares else set(SQUARES)
    values = {
        name.removeprefix(begin): tensor
        for name, tensor in tensors.items()
        if name.startswith(begin) and name.removeprefix(begin) not in left_out
    }
    rows = int(values.pop(ROWS).read())
    return RowSums.of(rows, {name: tensor.read() for name, tensor in values.items()})


def _power_of_two(threshold: float) -> float:
    """Return the power of two from which a threshold is not larger; 1 for none."""
    return 2.0 ** math.ceil(math.log2(threshold)) if math.isfinite(threshold) else 1.0
