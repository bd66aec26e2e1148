"""Streams beside that of a student which is refitted: its teacher's, and its own as captured.

They walk over the texts of the student's forward pass, in the same processes, one boundary after
the other. So nothing of the teacher has to be stored, and no row is held in memory: the states of
the boundary at hand lie in a file; see `rotdistill_core.forward.states_file`.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.pairing import pair_tokens
from rotdistill_core.data.splits import Side
from rotdistill_core.forward.activations import ActivationStore, span_means
from rotdistill_core.forward.layerwise import LayerwiseForward


class Stream(Protocol):
    """A model's stream on the rows of a student."""

    def move_to(self, boundary: int) -> None:
        """Go to a boundary of the model."""

    def rows(self, rows: Tensor) -> Tensor:
        """Return the state of each of some rows of the student's share [n], `[n, d]`."""

    def everywhere(self, rows: Tensor) -> Tensor:
        """Return the states of rows of the student's whole [n], in all processes, `[n, d]`."""


class Walk:
    """A model that walks beside a student; of a row that is unpaired it returns some state."""

    def __init__(
        self,
        model: Model,
        weights: Weights,
        layout: PackedTexts,
        student: LayerwiseForward,
        folder: Path | None,
    ) -> None:
        """Begin at the embeddings.

        Args:
            model: says where, and in which dtype, to compute.
            weights: the model's weights, edited or not.
            layout: the student's whole texts, as the model reads them.
            student: the student's pass.
            folder: see `LayerwiseForward`.
        """
        self._model = model
        self._weights = weights
        self._layout = layout
        self._student = student
        self._folder = folder
        self._begin()
        self._places = _places(student.layout, self.forward.layout)

    def _begin(self) -> None:
        self.forward = LayerwiseForward(
            self._weights,
            self._layout,
            self._model.device,
            self._model.dtype,
            ranks=self._student.ranks,
            beside=self._student,
            folder=self._folder,
        )
        self._layers: Generator[int, None, None] = iter(self.forward)

    def move_to(self, boundary: int) -> None:
        """See `Stream`. The way back begins at the embeddings."""
        if boundary < self.forward.boundary:
            self.close()
            self._begin()
        while self.forward.boundary < boundary:
            next(self._layers)
            self.forward.run()

    def rows(self, rows: Tensor) -> Tensor:
        """See `Stream`."""
        return self.forward.states_of(rows if self._places is None else self._places[rows])

    def everywhere(self, rows: Tensor) -> Tensor:
        """See `Stream`."""
        places = _places(self._student.whole, self._layout)
        return self.forward.everywhere(rows if places is None else places[rows])

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._layers.close()


class StoredRows:
    """The rows that a control of the capture has put in the place of the teacher's."""

    def __init__(self, activations: ActivationStore, student: LayerwiseForward) -> None:
        self._activations = activations
        self._student = student
        self._spans = activations.teacher_spans(student.layout)
        self.move_to(0)

    def move_to(self, boundary: int) -> None:
        """See `Stream`."""
        self._boundary = boundary
        self._states = self._activations.rows(Side.TEACHER, boundary)

    def rows(self, rows: Tensor) -> Tensor:
        """See `Stream`."""
        return span_means(self._states, self._spans[rows])

    def everywhere(self, rows: Tensor) -> Tensor:
        """See `Stream`."""
        return self._activations.teacher_rows(self._student.whole, self._boundary)[rows]

    def close(self) -> None:
        """Nothing is open."""


def paired_mask(student: LayerwiseForward, read: PackedTexts) -> Tensor:
    """Return the mask of the student's rows that have a row in the teacher's reading `[rows]`.

    Args:
        student: the student's pass.
        read: the texts of its share, as the teacher reads them.
    """
    if read == student.layout:
        return torch.ones(student.layout.rows, dtype=torch.bool)
    start, end = pair_tokens(student.layout, read).unbind(1)
    return end > start


def _places(student: PackedTexts, read: PackedTexts) -> Tensor | None:
    """Return the row in another reading of each row of the student's; None if both are the same.

    A row without a pair has place 0.
    """
    return None if read == student else pair_tokens(student, read)[:, 0]
