"""Sums over paired rows, which are all that an alignment of two streams needs.

Rows are added some at a time. The sums are exact (`ExactSum`), so blocks of texts may be added in
any order and by any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotdistill_core.linalg.exact import ExactState, ExactSum

ROWS = "rows"
"""Name of the number of rows among the tensors of a sum."""
SQUARES = {"C_ss": "student_sum", "C_tt": "teacher_sum"}
"""Symmetric sums, of which one triangle is kept -> the sum that has their width."""


def triangle(square: Tensor) -> Tensor:
    """Return the upper triangle `[d (d + 1) / 2]` of a symmetric matrix `[d, d]`, row by row."""
    rows, columns = torch.triu_indices(*square.shape, device=square.device)
    return square[rows, columns]


def square_of(triangle: Tensor, width: int) -> Tensor:
    """Return the symmetric matrix `[d, d]` that has an upper triangle `[d (d + 1) / 2]`."""
    rows, columns = torch.triu_indices(width, width)
    square = triangle.new_empty(width, width)
    square[rows, columns] = triangle
    square[columns, rows] = triangle
    return square


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Uncentred sums over paired rows x_s `[n, d_s]` and x_t `[n, d_t]`, float64, on the host."""

    rows: int
    """n."""
    C_st: Tensor
    """`Σ x_sᵀ x_t [d_s, d_t]`."""
    C_st_shuffled: Tensor
    """The null: the same, each student row paired with another row of the teacher; zero where
    nobody asked for it."""
    C_ss: Tensor
    """`Σ x_sᵀ x_s [d_s, d_s]`; zero where nobody asked for it."""
    C_tt: Tensor
    """`Σ x_tᵀ x_t [d_t, d_t]`; zero where nobody asked for it."""
    student_sum: Tensor
    """`Σ x_s [d_s]`."""
    teacher_sum: Tensor
    """`Σ x_t [d_t]`."""
    student_energy: Tensor
    """`Σ ‖x_s‖²`, a number."""

    @classmethod
    def of(cls, rows: int, tensors: Mapping[str, Tensor]) -> RowSums:
        """Return sums by name, of C_ss and C_tt a triangle; these and the null may be missing."""
        d_s, d_t = tensors["C_st"].shape
        squares = {
            name: square_of(tensors[name], len(tensors[of_width]))
            for name, of_width in SQUARES.items()
            if name in tensors
        }
        shapes = {"C_st_shuffled": (d_s, d_t), "C_ss": (d_s, d_s), "C_tt": (d_t, d_t)}
        # Views of one number take no memory.
        zero = torch.zeros((), dtype=torch.float64)
        zeros = {name: zero.expand(shape) for name, shape in shapes.items()}
        return cls(rows=rows, **{**zeros, **tensors, **squares})

    def scaled(self, student: float, teacher: float) -> RowSums:
        """Return the sums of rows that are so many times as long; powers of two are exact."""
        return replace(
            self,
            C_st=self.C_st * (student * teacher),
            C_st_shuffled=self.C_st_shuffled * (student * teacher),
            C_ss=self.C_ss * student**2,
            C_tt=self.C_tt * teacher**2,
            student_sum=self.student_sum * student,
            teacher_sum=self.teacher_sum * teacher,
            student_energy=self.student_energy * student**2,
        )


