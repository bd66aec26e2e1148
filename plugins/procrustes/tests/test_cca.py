"""Canonical directions on planted truth: shared ones are mapped, others have no influence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_basis_fold.step import BasisFold
from rotdistill_procrustes import _method
from rotdistill_procrustes._cca import solve_stage
from rotdistill_procrustes.cca import Cca, steps
from rotdistill_procrustes.step import Procrustes

from rotdistill_core.alignment.streams import StreamSums, cosine, spectral_gap
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.testing import (
    STEP_CHECKS,
    a_planted_rotation_is_found,
    captured_activations,
    logits,
    other_signs,
    parametrize_with_checks,
    pico_model,
    pico_output,
    random_rotation,
    rotated_twin,
)

KINDS = [
    "plain",
    "rank-deficient",
    "few rows",
    "repeated",
    "constant channel",
    "duplicated channel",
    "shifted",
]
Rows = Callable[..., torch.Tensor]
Sums = Callable[..., StreamSums]
STEPS = st.builds(
    Cca,
    shrinkage=st.sampled_from([0.0, 0.01, 0.5]),
    min_correlation=st.sampled_from([None, 0.0, 0.6, 1.0]),
)
WIDTHS = st.integers(4, 12)
SEEDS = st.integers(0, 10**6)


@parametrize_with_checks(
    Cca,
    {},
    {"tie": 1},
    {"shrinkage": 0.0, "min_correlation": 0.3},
    checks=(*STEP_CHECKS, a_planted_rotation_is_found),
)
def test_cca_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def quiet(*_: object) -> None:
    """Ignore progress."""


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def eye(d: int) -> torch.Tensor:
    return torch.eye(d, dtype=torch.float64)


def test_the_plugin_offers_the_step() -> None:
    assert steps() == [Cca]


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(KINDS), step=STEPS, d=WIDTHS, wider=st.integers(0, 6), seed=SEEDS)
def test_a_planted_map_is_recovered(
    planted_rows: Rows, sums_of: Sums, kind: str, step: Cca, d: int, wider: int, seed: int
) -> None:
    S = planted_rows(kind, 20 * d, d, seed)
    planted = random_rotation(d + wider, seed + 1)[:d]
    solution = solve_stage(step, sums_of(S, S @ planted), "here")
    longest = float(S.norm(dim=-1).max())
    assert float((S @ (solution.R - planted)).abs().max()) < 1e-6 * longest
    assert float((solution.R @ solution.R.T - eye(d)).abs().max()) < 1e-12
    if kind in ("plain", "repeated", "shifted"):
        assert float((solution.R - planted).abs().max()) < 1e-6
    assert float(solution.spectrum.max()) <= 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(step=STEPS, d=st.integers(16, 24), seed=SEEDS)
def test_shuffled_rows_give_no_map(sums_of: Sums, step: Cca, d: int, seed: int) -> None:
    S = gaussian(20 * d, d, seed) * torch.linspace(1, 0.7, d)
    T = S @ random_rotation(d, seed + 1)
    fitted = solve_stage(step, sums_of(S, T), "here")
    null = solve_stage(step, sums_of(S, T).shuffled(), "here")
    assert cosine(S @ fitted.R, T) > 1 - 1e-9
    assert cosine(S @ null.R, T) < 0.8
    assert step.min_correlation is not None or null.k < fitted.k


@settings(max_examples=40, deadline=None)
@given(shrinkage=st.sampled_from([0.0, 0.01, 0.5]), d=WIDTHS, wider=st.integers(0, 6), seed=SEEDS)
def test_other_signs_give_the_same_map(
    planted_rows: Rows, sums_of: Sums, shrinkage: float, d: int, wider: int, seed: int
) -> None:
    S = planted_rows("plain", 20 * d, d, seed)
    T = S @ random_rotation(d + wider, seed + 1)[:d]
    T = T + 0.05 * gaussian(len(S), d + wider, seed + 2)
    step, sums = Cca(shrinkage=shrinkage), sums_of(S, T)
    expected = solve_stage(step, sums, "here").R
    with other_signs(seed):
        flipped = solve_stage(step, sums, "here").R
    assert float((flipped - expected).abs().max()) < 1e-10


@settings(max_examples=30, deadline=None)
@given(shared=st.integers(2, 5), wider=st.integers(0, 6), seed=SEEDS)
def test_shared_directions_are_counted_and_mapped_among_louder_ones(
    sums_of: Sums, shared: int, wider: int, seed: int
) -> None:
    """Both streams hold the same few variates, and louder ones that are independent."""
    n, d = 8000, 10
    Z = gaussian(n, shared, seed)
    frame_s, frame_t = random_rotation(d, seed), random_rotation(d + wider, seed + 1)
    S = torch.cat([Z, 5 * gaussian(n, d - shared, seed + 2)], 1) @ frame_s
    T = torch.cat([Z, 5 * gaussian(n, d + wider - shared, seed + 3)], 1) @ frame_t
    solution = solve_stage(Cca(), sums_of(S, T), "here")
    # One shuffle is one draw: independent directions may pass it by chance.
    assert shared <= solution.k <= shared + 5
    assert spectral_gap(solution.spectrum, shared) > 0.5
    mapped = frame_s[:shared] @ solution.R @ frame_t[:shared].T
    assert float((mapped - eye(shared)).abs().max()) < 0.15
    independent = gaussian(n, d + wider, seed + 4)
    assert solve_stage(Cca(), sums_of(S, independent), "here").k <= 5


def test_shared_pairs_are_those_of_the_generalised_eigenproblem(
    planted_rows: Rows, sums_of: Sums
) -> None:
    """R maps the student's canonical directions a onto the teacher's patterns `C_tt b`."""
    S = planted_rows("plain", 400, 8, 0)
    T = S @ random_rotation(10, 1)[:8] + 0.3 * gaussian(400, 10, 2) * torch.linspace(1, 3, 10)
    sums = sums_of(S, T)
    solution = solve_stage(Cca(shrinkage=0.0, min_correlation=0.3), sums, "here")
    C_ss, C_st, C_tt = sums.centred()
    squares, a = scipy.linalg.eigh((C_st @ torch.linalg.solve(C_tt, C_st.T)).numpy(), C_ss.numpy())
    correlations = torch.from_numpy(squares[::-1].clip(0) ** 0.5)
    torch.testing.assert_close(solution.spectrum, correlations, rtol=0, atol=1e-9)
    assert 0 < solution.k == int((squares > 0.09).sum()) < 8
    directions = torch.from_numpy(a[:, -solution.k :].copy())
    patterns = (directions.T @ C_st).T  # C_tt b is C_ts a, up to length
    before, after = torch.linalg.qr(directions).Q, torch.linalg.qr(patterns).Q
    overlap = torch.linalg.svdvals(before.T @ solution.R @ after)
    ones = torch.ones(solution.k, dtype=torch.float64)
    torch.testing.assert_close(overlap, ones, rtol=0, atol=1e-8)


def test_streams_that_share_nothing_get_the_map_of_procrustes(
    planted_rows: Rows, sums_of: Sums
) -> None:
    S = planted_rows("shifted", 200, 8, 0)
    sums = sums_of(S, S @ random_rotation(8, 1) + 0.3 * gaussian(200, 8, 2))
    nothing = solve_stage(Cca(min_correlation=1.0), sums, "here")
    procrustes = _method.solve_stage(Procrustes(), sums, "here")
    assert (nothing.k, nothing.gap) == (0, 0.0)
    torch.testing.assert_close(nothing.R, procrustes.R, rtol=0, atol=1e-10)
    assert float((solve_stage(Cca(), sums, "here").R - nothing.R).norm()) > 1e-3


@pytest.mark.parametrize("tie", ["all", 1, 2])
@pytest.mark.parametrize("shrinkage", [0.0, 0.01])
def test_a_planted_rotation_is_recovered_from_the_capture(
    tmp_path: Path, model: Model, samples: Samples, tie: Literal["all"] | int, shrinkage: float
) -> None:
    twin, Q = rotated_twin(model, tmp_path / "twin", 4)
    pair = Pair(model, twin)
    activations = captured_activations(pair, twin.weights, samples, pico_output(tmp_path / "runs"))
    maps = Cca(tie=tie, shrinkage=shrinkage).align(activations, Maps(), pair, quiet)
    assert (maps.tied() is not None) is (tie == "all")
    for boundary in range(4):
        rotation = maps.rotation(boundary)
        assert rotation is not None
        torch.testing.assert_close(rotation.matrix, Q.T, rtol=0, atol=1e-6)
        assert maps.diagnostics[boundary].centred_after == pytest.approx(1, abs=1e-9)
        assert maps.diagnostics[boundary].centred_shuffled < 0.5


def measured(figures: LayerDiagnostics) -> set[str]:
    return {f.name for f in fields(figures) if getattr(figures, f.name) is not None}


def test_cca_replaces_procrustes(tmp_path: Path, model: Model, samples: Samples) -> None:
    """The same call, the same figures, and a fold after it that leaves the logits alone."""
    wide = pico_model(tmp_path / "wide", seed=9, hidden_size=48, num_hidden_layers=3)
    pair, out = Pair(wide, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    layout = samples.layout.select("heldout")
    before = logits(model.weights, layout)
    of_aligner: dict[str, Any] = {}
    for aligner in (Procrustes(), Cca()):
        maps = aligner.align(activations, Maps(), pair, quiet)
        of_aligner[aligner.use] = measured(maps.diagnostics[2])
        assert maps.diagnostics[2].aligner == aligner.use
        fold_output = pico_output(tmp_path / aligner.use)
        fold = BasisFold(mode="canonical")
        folded = fold.fold(model.weights, maps, activations, pair, fold_output)
        assert float((logits(folded, layout) - before).abs().max()) < 1e-9
    assert of_aligner["cca"] == of_aligner["procrustes"]


def test_a_wider_student_is_refused(tmp_path: Path, model: Model, samples: Samples) -> None:
    wide = pico_model(tmp_path / "wide", hidden_size=48, num_hidden_layers=3)
    pair, out = Pair(model, wide), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, wide.weights, samples, out)
    with pytest.raises(
        RecipeError, match=r"cca: the student is wider \(48\) than the teacher \(32\)"
    ):
        Cca().align(activations, Maps(), pair, quiet)


def test_rows_that_are_not_finite_stop_before_any_solve(
    tmp_path: Path, model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("LAPACK was called")

    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    read_rows = ActivationStore.rows

    def broken(store: ActivationStore, side: str, boundary: int) -> torch.Tensor:
        states = read_rows(store, side, boundary).clone()
        states[40, 3] = float("inf") if (side, boundary) == ("teacher", 2) else 1.0
        return states

    monkeypatch.setattr(ActivationStore, "rows", broken)
    monkeypatch.setattr(scipy.linalg, "svd", called)
    monkeypatch.setattr(torch.linalg, "eigh", called)
    with pytest.raises(
        RotdistillError,
        match=r"cca: teacher .*model, layer boundary 2, site residual: 1 of \d+ values",
    ):
        Cca().align(activations, Maps(), pair, quiet)
