"""Controls replace the teacher's rows of fit and validation texts, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from rotdistill_residuals.step import Residuals

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.testing import pico_model, pico_output, pico_samples

SAMPLES = pico_samples(texts=20, guard=3)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def banks(
    tmp_path: Path, control: Literal["shuffled", "reversed", "self"]
) -> tuple[ActivationStore, ActivationStore]:
    """Return the bank of a student without its teacher's second layer, and the same under control."""
    model = pico_model(tmp_path / "model", num_hidden_layers=4)
    pair, cut = Pair(model, model), model.weights.cut([0, 2, 3])
    real = Residuals().capture(pair, cut, SAMPLES, pico_output(tmp_path / "runs", "real"), quiet)
    return real, Residuals(control=control).capture(
        pair, cut, SAMPLES, pico_output(tmp_path / "runs", control), quiet
    )


def test_shuffled_rows_are_the_same_rows_in_one_other_order(tmp_path: Path) -> None:
    real, other = banks(tmp_path, "shuffled")
    layout = SAMPLES.layout
    fitted = layout.split("fit", "validation").index_fill(0, torch.arange(layout.prefix), False)
    orders = []
    for boundary in range(5):
        T, S = real.rows("teacher", boundary), other.rows("teacher", boundary)
        assert torch.equal(T[~fitted], S[~fitted])
        match = (S[fitted][:, None] == T[fitted][None]).all(-1)
        assert (match.sum(0) >= 1).all()
        orders.append(match.float().argmax(1))
        assert torch.equal(
            real.rows("student", min(boundary, 3)), other.rows("student", min(boundary, 3))
        )
    moved = orders[-1] != torch.arange(int(fitted.sum()))
    assert float(moved.double().mean()) > 0.9
    assert all(
        torch.equal(real.rows("teacher", b)[fitted][orders[-1]], other.rows("teacher", b)[fitted])
        for b in range(5)
    )


def test_reversed_layers_are_the_layers_from_the_other_end(tmp_path: Path) -> None:
    real, other = banks(tmp_path, "reversed")
    fitted = SAMPLES.layout.split("fit", "validation").index_fill(
        0, torch.arange(SAMPLES.layout.prefix), False
    )
    for boundary in range(5):
        T, S = real.rows("teacher", boundary), other.rows("teacher", boundary)
        assert torch.equal(S[fitted], real.rows("teacher", 4 - boundary)[fitted])
        assert torch.equal(S[~fitted], T[~fitted])


def test_a_student_may_be_its_own_teacher_where_it_is_fitted(tmp_path: Path) -> None:
    real, own = banks(tmp_path, "self")
    fitted, held = (
        SAMPLES.layout.select("fit", "validation"),
        SAMPLES.layout.select("heldout", "guard"),
    )
    for index, depth in enumerate(real.depths):
        assert torch.equal(
            own.teacher(fitted, depth),
            real.rows("student", index)[fitted.row_indices_in(real.layouts["student"])],
        )
        rows = slice(held.prefix, None)
        assert torch.equal(own.teacher(held, depth)[rows], real.teacher(held, depth)[rows])


@pytest.mark.parametrize("options", [{"student_texts": 3}, {}])
def test_a_student_of_another_model_is_no_teacher_of_itself(
    tmp_path: Path, options: dict[str, int]
) -> None:
    model = pico_model(tmp_path / "model")
    pair = Pair(model, model if options else pico_model(tmp_path / "other", seed=1))
    with pytest.raises(
        RecipeError, match="needs a student cut from its teacher, captured on all texts"
    ):
        Residuals(control="self", **options).capture(
            pair, pair.student.weights, SAMPLES, pico_output(tmp_path / "runs"), quiet
        )
