"""Reflections on planted maps: one that was planted is taken back, and behind a free Procrustes nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_householder.step import Householder, lowest, reflected, stages, steps
from rotdistill_procrustes.step import Procrustes

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    captured_activations,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
)

Setting = tuple[Pair, ActivationStore, StepOutput]
widths, seeds = st.integers(2, 12), st.integers(0, 10**6)


@pytest.fixture
def samples() -> Samples:
    return pico_samples()


@pytest.fixture
def setting(tmp_path: Path, samples: Samples) -> Setting:
    """Return isotropic student rows, and teacher rows that are the student's in another basis."""
    model, teacher = pico_model(tmp_path / "model"), pico_model(tmp_path / "teacher", seed=9)
    pair, out = Pair(teacher, model), pico_output(tmp_path / "runs")
    activations, Q = captured_activations(pair, model.weights, samples, out), random_rotation(32, 5)
    shards: dict[str, list[str]] = {"student": [], "teacher": []}
    for b in range(3):
        X = torch.randn(
            samples.layout.rows, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(b)
        )
        for side, states in (("student", X), ("teacher", X @ Q)):
            path = out.tensors(f"planted/{side}/{b}.safetensors", {"rows": states})
            shards[side].append(path.relative_to(activations.root).as_posix())
    return (
        pair,
        replace(activations, shards={side: tuple(paths) for side, paths in shards.items()}),
        out,
    )


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def true_map() -> torch.Tensor:
    return random_rotation(32, 5)


def mirrored(times: int) -> torch.Tensor:
    """Return the true map behind some reflections along directions that are orthogonal to each other."""
    R = true_map()
    for k in range(times):
        R = reflected(R, random_rotation(32, 8)[:, k])
    return R


def tied(R: torch.Tensor) -> Maps:
    return Maps({f"residual.{b}": Rotation(R) for b in range(3)}, {b: {"k": 32} for b in range(3)})


def test_it_is_a_refiner() -> None:
    assert steps() == [Householder]
    assert stage_of(Householder) == "refine"


@pytest.mark.parametrize("planted", [1, 2, 3])
def test_planted_reflections_are_taken_back_two_at_most(setting: Setting, planted: int) -> None:
    pair, activations, out = setting
    before = tied(mirrored(planted))
    maps = Householder(target=1.0).refine(activations, before, pair, out, quiet)
    found = maps.tied()
    assert found is not None
    found.verify(1e-12, "here")
    left = float((found.matrix - true_map()).norm())
    card = maps.diagnostics[1]
    done = card["householder"]
    assert done["reflections"] == min(planted, 2)
    assert done["lowest_eigenvalue_before"] < done["lowest_eigenvalue_shuffled"] < 0
    assert card["cosine_after"] > card["cosine_unreflected"] + 0.05
    assert card["cosine_after"] > card["cosine_shuffled"] + 0.05
    assert done["cosine_after"] > done["cosine_before"]
    assert (card["k"], len(maps.diagnostics)) == (32, 3)
    assert out.notes == {"boundaries 0 to 2": done}
    if planted <= 2:
        assert (
            left < 0.75 < 2 * planted**0.5
        )  # the rows are random: their sample covariance tilts v a little
        assert done["stopped"] == "the lowest eigenvalue is not negative"
        assert done["lowest_eigenvalue"] > 0
    else:
        assert done["stopped"] == "no more reflections are allowed"
        assert done["lowest_eigenvalue"] < 0
    assert torch.equal(before["residual.0"].matrix, mirrored(planted))  # type: ignore[union-attr]


def test_a_planted_reflection_along_a_principal_axis_is_taken_back_exactly(
    setting: Setting,
) -> None:
    pair, activations, out = setting
    wanted = Procrustes().align(activations, Maps(), pair, quiet).tied()
    assert wanted is not None
    from rotdistill_core.alignment.streams import fit_sums

    axis = torch.linalg.eigh(
        wanted.matrix.T @ fit_sums(activations, pair, [0, 1, 2], "here", squares=False).M
    )[1][:, 3]
    maps = Householder(target=1.0).refine(
        activations, tied(reflected(wanted.matrix, axis)), pair, out, quiet
    )
    torch.testing.assert_close(maps.tied().matrix, wanted.matrix, rtol=0, atol=1e-9)  # type: ignore[union-attr]
    assert maps.diagnostics[0]["scale"] == pytest.approx(wanted.scale)


def test_one_reflection_when_one_is_allowed(setting: Setting) -> None:
    pair, activations, out = setting
    maps = Householder(most=1, target=1.0).refine(activations, tied(mirrored(2)), pair, out, quiet)
    assert maps.diagnostics[0]["householder"]["reflections"] == 1
    assert maps.diagnostics[0]["householder"]["stopped"] == "no more reflections are allowed"