class PairedSums:
    """The sums of `RowSums` while rows are added; of symmetric ones a triangle.

    The bound comes from the problem: n rows of RMS 1 and width d at most add up to `n d`.
    """

    def __init__(
        self,
        d_s: int,
        d_t: int,
        bound: float,
        *,
        shuffled: bool = False,
        squares: bool = False,
        where: str = "sums",
    ) -> None:
        """Begin with no rows.

        Args:
            d_s: width of the student's rows.
            d_t: width of the teacher's rows.
            bound: what `Σ max(‖x_s‖², ‖x_t‖²)` is at most. No entry of a sum is larger.
            shuffled: whether to keep the null, C_st_shuffled.
            squares: whether to keep C_ss and C_tt.
            where: names the place in errors.

        Raises:
            ValueError: no sum can have this bound.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "C_st": (d_s, d_t),
            "student_sum": (d_s,),
            "teacher_sum": (d_t,),
            "student_energy": (),
        }
        if shuffled:
            shapes["C_st_shuffled"] = (d_s, d_t)
        if squares:
            shapes |= {"C_ss": (d_s * (d_s + 1) // 2,), "C_tt": (d_t * (d_t + 1) // 2,)}
        self._where = where
        self._rows = 0
        self._sums = {
            name: ExactSum(shape, bound, f"{where}, {name}") for name, shape in shapes.items()
        }

    def add(self, S: Tensor, T: Tensor, T_other: Tensor) -> None:
        """Add rows `S [n, d_s]`, `T [n, d_t]`, float64, on one device.

        Args:
            S: the student's rows.
            T: the teacher's row of each.
            T_other: teacher rows of other tokens `[n, d_t]`, for the null.

        Raises:
            RotdistillError: a sum is not finite or beyond the bound. The sums then hold a part of
                these rows and are of no further use.
        """
        products = {
            "C_st": lambda: S.T @ T,
            "C_st_shuffled": lambda: S.T @ T_other,
            "C_ss": lambda: triangle(S.T @ S),
            "C_tt": lambda: triangle(T.T @ T),
            "student_sum": lambda: S.sum(0),
            "teacher_sum": lambda: T.sum(0),
            "student_energy": lambda: S.pow(2).sum(),
        }
        for name, total in self._sums.items():
            total.add(products[name]())
        self._rows += len(S)

    def merge(self, other: PairedSums) -> None:
        """Add the rows of other sums of the same kind.

        Raises:
            RotdistillError: the two go beyond the bound together.
            ValueError: they are not of one kind, or have different bounds.
        """
        if self._sums.keys() != other._sums.keys():
            raise ValueError(f"{self._where}: sums of different kinds are not one sum.")
        for name, total in self._sums.items():
            total.merge(other._sums[name])
        self._rows += other._rows

    def combine(self, add_up: Callable[[Tensor], None], device: torch.device) -> None:
        """Add the rows of the same sums in all other processes; see `ExactSum.combine`.

        Raises:
            SumTooLarge: together they go beyond the bound, in all processes.
        """
        for total in self._sums.values():
            total.combine(add_up, device)
        rows = torch.tensor([self._rows])
        add_up(rows)
        self._rows = int(rows)

    def value(self) -> RowSums:
        """Return the sums in float64, on the host."""
        values = {name: total.value() for name, total in self._sums.items()}
        return RowSums.of(self._rows, values)

    @property
    def names(self) -> list[str]:
        """Names of the sums that are kept, as in `RowSums`."""
        return list(self._sums)

    def state(self) -> dict[str, Tensor]:
        """Return everything as int64 tensors by name, to be stored at once; see `load`."""
        tensors = {ROWS: torch.tensor(self._rows)}
        for name, total in self._sums.items():
            state = total.state(copy=False)
            tensors[name] = state.limbs
            tensors[f"{name}.about"] = torch.tensor([state.scale, state.terms, state.size])
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; what was added before is forgotten.

        Raises:
            ValueError: the tensors are of sums of another shape or bound.
        """
        restored = {}
        for name, total in self._sums.items():
            scale, terms, size = tensors[f"{name}.about"].tolist()
            state = ExactState(tensors[name], scale, terms, size)
            empty = total.state(copy=False)
            if (empty.scale, empty.limbs.shape) != (scale, state.limbs.shape):
                raise ValueError(f"{self._where}: the stored sums have another shape or bound.")
            restored[name] = ExactSum.restore(state, f"{self._where}, {name}")
        self._sums = restored
        self._rows = int(tensors[ROWS])
