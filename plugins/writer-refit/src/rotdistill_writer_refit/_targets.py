"""Targets of a refit: the teacher's states in the student's basis.

At a boundary a target is what the teacher's stream has at the matched depth, carried into the basis
of the student. It is computed for a batch of rows when that is asked for, so it takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.linalg.precision import float64_device
from rotdistill_writer_refit._beside import StoredRows, Walk, paired_mask


@dataclass(frozen=True)
class TeacherTargets:
    """What the targets of one student are made of."""

    weights: Weights
    """The student before the refit; its lineage has the depth of each boundary, and the basis."""
    maps: Maps
    activations: ActivationStore
    """They say which boundaries are matched, and hold the student that was captured."""
    pair: Pair
    samples: Samples

    @contextmanager
    def beside(self, student: LayerwiseForward, folder: Path | None = None) -> Iterator[Targets]:
        """Let the teacher walk beside a forward pass of the student.

        Args:
            student: the pass.
            folder: where states lie in files; without it they are in memory.
        """
        targets = Targets(self, student, folder)
        try:
            yield targets
        finally:
            targets.close()

    def reached_by_student(self, boundary: int) -> bool:
        """Whether the student's stream is still the teacher's at a boundary, on two texts.

        Then the layers before that boundary need no forward pass.
        """
        student = self.pair.student
        few = self.samples.layout.select(Split.VALIDATION, limit=2)
        forward = LayerwiseForward(self.weights, few, student.device, student.dtype)
        for i in forward:
            if i == boundary:
                break
            forward.run()
        with self.beside(forward) as targets:
            targets.move_to(boundary)
            target = targets.rows(torch.arange(few.rows))
        distance = (forward.states.to(target) - target).norm()
        return bool(distance <= 1e-3 * target.norm())


class Targets:
    """The targets of the rows of one process, at one boundary after the other."""

    def __init__(
        self, parts: TeacherTargets, student: LayerwiseForward, folder: Path | None
    ) -> None:
        """Begin at the embeddings; see `TeacherTargets.beside`."""
        self._parts = parts
        self._student = student
        self._rotation: Rotation | None = None
        pair, activations = parts.pair, parts.activations
        read = parts.samples.read_by_teacher(student.whole)
        self._teacher: Walk | StoredRows
        if activations.replaced:
            self._teacher = StoredRows(activations, student)
        else:
            self._teacher = Walk(pair.teacher, pair.teacher.weights, read, student, folder)
        self._unpaired = ~paired_mask(student, parts.samples.read_by_teacher(student.layout))
        self._own: Walk | None = None
        if not pair.same or bool(self._unpaired.any()):
            captured = activations.captured_student()
            self._own = Walk(pair.student, captured, student.whole, student, folder)

    def move_to(self, boundary: int) -> None:
        """Go to a boundary of the student.

        Raises:
            RecipeError: the bases differ, and no aligner ran before this step.
        """
        activations = self._parts.activations
        depth = self._parts.weights.lineage.depths[boundary]
        if not self._parts.pair.same:
            self._rotation = self._map_of(depth)
        self._teacher.move_to(activations.teacher_boundaries[depth])
        if self._own:
            self._own.move_to(activations.depths.index(depth))

    def rows(self, rows: Tensor) -> Tensor:
        """Return the targets `[n, d_s]` of rows [n] of this process' share.

        A product of rows may have other bits where there are more rows. Those of one batch are
        asked for together, so targets do not depend on how many processes there are.

        A student cut from the teacher shares its basis. Otherwise the aligner's map of this
        boundary carries the teacher's rows back, and each row gets the length of the student's own
        as it was captured: readers see directions only, and sinks keep their length. A row that is
        paired with none of the teacher's keeps the student's own state: what a template writes
        where the student has no system prompt is read by every token after it.

        Raises:
            RecipeError: an unpaired row of a student of another width than its teacher.
        """
        weights = self._parts.weights
        place = float64_device(self._student.device)
        T = self._teacher.rows(rows).to(place, torch.float64)
        if self._own:
            T = self._with_own(T, self._own.rows(rows).to(place, torch.float64), rows)
        if weights.lineage.basis is not None:
            T = T @ weights.lineage.basis.to(T)
        return T if weights.dtype == torch.float64 else T.float()

    def _with_own(self, T: Tensor, S: Tensor, rows: Tensor) -> Tensor:
        """Return teacher rows `[n, d_t]` in the original student's basis `[n, d_s]`.

        Args:
            T: the teacher's rows, float64.
            S: the student's as captured `[n, d_s]`, float64.
            rows: their numbers [n].
        """
        if self._rotation is not None:
            T = (T @ self._rotation.matrix.T.to(T)) / self._rotation.scale
            T = T * (S.norm(dim=-1) / T.norm(dim=-1).clamp_min(1e-12))[:, None]
        unpaired = self._unpaired[rows].to(T.device)
        if T.shape[1] == S.shape[1]:
            return torch.where(unpaired[:, None], S, T)
        if bool(unpaired.any()):
            raise RecipeError(
                "writer-refit: some rows of the student's texts have no row of the teacher, and "
                "the student had another width than the teacher when it was captured, so its own "
                "states are no target for them; leave out `width` of the chop, or "
                "samples.bake_prompt."
            )
        return T

    def _map_of(self, depth: int) -> Rotation:
        """Return the aligner's map of a boundary of the original student."""
        rotation = self._parts.maps.rotation(self._parts.activations.depths.index(depth))
        if rotation is None or self._parts.pair.anchor:
            raise RecipeError(
                "writer-refit: teacher and student have different bases; "
                "put an aligner (procrustes) before this step, and no [anchor]."
            )
        return rotation

    def finish(self) -> None:
        """Go to the last boundary."""
        boundaries = self._parts.activations.teacher_boundaries
        self._teacher.move_to(boundaries[self._parts.pair.student.depth])

    def final_states(self, layout: PackedTexts, rows: Tensor) -> Tensor:
        """Return the teacher's states after its last layer, in all processes.

        All of them call it, after `finish`.

        Args:
            layout: texts of the pass, or others that the capture has kept.
            rows: rows of `layout` [n].

        Returns:
            `[n, d_t]`, on the host.
        """
        whole = self._student.whole
        if all(text.id in whole.numbers for text in layout.texts):
            return self._teacher.everywhere(layout.row_indices_in(whole)[rows])
        depth = self._parts.pair.student.depth
        return self._parts.activations.teacher_states(layout, depth)[rows]

    def close(self) -> None:
        """End what is open."""
        self._teacher.close()
        if self._own:
            self._own.close()
