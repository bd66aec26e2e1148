"""Planted reflections are taken back; after a free Procrustes there are none to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_householder import _method
from rotdistill_householder._method import StopReason, reflect
from rotdistill_householder.step import Householder, steps
from rotdistill_procrustes.step import Procrustes

from rotdistill_core.alignment.streams import sum_fit_rows
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.plugin.step import validator_of
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    captured_activations,
    parametrize_with_checks,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
)

Setting = tuple[Pair, ActivationStore, StepOutput]


@parametrize_with_checks(Householder, {}, {"max_reflections": 1, "target": 1.0})
def test_householder_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.fixture
def samples() -> Samples:
    return pico_samples()


@pytest.fixture
def setting(tmp_path: Path, samples: Samples) -> Setting:
    """Return isotropic student rows, and the same rows in another basis as the teacher's."""
    model, teacher = pico_model(tmp_path / "model"), pico_model(tmp_path / "teacher", seed=9)
    pair, out = Pair(teacher, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    shards: dict[str, list[str]] = {"student": [], "teacher": []}
    for boundary in range(3):
        generator = torch.Generator().manual_seed(boundary)
        X = torch.randn(samples.layout.rows, 32, dtype=torch.float64, generator=generator)
        for side, states in (("student", X), ("teacher", X @ true_map())):
            path = out.tensors(f"planted/{side}/{boundary}.safetensors", {"rows": states})
            shards[side].append(path.relative_to(activations.root).as_posix())
    planted = {side: tuple(paths) for side, paths in shards.items()}
    return pair, replace(activations, shards=planted), out


def quiet(*_: object) -> None:
    """Ignore progress."""


def true_map() -> torch.Tensor:
    return random_rotation(32, 5)


def mirrored(times: int) -> torch.Tensor:
    """Return the true map after some reflections along directions orthogonal to each other."""
    R = true_map()
    for k in range(times):
        R = reflect(R, random_rotation(32, 8)[:, k])
    return R


def tied(R: torch.Tensor) -> Maps:
    rotations = {f"residual.{boundary}": Rotation(R) for boundary in range(3)}
    return Maps(rotations, {boundary: LayerDiagnostics(k=32) for boundary in range(3)})


def reflections(maps: Maps, boundary: int = 0) -> dict[str, Any]:
    figures: dict[str, Any] = maps.diagnostics[boundary].extra["householder"]
    return figures


def test_the_plugin_offers_the_step() -> None:
    assert steps() == [Householder]


@pytest.mark.parametrize("planted", [1, 2, 3])
def test_planted_reflections_are_taken_back_two_at_most(setting: Setting, planted: int) -> None:
    pair, activations, out = setting
    before = tied(mirrored(planted))
    maps = Householder(target=1.0).refine(activations, before, pair, out, quiet)
    rotation = maps.tied()
    assert rotation is not None
    rotation.verify(1e-12, "here")
    figures, done = maps.diagnostics[1], reflections(maps, 1)
    assert done["reflections"] == min(planted, 2)
    assert done["lowest_eigenvalue_before"] < done["lowest_eigenvalue_shuffled"] < 0
    assert figures.cosine_after > figures.cosine_unreflected + 0.05
    assert figures.cosine_after > figures.cosine_shuffled + 0.05
    assert done["cosine_after"] > done["cosine_before"]
    assert (figures.k, len(maps.diagnostics)) == (32, 3)
    assert out.notes == {"boundaries 0 to 2": done}
    assert torch.equal(before["residual.0"].matrix, mirrored(planted))
    if planted <= 2:
        # The rows are random: their sample covariance tilts v a little.
        error = float((rotation.matrix - true_map()).norm())
        assert error < 0.75 < 2 * planted**0.5
        assert done["stopped"] == StopReason.NOTHING_TO_GAIN
        assert done["lowest_eigenvalue"] > 0
    else:
        assert done["stopped"] == StopReason.LIMIT_REACHED
        assert done["lowest_eigenvalue"] < 0


def test_a_reflection_along_a_principal_axis_is_taken_back_exactly(setting: Setting) -> None:
    pair, activations, out = setting
    wanted = Procrustes().align(activations, Maps(), pair, quiet).tied()
    assert wanted is not None
    sums = sum_fit_rows(activations, pair, [0, 1, 2], "here", squares=False)
    axis = torch.linalg.eigh(wanted.matrix.T @ sums.C_st)[1][:, 3]
    before = tied(reflect(wanted.matrix, axis))
    maps = Householder(target=1.0).refine(activations, before, pair, out, quiet)
    rotation = maps.tied()
    assert rotation is not None
    torch.testing.assert_close(rotation.matrix, wanted.matrix, rtol=0, atol=1e-9)
    assert maps.diagnostics[0].scale == pytest.approx(wanted.scale)


def test_householder_stops_at_the_allowed_number_of_reflections(setting: Setting) -> None:
    pair, activations, out = setting
    step = Householder(max_reflections=1, target=1.0)
    maps = step.refine(activations, tied(mirrored(2)), pair, out, quiet)
    assert reflections(maps)["reflections"] == 1
    assert reflections(maps)["stopped"] == StopReason.LIMIT_REACHED


def test_householder_stops_at_the_target(setting: Setting) -> None:
    pair, activations, out = setting
    before = tied(mirrored(2))
    reached = Householder(target=0.75).refine(activations, before, pair, out, quiet)
    assert reflections(reached)["cosine_before"] > 0.75
    assert reflections(reached)["stopped"] == StopReason.TARGET_REACHED
    assert reached["residual.0"] is before["residual.0"]
    further = Householder(target=0.9).refine(activations, before, pair, out, quiet)
    assert reflections(further)["reflections"] == 1
    assert reflections(further)["stopped"] == StopReason.TARGET_REACHED
    assert reflections(further)["lowest_eigenvalue"] < 0


@pytest.mark.parametrize("tie", ["all", 1, 2])
@pytest.mark.parametrize("width", [32, 48])
def test_householder_changes_nothing_after_a_free_procrustes(
    tmp_path: Path, samples: Samples, tie: Any, width: int
) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, hidden_size=width)
    pair, out = Pair(teacher, pico_model(tmp_path / "model")), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, pair.student.weights, samples, out)
    before = Procrustes(tie=tie).align(activations, Maps(), pair, quiet)
    out = pico_output(tmp_path / "again")
    maps = Householder().refine(activations, before, pair, out, quiet)
    assert all(maps[space] is before[space] for space in before)
    stages = {figures.stage for figures in before.diagnostics.values()}
    assert len(out.notes) == len(stages)
    for boundary, figures in maps.diagnostics.items():
        done = reflections(maps, boundary)
        assert done in out.notes.values()
        assert done["reflections"] == 0
        assert done["stopped"] == StopReason.NOTHING_TO_GAIN
        assert done["lowest_eigenvalue"] > -1e-9
        assert done["lowest_eigenvalue_shuffled"] < -1e-3
        assert done["cosine_before"] == done["cosine_after"] < 0.75
        assert replace(figures, extra={}) == before.diagnostics[boundary]


def test_a_reflection_that_only_fits_noise_is_rejected(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, activations, out = setting
    monkeypatch.setattr(_method, "validation_cosine", lambda *_: 0.1)
    before = tied(mirrored(1))
    maps = Householder().refine(activations, before, pair, out, quiet)
    assert reflections(maps)["stopped"] == StopReason.NO_VALIDATION_GAIN
    assert maps["residual.0"] is before["residual.0"]


def test_householder_without_an_aligner_is_refused(setting: Setting) -> None:
    pair, activations, out = setting
    with pytest.raises(RecipeError, match="needs an aligner"):
        Householder().refine(activations, Maps(), pair, out, quiet)


@pytest.mark.parametrize(
    "wrong", [{"max_reflections": 3}, {"max_reflections": 0}, {"target": 0.0}, {"target": 1.5}]
)
def test_options_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        validator_of(Householder).validate_python({"use": "householder", **wrong})
