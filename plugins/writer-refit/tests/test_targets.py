"""The teacher's states as targets in the student's basis."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

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
from rotdistill_core.forward.layerwise import LayerwiseForward
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


def targets_at(parts: TeacherTargets, boundary: int, layout: PackedTexts) -> torch.Tensor:
    """Return the targets of all rows of a layout at a boundary of the student."""
    student = LayerwiseForward(parts.weights, layout, torch.device("cpu"), torch.float32)
    with parts.beside(student) as targets:
        targets.move_to(boundary)
        return targets.rows(torch.arange(layout.rows))


def test_targets_of_a_student_cut_after_the_capture_have_the_depth_of_their_layer(
    tmp_path: Path,
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    twin, _ = rotated_twin(model, tmp_path / "twin", 4)
    pair, out = Pair(model, twin), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, twin.weights, SAMPLES, out)
    maps = Procrustes(tie=1).align(activations, Maps(), pair, silent)
    cut = twin.weights.cut(KEPT)
    targets = TeacherTargets(cut, maps, activations, pair, SAMPLES)
    for boundary, depth in enumerate(cut.lineage.depths):
        states = activations.rows("student", depth)
        torch.testing.assert_close(
            targets_at(targets, boundary, SAMPLES.layout), states, rtol=1e-3, atol=1e-3
        )


def test_targets_follow_the_basis_of_a_student_cut_from_its_teacher(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, SAMPLES, out)
    Q = random_rotation(32, 3)
    turned = model.weights.cut(KEPT).fold({"residual": Rotation(Q)})
    targets = TeacherTargets(turned, Maps(), activations, pair, SAMPLES)
    expected = activations.rows("teacher", 4).double() @ Q
    torch.testing.assert_close(targets_at(targets, 2, SAMPLES.layout).double(), expected)


@pytest.mark.parametrize(("boundary", "reached"), [(0, True), (2, True), (3, False)])
def test_cut_student_reaches_its_teachers_stream_up_to_the_cut(
    tmp_path: Path, boundary: int, reached: bool
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, SAMPLES, out)
    # Layer 3 is missing: boundary 3 is matched with the teacher's boundary 4, and differs from it.
    cut = model.weights.cut([0, 1, 2, 4, 5])
    targets = TeacherTargets(cut, Maps(), activations, pair, SAMPLES)
    assert targets.reached_by_student(boundary) is reached


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
    targets = TeacherTargets(model.weights, Maps(), activations, pair, samples)
    for boundary in range(3):
        found = targets_at(targets, boundary, layout)
        torch.testing.assert_close(found[1], activations.rows(Side.STUDENT, boundary)[1])
        expected = activations.teacher_states(layout, boundary)
        torch.testing.assert_close(found[2:], expected[2:])


@pytest.mark.parametrize("store", ["rows", "moments"])
def test_unpaired_rows_that_were_not_captured_keep_the_students_own_state(
    tmp_path: Path, store: Literal["rows", "moments"]
) -> None:
    model = pico_model(tmp_path / "model")
    baked = pico_baked(SAMPLES)
    texts = tuple(
        with_prompt(text, (text.tokens[0], 63, *text.tokens[1 : text.answer]))
        for text in baked.layout.texts
    )
    # Each text has its beginning to itself.
    samples = replace(baked, layout=PackedTexts(texts, 0))
    pair = Pair(model, model)
    layout = samples.layout.select(Split.FIT, Split.VALIDATION)
    few = Residuals(student_texts=3, store=store).capture(
        pair, model.weights, samples, pico_output(tmp_path / "few"), silent
    )
    every = Residuals().capture(
        pair, model.weights, samples, pico_output(tmp_path / "every"), silent
    )
    unpaired = ~every.paired_mask(layout)
    assert unpaired.sum() == len(layout.texts)
    parts = TeacherTargets(model.weights, Maps(), few, pair, samples)
    places = layout.row_indices_in(every.layouts[Side.STUDENT])
    own = every.rows(Side.STUDENT, 1)[places]
    expected = torch.where(unpaired[:, None], own, every.teacher_states(layout, 1))
    torch.testing.assert_close(targets_at(parts, 1, layout), expected)


@pytest.mark.parametrize("control", ["shuffled", "reversed"])
def test_targets_of_a_control_are_the_rows_that_it_put_in_place(
    tmp_path: Path, control: Literal["shuffled", "reversed"]
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=3)
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    other = Residuals(control=control).capture(pair, model.weights, SAMPLES, out, silent)
    layout = SAMPLES.layout.select(Split.FIT, Split.VALIDATION)
    found = targets_at(TeacherTargets(model.weights, Maps(), other, pair, SAMPLES), 1, layout)
    torch.testing.assert_close(found, other.teacher_states(layout, 1))
    true = Residuals().capture(pair, model.weights, SAMPLES, out, silent)
    assert not torch.allclose(found, true.teacher_states(layout, 1))


def test_each_row_gets_the_length_of_the_students_own_whatever_was_captured(
    tmp_path: Path,
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=3)
    twin, _ = rotated_twin(model, tmp_path / "twin", 4)
    pair = Pair(model, twin)
    layout = SAMPLES.layout.select(Split.FIT, Split.VALIDATION)
    # The aligner's sums are of rows from other batches: maps differ in their last bits.
    capture = pico_output(tmp_path / "every")
    maps = Procrustes(tie=1).align(
        captured_activations(pair, twin.weights, SAMPLES, capture), Maps(), pair, silent
    )
    found = []
    for store in ("rows", "moments"):
        out = pico_output(tmp_path / store)
        step = Residuals(store=store, student_texts=40)  # type: ignore[arg-type]
        activations = step.capture(pair, twin.weights, SAMPLES, out, silent)
        parts = TeacherTargets(twin.weights, maps, activations, pair, SAMPLES)
        found.append(targets_at(parts, 2, layout))
    assert torch.equal(*found)
    student = LayerwiseForward(twin.weights, layout, torch.device("cpu"), torch.float32)
    for i in student:
        student.run()
        if i == 1:
            break
    torch.testing.assert_close(found[0].norm(dim=-1), student.states.norm(dim=-1))


def test_targets_without_a_captured_student_are_refused(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    twin, _ = rotated_twin(model, tmp_path / "twin", 4)
    pair, out = Pair(model, twin), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, twin.weights, SAMPLES, out)
    nobody = replace(activations, student=None)
    with pytest.raises(RecipeError, match="which student they are of"):
        targets_at(TeacherTargets(twin.weights, Maps(), nobody, pair, SAMPLES), 1, SAMPLES.layout)
