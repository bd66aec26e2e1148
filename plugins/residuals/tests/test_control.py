"""Controls replace the teacher's rows of fit and validation texts, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from rotdistill_residuals.step import Residuals
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.testing import pico_baked, pico_model, pico_output, pico_samples

SAMPLES = pico_samples(texts=20, guard=3)
BOUNDARIES = range(5)


def quiet(*_: object) -> None:
    """Take progress and print nothing."""


def captures(
    tmp_path: Path, control: Literal["shuffled", "reversed", "self"]
) -> tuple[ActivationStore, ActivationStore]:
    """Capture a student without its teacher's second layer, without and with a control."""
    model = pico_model(tmp_path / "model", num_hidden_layers=4)
    pair = Pair(model, model)
    cut = model.weights.cut([0, 2, 3])
    runs = tmp_path / "runs"
    real = Residuals().capture(pair, cut, SAMPLES, pico_output(runs, "real"), quiet)
    controlled = Residuals(control=control).capture(
        pair, cut, SAMPLES, pico_output(runs, control), quiet
    )
    return real, controlled


def fitted_rows() -> Tensor:
    """Return the mask of fit and validation rows without the shared prompt."""
    layout = SAMPLES.layout
    mask = layout.split(Split.FIT, Split.VALIDATION)
    return mask.index_fill(0, torch.arange(layout.prefix), False)


def test_shuffled_rows_are_the_same_rows_in_one_other_order(tmp_path: Path) -> None:
    real, controlled = captures(tmp_path, "shuffled")
    fitted = fitted_rows()
    orders = []
    for boundary in BOUNDARIES:
        T = real.rows(Side.TEACHER, boundary)
        shuffled = controlled.rows(Side.TEACHER, boundary)
        assert torch.equal(T[~fitted], shuffled[~fitted])
        match = (shuffled[fitted][:, None] == T[fitted][None]).all(-1)
        assert (match.sum(0) >= 1).all()
        orders.append(match.float().argmax(1))
    moved = orders[-1] != torch.arange(int(fitted.sum()))
    assert float(moved.double().mean()) > 0.9
    for boundary in BOUNDARIES:
        T = real.rows(Side.TEACHER, boundary)[fitted]
        assert torch.equal(T[orders[-1]], controlled.rows(Side.TEACHER, boundary)[fitted])


def test_a_control_leaves_the_students_rows(tmp_path: Path) -> None:
    real, controlled = captures(tmp_path, "shuffled")
    for boundary in range(4):
        X = real.rows(Side.STUDENT, boundary)
        assert torch.equal(X, controlled.rows(Side.STUDENT, boundary))


def test_reversed_layers_are_the_layers_from_the_other_end(tmp_path: Path) -> None:
    real, controlled = captures(tmp_path, "reversed")
    fitted = fitted_rows()
    for boundary in BOUNDARIES:
        T = real.rows(Side.TEACHER, boundary)
        reversed_rows = controlled.rows(Side.TEACHER, boundary)
        assert torch.equal(reversed_rows[fitted], real.rows(Side.TEACHER, 4 - boundary)[fitted])
        assert torch.equal(reversed_rows[~fitted], T[~fitted])


def test_a_student_may_be_its_own_teacher_on_fitted_texts(tmp_path: Path) -> None:
    real, controlled = captures(tmp_path, "self")
    fitted = SAMPLES.layout.select(Split.FIT, Split.VALIDATION)
    scored = SAMPLES.layout.select(Split.HELDOUT, Split.GUARD)
    student_rows = fitted.row_indices_in(real.layouts[Side.STUDENT])
    after_prompt = slice(scored.prefix, None)
    for boundary, depth in enumerate(real.depths):
        X = real.rows(Side.STUDENT, boundary)[student_rows]
        assert torch.equal(controlled.teacher_states(fitted, depth), X)
        T = real.teacher_states(scored, depth)
        assert torch.equal(controlled.teacher_states(scored, depth)[after_prompt], T[after_prompt])


def test_boundaries_that_the_student_lacks_keep_the_teachers_shard(tmp_path: Path) -> None:
    real, controlled = captures(tmp_path, "self")
    kept = [
        boundary
        for boundary in BOUNDARIES
        if real.shards[Side.TEACHER][boundary] == controlled.shards[Side.TEACHER][boundary]
    ]
    assert kept == [boundary for boundary in BOUNDARIES if boundary not in real.depths] != []


@pytest.mark.parametrize("options", [{"student_texts": 3}, {}])
def test_the_self_control_needs_a_student_cut_from_its_teacher_and_all_texts(
    tmp_path: Path, options: dict[str, int]
) -> None:
    model = pico_model(tmp_path / "model")
    student = model if options else pico_model(tmp_path / "other", seed=1)
    pair = Pair(model, student)
    with pytest.raises(
        RecipeError, match="needs a student cut from its teacher, captured on all texts"
    ):
        Residuals(control="self", **options).capture(
            pair, student.weights, SAMPLES, pico_output(tmp_path / "runs"), quiet
        )


def test_a_student_without_the_prompt_is_its_own_teacher(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    samples, out = pico_baked(SAMPLES), pico_output(tmp_path / "runs")
    control = Residuals(control="self")
    found = control.capture(Pair(model, model), model.weights, samples, out, quiet)
    layout = samples.layout.select(Split.FIT, Split.VALIDATION)
    for boundary in range(3):
        S = found.rows(Side.STUDENT, boundary)
        assert torch.equal(found.teacher_states(layout, boundary), S)
