"""The control of every aligner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rotdistill_procrustes.random_rotation import RandomRotation

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.testing import pico_model


@pytest.mark.parametrize("width", [32, 48])
def test_its_rotations_are_rotations_and_always_the_same(tmp_path: Path, width: int) -> None:
    pair = Pair(
        pico_model(tmp_path / "teacher", hidden_size=width), pico_model(tmp_path / "student")
    )
    one, again = (RandomRotation().align(pair.student.weights, Maps(), pair) for _ in range(2))
    each = RandomRotation(tie=1).align(pair.student.weights, Maps(), pair)
    assert sorted(one) == sorted(each) == ["residual.0", "residual.1", "residual.2"]
    assert one.tied() is not None
    assert each.tied() is None
    for maps in (one, each):
        for space, found in maps.items():
            found.verify(1e-12, space)
    for boundary in range(3):
        R, S = one.rotation(boundary), again.rotation(boundary)
        assert R is not None
        assert S is not None
        assert torch.equal(R.matrix, S.matrix)
    other = RandomRotation(seed=1).align(pair.student.weights, Maps(), pair).tied()
    assert other is not None
    assert float((other.matrix - one.tied().matrix).abs().max()) > 0.1  # type: ignore[union-attr]


def test_a_student_wider_than_its_teacher_is_refused(tmp_path: Path) -> None:
    pair = Pair(pico_model(tmp_path / "teacher"), pico_model(tmp_path / "student", hidden_size=48))
    with pytest.raises(RecipeError, match=r"the student is wider \(48\) than the teacher \(32\)"):
        RandomRotation().align(pair.student.weights, Maps(), pair)
