"""The teacher's states as targets in the student's basis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rotdistill_procrustes.step import Procrustes
from rotdistill_writer_refit._targets import TeacherTargets

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.testing import (
    captured_activations,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
    rotated_twin,
)

SAMPLES = pico_samples(texts=80)
KEPT = [0, 1, 4, 5]


def silent(*_: object) -> None:
    """Report no progress."""


def test_targets_of_a_student_cut_after_the_capture_have_the_depth_of_their_layer(
    tmp_path: Path,
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    twin, _ = rotated_twin(model, tmp_path / "twin", 4)
    pair, out = Pair(model, twin), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, twin.weights, SAMPLES, out)
    maps = Procrustes(tie=1).align(activations, Maps(), pair, silent)
    cut = twin.weights.cut(KEPT)
    targets = TeacherTargets(cut, maps, activations, pair)
    for boundary, depth in enumerate(cut.lineage.depths):
        states = activations.rows("student", depth)
        torch.testing.assert_close(
            targets.at(SAMPLES.layout, boundary), states, rtol=1e-3, atol=1e-3
        )


def test_targets_follow_the_basis_of_a_student_cut_from_its_teacher(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, SAMPLES, out)
    Q = random_rotation(32, 3)
    turned = model.weights.cut(KEPT).fold({"residual": Rotation(Q)})
    targets = TeacherTargets(turned, Maps(), activations, pair)
    expected = activations.rows("teacher", 4).double() @ Q
    torch.testing.assert_close(targets.at(SAMPLES.layout, 2).double(), expected)


@pytest.mark.parametrize(("boundary", "reached"), [(0, True), (2, True), (3, False)])
def test_cut_student_reaches_its_teachers_stream_up_to_the_cut(
    tmp_path: Path, boundary: int, reached: bool
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, SAMPLES, out)
    # Layer 3 is missing: boundary 3 is matched with the teacher's boundary 4, and differs from it.
    targets = TeacherTargets(model.weights.cut([0, 1, 2, 4, 5]), Maps(), activations, pair)
    assert targets.reached_by_student(SAMPLES, boundary) is reached
