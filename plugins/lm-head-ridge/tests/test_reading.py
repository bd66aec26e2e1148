"""What the fit of a head keeps of final states: exact moments, and the rows that it judges by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rotdistill_lm_head_ridge._final_states import StudentStates, TeacherStates
from rotdistill_lm_head_ridge._reading import ReadStates, read_states
from rotdistill_lm_head_ridge.step import LmHeadRidge
from rotdistill_residuals.step import Residuals
from torch import Tensor

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data import packed
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.head import final_norm
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import final_states, pico_model, pico_output, pico_samples

JUDGED = torch.tensor([100, 60, 61, 2, 100])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 5 texts, and samples of 3, so that most states are computed block by block."""
    monkeypatch.setattr(packed, "BLOCK_TEXTS", 5)
    monkeypatch.setattr(packed, "SAMPLE_TEXTS", {Split.FIT: 3, Split.VALIDATION: 3})


def in_float64(folder: Path, **changes: object) -> Model:
    pico_model(folder, **changes)  # type: ignore[arg-type]
    return open_model(ModelRef(model=str(folder), dtype="float64"))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    teacher = in_float64(tmp_path / "teacher", seed=9, hidden_size=48, num_attention_heads=6)
    return Pair(teacher, in_float64(tmp_path / "student", seed=1))


def quiet(*_: object) -> None:
    """Take progress and print nothing."""


def captured(pair: Pair, samples: Samples, runs: Path) -> ActivationStore:
    step = Residuals(store="moments")
    return step.capture(pair, pair.student.weights, samples, pico_output(runs), quiet)


def whole_of(samples: Samples) -> PackedTexts:
    return samples.layout.select(Split.FIT, Split.VALIDATION)


def read(pair: Pair, samples: Samples, activations: ActivationStore) -> ReadStates:
    layout = whole_of(samples)
    student = StudentStates.of(pair.student.weights, activations, pair.student, layout)
    assert student.captured
    teacher = TeacherStates(activations, pair, samples)
    return read_states(student, teacher, layout, JUDGED, quiet)


def test_moments_are_those_of_all_rows_and_only_judged_rows_are_held(
    pair: Pair, tmp_path: Path
) -> None:
    samples = pico_samples(texts=40)
    found = read(pair, samples, captured(pair, samples, tmp_path / "runs"))
    layout = whole_of(samples)

    def normed(model: Model) -> Tensor:
        return final_norm(model.weights, final_states(model.weights, layout))

    X, T = normed(pair.student), normed(pair.teacher)
    fit = layout.split(Split.FIT)
    torch.testing.assert_close(found.moments.xx, X[fit].T @ X[fit], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.moments.xy, X[fit].T @ T[fit], rtol=1e-11, atol=1e-11)
    assert found.moments.weight == int(fit.sum())
    assert found.teacher is not None
    assert len(found.student.states) == len(found.teacher.states) == 4
    torch.testing.assert_close(found.student[JUDGED], X[JUDGED], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.teacher[JUDGED], T[JUDGED], rtol=1e-11, atol=1e-11)


def test_the_order_of_blocks_does_not_show(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = pico_samples(texts=40, prefix=0)
    activations = captured(pair, samples, tmp_path / "runs")
    one = read(pair, samples, activations)
    forwards = PackedTexts.blocks
    monkeypatch.setattr(PackedTexts, "blocks", lambda layout: forwards(layout)[::-1])
    two = read(pair, samples, activations)
    assert torch.equal(one.moments.xx, two.moments.xx)
    assert torch.equal(one.moments.xy, two.moments.xy)
    assert torch.equal(one.student.states, two.student.states)


def test_no_final_states_are_written(pair: Pair, tmp_path: Path) -> None:
    samples = pico_samples(texts=40)
    activations = captured(pair, samples, tmp_path / "runs")
    before = set((tmp_path / "runs").rglob("*.safetensors"))
    LmHeadRidge(objective="kl").style(
        pair.student.weights, activations, pair, samples, pico_output(tmp_path / "runs"), quiet
    )
    assert set((tmp_path / "runs").rglob("*.safetensors")) == before
