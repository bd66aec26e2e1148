"""Targets of a refit: the teacher's states in the student's basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Maps


class CapturedRows(NamedTuple):
    """The rows of some texts on which the student was captured."""

    mask: Tensor
    """Mask of these rows `[rows]`."""
    states: Tensor
    """Their states `[n, d_s]`."""


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's states at matched depths, in the basis of one student."""

    weights: Weights
    """The student before the refit; its lineage has the depth of each boundary, and the basis."""
    maps: Maps
    activations: ActivationStore
    pair: Pair

    def at(
        self, layout: PackedTexts, boundary: int, blocks: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return the targets `[rows, d_s]` of a boundary of the student, for all rows of `layout`.

        Rows are multiplied by rotations in the given blocks [n], so that their bits do not depend
        on how many rows a process has.

        A student cut from the teacher shares its basis. Otherwise the aligner's map of this
        boundary carries the teacher's rows back. A row that is paired with none of the teacher's
        keeps the student's own state: what a template writes where the student has no system
        prompt is read by every token after it.

        Raises:
            RecipeError: the bases differ, and no aligner ran before this step; or an unpaired row
                was not captured.
        """
        lineage = self.weights.lineage
        depth = lineage.depths[boundary]
        T = self.activations.teacher_states(layout, depth).double()
        if not self.pair.same:
            T = self._carried_back(T, layout, depth, blocks)
        T = self._with_own_rows(T, layout, depth)
        if lineage.basis is not None:
            T = _product(T, lineage.basis.to(T), blocks)
        return T if self.weights.dtype == torch.float64 else T.float()

    def _carried_back(
        self, T: Tensor, layout: PackedTexts, depth: int, blocks: Sequence[Tensor] | None
    ) -> Tensor:
        """Return teacher rows `[rows, d_t]` in the original student's basis `[rows, d_s]`.

        Each row gets the length of the student's own captured row: readers see directions only,
        and sinks keep their length. A row that was not captured keeps the map's length.
        """
        captured = self.activations.depths.index(depth)
        rotation = self.maps.rotation(captured)
        if rotation is None or self.pair.anchor:
            raise RecipeError(
                "writer-refit: teacher and student have different bases; "
                "put an aligner (procrustes) before this step, and no [anchor]."
            )
        T = _product(T, rotation.matrix.T.double(), blocks) / rotation.scale
        lengths = self._student_lengths(layout, captured)
        scaled = T * (lengths / T.norm(dim=-1).clamp_min(1e-12))[:, None]
        return torch.where(lengths.isnan()[:, None], T, scaled)

    def _with_own_rows(self, T: Tensor, layout: PackedTexts, depth: int) -> Tensor:
        """Return targets `[rows, d_s]` in which unpaired rows are the student's own.

        Raises:
            RecipeError: one of these rows was not captured.
        """
        unpaired = ~self.activations.paired_mask(layout)
        if not unpaired.any():
            return T
        captured = self._captured(layout, self.activations.depths.index(depth))
        if captured.states.shape[1] != T.shape[1] or not captured.mask[unpaired].all():
            raise RecipeError(
                "writer-refit: some rows of the student's texts have no row of the teacher, and "
                "the student was not captured on them; capture it on all texts: leave out "
                "student_texts of the capture."
            )
        own = torch.zeros_like(T)
        own[captured.mask] = captured.states.to(T)
        return torch.where(unpaired[:, None], own, T)

    def _student_lengths(self, layout: PackedTexts, boundary: int) -> Tensor:
        """Return the norm of the student's captured row for each row of `layout`, or NaN."""
        captured = self._captured(layout, boundary)
        lengths = torch.full((layout.rows,), torch.nan, dtype=torch.float64)
        lengths[captured.mask] = captured.states.double().norm(dim=-1)
        return lengths

    def _captured(self, layout: PackedTexts, boundary: int) -> CapturedRows:
        """Return the student's captured rows among those of `layout`."""
        student = self.activations.layouts[Side.STUDENT]
        wanted = frozenset(layout.texts)
        texts = tuple(text for text in student.texts if text in wanted)
        # A process whose texts are all plain has no row of the shared prompt.
        common = replace(student, texts=texts, prefix=student.prefix if layout.prefix else 0)
        place = torch.full((layout.rows,), -1)
        place[common.row_indices_in(layout)] = common.row_indices_in(student)
        mask = place >= 0
        return CapturedRows(mask, self.activations.rows(Side.STUDENT, boundary)[place[mask]])

    def reached_by_student(self, samples: Samples, boundary: int) -> bool:
        """Whether the student's stream is still the teacher's at a boundary, on two texts.

        Then the layers before that boundary need no forward pass.
        """
        student = self.pair.student
        forward = LayerwiseForward(
            self.weights,
            samples.layout.select(Split.VALIDATION, limit=2),
            student.device,
            student.dtype,
        )
        for i in forward:
            if i == boundary:
                break
            forward.run()
        target = self.at(forward.layout, boundary)
        distance = (forward.states.to(target) - target).norm()
        return bool(distance <= 1e-3 * target.norm())


def _product(T: Tensor, M: Tensor, blocks: Sequence[Tensor] | None) -> Tensor:
    """Return `T M` for `T [rows, d]` and `M [d, e]`, block of rows by block of rows."""
    if blocks is None:
        return T @ M
    product = T.new_empty(len(T), M.shape[1])
    for rows in blocks:
        product[rows] = T[rows] @ M
    return product
