"""Attention maps of heads that a permutation moved, next to the teacher's: before and after."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from safetensors.numpy import load_file

from rotdistill_core.linalg.diagnostics import AssignmentDiagnostics

MAX_HEADS = 3
"""Heads of a layer that are shown."""


class HeadPair(NamedTuple):
    """A head of the teacher, and the student's head that takes its place."""

    teacher: int
    student: int

    @property
    def moved(self) -> bool:
        """Whether the student's head comes from another place."""
        return self.teacher != self.student


def shown_pairs(heads: AssignmentDiagnostics) -> list[HeadPair]:
    """Return the pairs of heads that are shown of a layer: those that moved first."""
    permutation = heads.permutation or ()
    # -1 marks a head of the teacher for which the student has none.
    pairs = [HeadPair(teacher, i) for teacher, i in enumerate(permutation) if i >= 0]
    return sorted(pairs, key=lambda pair: not pair.moved)[:MAX_HEADS]


def draw_attention(figure: Figure, path: Path, heads: AssignmentDiagnostics) -> None:
    """Draw the maps in three rows: the teacher, the student before and after the permutation.

    `path` holds tensors `teacher` and `student` of attention probabilities [head, token, token].
    """
    maps = load_file(path)
    teacher_maps, student_maps = maps["teacher"], maps["student"]
    pairs = shown_pairs(heads)
    axes = figure.subplots(3, len(pairs), sharex=True, sharey=True, squeeze=False)
    for column, pair in enumerate(pairs):
        # A student with fewer heads has none at some places of the teacher's.
        before = min(pair.teacher, len(student_maps) - 1)
        panels = {
            f"teacher: head {pair.teacher}": teacher_maps[pair.teacher],
            f"before: head {before}": student_maps[before],
            f"after: head {pair.student}": student_maps[pair.student],
        }
        for row, (title, values) in enumerate(panels.items()):
            panel = axes[row][column]
            image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            panel.set_title(title, fontsize=8.5)
            panel.grid(visible=False)
    figure.supxlabel("attends to token", fontsize=9.5)
    figure.supylabel("token", fontsize=9.5)
    figure.colorbar(image, ax=axes, label="attention, 0 to 1", shrink=0.6)
