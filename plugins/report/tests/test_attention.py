"""Attention maps: heads that moved are shown first, in their places before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rotdistill_report._attention import chosen, draw, moved
from safetensors.numpy import save_file


def card(*permutation: int) -> dict[str, dict[str, list[int]]]:
    return {"heads": {"permutation": list(permutation)}}


def test_heads_that_moved_come_first() -> None:
    assert chosen(card(0, 2, 1, 3)) == [(1, 2), (2, 1), (0, 0)]
    assert (moved(card(0, 2, 1, 3)), moved(card(0, 1))) == (2, 0)
    assert chosen(card(-1, 0, -1)) == [
        (1, 0)
    ]  # between sizes some of the teacher's heads have none


def test_each_column_is_a_head_of_the_teacher_and_the_students_before_and_after(
    tmp_path: Path,
) -> None:
    heads = np.linspace(0, 1, 4 * 9, dtype=np.float32).reshape(4, 3, 3)
    save_file(
        {"teacher": heads[[2, 1, 0, 3]].copy(), "student": heads}, tmp_path / "maps.safetensors"
    )
    figure = Figure()
    draw(figure, tmp_path / "maps.safetensors", card(2, 1, 0, 3))
    images = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    assert len(images) == 9
    assert np.array_equal(images["teacher: head 0"], images["after: head 2"])
    assert not np.array_equal(images["teacher: head 0"], images["before: head 0"])