def test_it_stops_at_the_target(setting: Setting) -> None:
    pair, activations, out = setting
    before = tied(mirrored(2))
    maps = Householder(target=0.75).refine(activations, before, pair, out, quiet)
    assert maps.diagnostics[0]["householder"]["cosine_before"] > 0.75
    assert maps.diagnostics[0]["householder"]["stopped"] == "the validation cosine is at its target"
    assert maps["residual.0"] is before["residual.0"]
    further = (
        Householder(target=0.9)
        .refine(activations, before, pair, out, quiet)
        .diagnostics[0]["householder"]
    )
    assert (further["reflections"], further["stopped"]) == (
        1,
        "the validation cosine is at its target",
    )
    assert further["lowest_eigenvalue"] < 0


@pytest.mark.parametrize("tie", ["all", 1, 2])
@pytest.mark.parametrize("width", [32, 48])
def test_behind_a_free_procrustes_it_does_nothing_and_says_why(
    tmp_path: Path, samples: Samples, tie: int, width: int
) -> None:
    pair = Pair(
        pico_model(tmp_path / "teacher", seed=9, hidden_size=width), pico_model(tmp_path / "model")
    )
    activations = captured_activations(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs")
    )
    before, out = (
        Procrustes(tie=tie).align(activations, Maps(), pair, quiet),
        pico_output(tmp_path / "again"),
    )
    maps = Householder().refine(activations, before, pair, out, quiet)
    assert all(maps[space] is before[space] for space in before)
    assert len(out.notes) == len({card["stage"] for card in before.diagnostics.values()})
    for b, card in maps.diagnostics.items():
        done = card["householder"]
        assert done in out.notes.values()
        assert (done["reflections"], done["stopped"]) == (
            0,
            "the lowest eigenvalue is not negative",
        )
        assert done["lowest_eigenvalue"] > -1e-9
        assert done["lowest_eigenvalue_shuffled"] < -1e-3
        assert done["cosine_before"] == done["cosine_after"] < 0.75
        assert {
            key: value for key, value in card.items() if key != "householder"
        } == before.diagnostics[b]


def test_a_reflection_that_only_fits_noise_is_not_taken(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, activations, out = setting
    monkeypatch.setattr(Householder, "_cosine", lambda *_: 0.1)
    before = tied(mirrored(1))
    maps = Householder().refine(activations, before, pair, out, quiet)
    assert (
        maps.diagnostics[0]["householder"]["stopped"]
        == "another reflection would not raise the validation cosine"
    )
    assert maps["residual.0"] is before["residual.0"]


def test_without_an_aligner_it_is_refused(setting: Setting) -> None:
    pair, activations, out = setting
    with pytest.raises(RecipeError, match="needs an aligner"):
        Householder().refine(activations, Maps(), pair, out, quiet)


def test_stages_are_runs_of_one_rotation() -> None:
    a, b = (Rotation(random_rotation(4, seed)) for seed in (1, 2))
    maps = Maps(
        {
            "residual.0": a,
            "residual.1": Rotation(a.matrix.clone()),
            "residual.2": b,
            "residual.4": b,
            "neurons.0": a,
        }
    )
    assert [group for group, _ in stages(maps, 5)] == [[0, 1], [2], [4]]


@settings(max_examples=60, deadline=None)
@given(widths, st.integers(0, 6), seeds)
def test_a_reflection_changes_the_error_by_four_times_the_eigenvalue(
    d: int, wider: int, seed: int
) -> None:
    maker = torch.Generator().manual_seed(seed)
    X, T = (torch.randn(50, n, dtype=torch.float64, generator=maker) for n in (d, d + wider))
    R = random_rotation(d + wider, seed)[:d]
    value, v, _ = lowest(R.T @ X.T @ T)

    def error(R: torch.Tensor) -> float:
        return float((X @ R - T).pow(2).sum())

    change = error(reflected(R, v)) - error(R)
    assert change == pytest.approx(4 * value, rel=1e-9, abs=1e-8)
    torch.testing.assert_close(reflected(R, -v), reflected(R, v), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        reflected(R, v) @ reflected(R, v).T, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-12
    )
    for k in range(5):
        other = random_rotation(d + wider, seed + k)[:, 0]
        assert error(reflected(R, other)) - error(R) >= change - 1e-9


def test_the_options_have_bounds() -> None:
    from rotdistill_core.plugin.step import validator_of

    validator = validator_of(Householder)
    for wrong in ({"most": 3}, {"most": 0}, {"target": 0.0}, {"target": 1.5}):
        with pytest.raises(ValueError, match="validation error"):
            validator.validate_python({"use": "householder", **wrong})
