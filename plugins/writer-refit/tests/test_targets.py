"""The teacher's states as targets in the student's basis."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rotdistill_procrustes.step import Procrustes
from rotdistill_residuals.step import Residuals
from rotdistill_writer_refit._targets import TeacherTargets

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.data.tokenization import with_prompt
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.testing import (
    captured_activations,
    pico_baked,
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


def test_rows_that_the_teacher_does_not_read_keep_the_students_own_state(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    baked = pico_baked(SAMPLES)
    # The student reads a token of its own in the place of the prompt.
    texts = tuple(
        with_prompt(text, (text.tokens[0], 63, *text.tokens[1 : text.answer]))
        for text in baked.layout.texts
    )
    samples = replace(baked, layout=PackedTexts(texts, 2))
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = Residuals().capture(pair, model.weights, samples, out, silent)
    layout = samples.layout.select(Split.FIT, Split.VALIDATION)
    assert (~activations.paired_mask(layout)).nonzero().flatten().tolist() == [1]
    targets = TeacherTargets(model.weights, Maps(), activations, pair)
    for boundary in range(3):
        found = targets.at(layout, boundary)
        torch.testing.assert_close(found[1], activations.rows(Side.STUDENT, boundary)[1])
        expected = activations.teacher_states(layout, boundary)
        torch.testing.assert_close(found[2:], expected[2:])


def test_an_unpaired_row_that_was_not_captured_is_refused(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    baked = pico_baked(SAMPLES)
    texts = tuple(
        with_prompt(text, (text.tokens[0], 63, *text.tokens[1 : text.answer]))
        for text in baked.layout.texts
    )
    # Each text has its beginning to itself.
    samples = replace(baked, layout=PackedTexts(texts, 0))
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    few = Residuals(student_texts=3).capture(pair, model.weights, samples, out, silent)
    targets = TeacherTargets(model.weights, Maps(), few, pair)
    with pytest.raises(RecipeError, match="leave out student_texts"):
        targets.at(samples.layout.select(Split.FIT, Split.VALIDATION), 1)
