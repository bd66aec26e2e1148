"""The control of every aligner: orthogonal, reproducible, and blind to both models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rotdistill_procrustes.random_rotation import RandomRotation

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.testing import parametrize_with_checks, pico_model


@parametrize_with_checks(RandomRotation, {}, {"tie": 1, "seed": 3})
def test_random_rotation_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.fixture(params=[32, 48])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    teacher = pico_model(tmp_path / "teacher", hidden_size=request.param)
    return Pair(teacher, pico_model(tmp_path / "student"))


@pytest.mark.parametrize("tie", ["all", 1])
def test_random_maps_are_rotations(pair: Pair, tie: object) -> None:
    maps = RandomRotation(tie=tie).align(pair.student.weights, Maps(), pair)
    assert sorted(maps) == ["residual.0", "residual.1", "residual.2"]
    assert (maps.tied() is not None) is (tie == "all")
    for space, rotation in maps.items():
        rotation.verify(1e-12, space)


@pytest.mark.parametrize("tie", ["all", 1])
def test_a_seed_gives_the_same_rotations_and_another_seed_others(pair: Pair, tie: object) -> None:
    def rotations(seed: int) -> list[torch.Tensor]:
        maps = RandomRotation(tie=tie, seed=seed).align(pair.student.weights, Maps(), pair)
        return [maps[f"residual.{boundary}"].matrix for boundary in range(3)]

    for one, again, other in zip(rotations(0), rotations(0), rotations(1), strict=True):
        assert torch.equal(one, again)
        assert float((other - one).abs().max()) > 0.1


def test_a_student_wider_than_its_teacher_is_refused(tmp_path: Path) -> None:
    pair = Pair(pico_model(tmp_path / "teacher"), pico_model(tmp_path / "student", hidden_size=48))
    with pytest.raises(RecipeError, match=r"the student is wider \(48\) than the teacher \(32\)"):
        RandomRotation().align(pair.student.weights, Maps(), pair)
