"""Attention maps: which heads are shown, and in which places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rotdistill_report._attention import draw_attention, shown_pairs
from safetensors.numpy import save_file

from rotdistill_core.linalg.diagnostics import AssignmentDiagnostics


def heads(*permutation: int) -> AssignmentDiagnostics:
    moved = sum(source != target for target, source in enumerate(permutation))
    return AssignmentDiagnostics(
        identity=moved == 0,
        moved=moved,
        of=len(permutation),
        score=0.9,
        identity_score=0.5,
        random_score=0.1,
        permutation=permutation,
    )


def test_heads_that_moved_come_first() -> None:
    assert shown_pairs(heads(0, 2, 1, 3)) == [(1, 2), (2, 1), (0, 0)]


def test_a_head_of_the_teacher_without_a_partner_is_not_shown() -> None:
    assert shown_pairs(heads(-1, 0, -1)) == [(1, 0)]


def test_each_column_is_a_head_of_the_teacher_and_the_students_before_and_after(
    tmp_path: Path,
) -> None:
    student = np.linspace(0, 1, 4 * 9, dtype=np.float32).reshape(4, 3, 3)
    teacher = student[[2, 1, 0, 3]].copy()
    save_file({"teacher": teacher, "student": student}, tmp_path / "maps.safetensors")
    figure = Figure()
    draw_attention(figure, tmp_path / "maps.safetensors", heads(2, 1, 0, 3))
    images = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    assert len(images) == 9
    assert np.array_equal(images["teacher: head 0"], images["after: head 2"])
    assert not np.array_equal(images["teacher: head 0"], images["before: head 0"])
