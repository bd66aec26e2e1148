"""Canonical directions on planted truth: what both streams share is carried over, what they do not share has no say."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_basis_fold.step import BasisFold
from rotdistill_procrustes.cca import Cca, steps
from rotdistill_procrustes.step import Procrustes

from rotdistill_core.alignment.streams import StreamSums, cosine, spectral_gap, sum_streams
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.testing import (
    captured_activations,
    logits,
    other_signs,
    pico_model,
    pico_output,
    pico_samples,
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
solvers = st.builds(
    Cca,
    shrinkage=st.sampled_from([0.0, 0.01, 0.5]),
    correlation=st.sampled_from([None, 0.0, 0.6, 1.0]),
)
widths, seeds = st.integers(4, 12), st.integers(0, 10**6)


@pytest.fixture
def samples() -> Samples:
    return pico_samples()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "model", num_hidden_layers=3)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def noise(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(kind: str, n: int, d: int, seed: int) -> torch.Tensor:
    n = d - 2 if kind == "few rows" else n
    spread = torch.logspace(0, -1.5, d, dtype=torch.float64)
    if kind == "rank-deficient":
        spread[d // 2 :] = 0
    Z = noise(n, d, seed)
    if kind == "repeated":
        spread, Z = (
            torch.where(torch.arange(d) < d // 2, 1.0, 0.3).double(),
            torch.linalg.qr(Z).Q * n**0.5,
        )
    X = (Z * spread) @ random_rotation(d, seed)
    if kind == "constant channel":
        X[:, 1] = 0.7
    if kind == "duplicated channel":
        X[:, 1] = X[:, 0]
    return X + 2.0 if kind == "shifted" else X


def sums(S: torch.Tensor, T: torch.Tensor) -> StreamSums:
    return sum_streams([[(S, T, T.roll(len(T) // 2, 0))]], S.shape[1], T.shape[1])


def test_it_is_an_aligner() -> None:
    assert steps() == [Cca]
    assert stage_of(Cca) == "align"


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(KINDS), solvers, widths, st.integers(0, 6), seeds)
def test_a_planted_map_is_found(kind: str, solver: Cca, d: int, wider: int, seed: int) -> None:
    S = rows(kind, 20 * d, d, seed)
    planted = random_rotation(d + wider, seed + 1)[:d]
    made = solver.solve(sums(S, S @ planted), "here")
    assert float((S @ (made.R - planted)).abs().max()) < 1e-6 * float(S.norm(dim=-1).max())
    assert float((made.R @ made.R.T - torch.eye(d, dtype=torch.float64)).abs().max()) < 1e-12
    if kind in ("plain", "repeated", "shifted"):
        assert float((made.R - planted).abs().max()) < 1e-6
    assert float(made.spectrum.max()) <= 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(solvers, st.integers(16, 24), seeds)
def test_shuffled_rows_give_no_map(solver: Cca, d: int, seed: int) -> None:
    S = noise(20 * d, d, seed) * torch.linspace(1, 0.7, d)
    T = S @ random_rotation(d, seed + 1)
    true, null = (solver.solve(each, "here") for each in (sums(S, T), sums(S, T).shuffled()))
    assert cosine(S @ true.R, T) > 1 - 1e-9
    assert cosine(S @ null.R, T) < 0.8
    assert solver.correlation is not None or null.k < true.k


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0.0, 0.01, 0.5]), widths, st.integers(0, 6), seeds)
def test_other_signs_give_the_same_map(shrinkage: float, d: int, wider: int, seed: int) -> None:
    S = rows("plain", 20 * d, d, seed)
    made = sums(
        S, S @ random_rotation(d + wider, seed + 1)[:d] + 0.05 * noise(len(S), d + wider, seed + 2)
    )
    expected = Cca(shrinkage=shrinkage).solve(made, "here").R
    with other_signs(seed):
        assert (
            float((Cca(shrinkage=shrinkage).solve(made, "here").R - expected).abs().max()) < 1e-10
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(0, 6), seeds)
def test_it_counts_what_is_shared_and_follows_it_under_loud_strangers(
    shared: int, wider: int, seed: int
) -> None:
    """Both streams hold the same few variates, and louder ones of their own that have nothing to do with each other."""
    n, d = 8000, 10
    Z = noise(n, shared, seed)
    frame_s, frame_t = random_rotation(d, seed), random_rotation(d + wider, seed + 1)
    S = torch.cat([Z, 5 * noise(n, d - shared, seed + 2)], 1) @ frame_s
    T = torch.cat([Z, 5 * noise(n, d + wider - shared, seed + 3)], 1) @ frame_t
    made = Cca().solve(sums(S, T), "here")
    assert shared <= made.k <= shared + 5  # one shuffle is one draw: a stranger may pass it
    assert spectral_gap(made.spectrum, shared) > 0.5
    carried = frame_s[:shared] @ made.R @ frame_t[:shared].T
    assert float((carried - torch.eye(shared, dtype=torch.float64)).abs().max()) < 0.15
    unshared = Cca().solve(sums(S, noise(n, d + wider, seed + 4)), "here")
    assert unshared.k <= 5


def test_shared_pairs_are_those_of_the_generalised_eigenproblem() -> None:
    """The student's canonical directions a are carried onto the patterns `C_t b` by which the teacher's variates show."""
    S = rows("plain", 400, 8, 0)
    T = S @ random_rotation(10, 1)[:8] + 0.3 * noise(400, 10, 2) * torch.linspace(1, 3, 10)
    made = Cca(shrinkage=0.0, correlation=0.3).solve(sums(S, T), "here")
    C_s, C_st, C_t = sums(S, T).centred()
    values, a = scipy.linalg.eigh((C_st @ torch.linalg.solve(C_t, C_st.T)).numpy(), C_s.numpy())
    torch.testing.assert_close(
        made.spectrum, torch.from_numpy(values[::-1].clip(0) ** 0.5), rtol=0, atol=1e-9
    )
    assert 0 < made.k == int((values > 0.09).sum()) < 8
    directions = torch.from_numpy(a[:, -made.k :].copy())
    patterns = (directions.T @ C_st).T  # C_t b is C_ts a, up to length
    bases = [torch.linalg.qr(X).Q for X in (directions, patterns)]
    carried = torch.linalg.svdvals(bases[0].T @ made.R @ bases[1])
    torch.testing.assert_close(carried, torch.ones(made.k, dtype=torch.float64), rtol=0, atol=1e-8)


def test_with_nothing_shared_it_is_procrustes() -> None:
    S = rows("shifted", 200, 8, 0)
    made = sums(S, S @ random_rotation(8, 1) + 0.3 * noise(200, 8, 2))
    none = Cca(correlation=1.0).solve(made, "here")
    assert (none.k, none.gap) == (0, 0.0)
    torch.testing.assert_close(none.R, Procrustes().solve(made, "here").R, rtol=0, atol=1e-10)
    assert float((Cca().solve(made, "here").R - none.R).norm()) > 1e-3


@pytest.mark.parametrize("tie", ["all", 1, 2])
@pytest.mark.parametrize("shrinkage", [0.0, 0.01])
def test_a_planted_rotation_is_found_again_from_the_capture(
    tmp_path: Path, model: Model, samples: Samples, tie: Literal["all"] | int, shrinkage: float
) -> None:
    twin, Q = rotated_twin(model, tmp_path / "twin", 4)
    pair = Pair(model, twin)
    activations = captured_activations(pair, twin.weights, samples, pico_output(tmp_path / "runs"))
    maps = Cca(tie=tie, shrinkage=shrinkage).align(activations, Maps(), pair, quiet)
    assert (maps.tied() is not None) is (tie == "all")
    for boundary in range(4):
        found = maps.rotation(boundary)
        assert found is not None
        torch.testing.assert_close(found.matrix, Q.T, rtol=0, atol=1e-6)
        assert maps.diagnostics[boundary]["centred_after"] == pytest.approx(1, abs=1e-9)
        assert maps.diagnostics[boundary]["centred_shuffled"] < 0.5


def test_it_takes_the_place_of_procrustes(tmp_path: Path, model: Model, samples: Samples) -> None:
    """The same calls, the same card keys, and a fold behind it that leaves the logits alone."""
    pair, out = (
        Pair(pico_model(tmp_path / "wide", seed=9, hidden_size=48, num_hidden_layers=3), model),
        pico_output(tmp_path / "runs"),
    )
    activations = captured_activations(pair, model.weights, samples, out)
    keys = set()
    for aligner in (Procrustes(), Cca()):
        maps = aligner.align(activations, Maps(), pair, quiet)
        keys.add(tuple(sorted(maps.diagnostics[2])))
        assert maps.diagnostics[2]["aligner"] == aligner.use
        folded = BasisFold(mode="canonical").fold(
            model.weights, maps, activations, pair, pico_output(tmp_path / aligner.use)
        )
        layout = samples.layout.select("heldout")
        assert float((logits(folded, layout) - logits(model.weights, layout)).abs().max()) < 1e-9
    assert len(keys) == 1


def test_what_cannot_be_aligned_is_refused(tmp_path: Path, model: Model, samples: Samples) -> None:
    wide = pico_model(tmp_path / "wide", hidden_size=48, num_hidden_layers=3)
    activations = captured_activations(
        Pair(model, wide), wide.weights, samples, pico_output(tmp_path / "runs")
    )
    with pytest.raises(
        RecipeError, match=r"cca: the student is wider \(48\) than the teacher \(32\)"
    ):
        Cca().align(activations, Maps(), Pair(model, wide), quiet)


def test_rows_that_are_not_finite_stop_before_any_solve(
    tmp_path: Path, model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("LAPACK was called")

    activations = captured_activations(
        Pair(model, model), model.weights, samples, pico_output(tmp_path / "runs")
    )
    rows_of = ActivationStore.rows

    def broken(activations: ActivationStore, side: str, boundary: int) -> torch.Tensor:
        states = rows_of(activations, side, boundary).clone()
        states[40, 3] = float("inf") if (side, boundary) == ("teacher", 2) else 1.0
        return states

    monkeypatch.setattr(ActivationStore, "rows", broken)
    monkeypatch.setattr(scipy.linalg, "svd", called)
    monkeypatch.setattr(torch.linalg, "eigh", called)
    with pytest.raises(
        RotdistillError,
        match=r"cca: teacher .*model, layer boundary 2, site residual: 1 of \d+ values",
    ):
        Cca().align(activations, Maps(), Pair(model, model), quiet)
