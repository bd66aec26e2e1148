"""The solve of one stage on generated truth: recovered, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from rotdistill_procrustes._method import solve_stage
from rotdistill_procrustes.step import Procrustes

from rotdistill_core.alignment.streams import StreamSums, cosine
from rotdistill_core.errors import RotdistillError
from rotdistill_core.linalg.solvers import polar
from rotdistill_core.testing import other_signs, random_rotation

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
WIDTHS = st.integers(4, 12)
SEEDS = st.integers(0, 10**6)


def with_options(whiten: Any, ridge: float, shrink: float) -> Procrustes:
    """Return a step; a ridge without whitening is refused, so it is left out there."""
    return Procrustes(whiten=whiten, ridge=ridge if whiten != "none" else 0.0, shrink=shrink)


STEPS = st.builds(
    with_options,
    st.sampled_from(["none", "zscore", "full"]),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.sampled_from([1.0, 0.8, 0.5]),
)


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=250, deadline=None)
@given(kind=st.sampled_from(KINDS), step=STEPS, d=WIDTHS, wider=st.integers(0, 6), seed=SEEDS)
def test_a_planted_map_is_recovered_or_refused_with_the_reason(
    planted_rows: Rows, sums_of: Sums, kind: str, step: Procrustes, d: int, wider: int, seed: int
) -> None:
    S = planted_rows(kind, 20 * d, d, seed)
    planted = random_rotation(d + wider, seed + 1)[:d]
    T = S @ planted
    sums = sums_of(S, T)
    C_ss = sums.centred()[0] if step.whiten != "none" else sums.C_ss
    variances = torch.linalg.eigvalsh(C_ss).flip(0)
    k = round(step.shrink * d)
    try:
        solution = solve_stage(step, sums, "here")
    except RotdistillError as error:
        assert "here: shrink keeps" in str(error)
        assert "the variances there are equal" in str(error)
        assert variances[k - 1] - variances[k] < 1e-8 * variances[0]
        event("refused")
        return
    event(f"{kind}, {step.whiten}")
    longest = float(S.norm(dim=-1).max())
    eye = torch.eye(d, dtype=torch.float64)
    assert float((S @ solution.R - T).abs().max()) < 1e-6 * longest
    assert float((solution.R @ solution.R.T - eye).abs().max()) < 1e-12
    if torch.linalg.matrix_rank(S) == d and kind in ("plain", "repeated", "shifted"):
        assert float((solution.R - planted).abs().max()) < 1e-6
    assert solution.k == k
    assert 0 <= solution.gap <= 1


@settings(max_examples=60, deadline=None)
@given(step=STEPS, d=st.integers(16, 24), seed=SEEDS)
def test_shuffled_rows_give_no_map(sums_of: Sums, step: Procrustes, d: int, seed: int) -> None:
    S = gaussian(20 * d, d, seed) * torch.linspace(1, 0.7, d)
    T = S @ random_rotation(d, seed + 1)
    sums = sums_of(S, T)
    fitted = solve_stage(step, sums, "here").R
    null = solve_stage(step, sums.shuffled(), "here").R
    assert cosine(S @ fitted, T) > 1 - 1e-9
    assert cosine(S @ null, T) < 0.8


@settings(max_examples=60, deadline=None)
@given(
    step=STEPS,
    kind=st.sampled_from(["plain", "rank-deficient", "few rows", "shifted"]),
    d=WIDTHS,
    wider=st.integers(0, 6),
    seed=SEEDS,
)
def test_other_signs_chunks_and_threads_give_the_same_map(
    planted_rows: Rows, sums_of: Sums, step: Procrustes, kind: str, d: int, wider: int, seed: int
) -> None:
    S = planted_rows(kind, 20 * d, d, seed)
    noise = 0.0 if kind in ("rank-deficient", "few rows") else 0.05
    T = S @ random_rotation(d + wider, seed + 1)[:d]
    T = T + noise * gaussian(len(S), d + wider, seed + 2)
    expected = solve_stage(step, sums_of(S, T), "here").R
    with other_signs(seed):
        flipped = solve_stage(step, sums_of(S, T), "here").R
    assert float((flipped - expected).abs().max()) < 1e-10
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = solve_stage(step, sums_of(S, T, chunk=7), "here").R
    finally:
        torch.set_num_threads(threads)
    assert float((again - expected).abs().max()) < 1e-10


def test_other_signs_change_what_depends_on_signs() -> None:
    C = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    signs = set()
    for seed in range(4):
        with other_signs(seed):
            vectors = torch.linalg.eigh(C)[1]
            U = scipy.linalg.svd(C.numpy())[0]
        signs.add((float(vectors.diagonal().sum()), float(U.trace())))
    assert len(signs) > 1


def test_whitening_weighs_quiet_channels_as_much_as_loud_ones(sums_of: Sums) -> None:
    """One loud channel disagrees, the many quiet ones agree: only whitening follows them."""
    d = 8
    generator = torch.Generator().manual_seed(0)
    Q = random_rotation(d, 3)
    S = torch.randn(4000, d, dtype=torch.float64, generator=generator)
    T = S @ Q + 0.3 * torch.randn(4000, d, dtype=torch.float64, generator=generator)
    S[:, 0] *= 30
    sums = sums_of(S, T)
    plain = float((solve_stage(Procrustes(), sums, "here").R - Q).norm())
    whitened = float((solve_stage(Procrustes(whiten="full"), sums, "here").R - Q).norm())
    assert whitened < 0.5 * plain


def test_ridge_leads_from_the_whitened_solve_to_the_plain_one(
    planted_rows: Rows, sums_of: Sums
) -> None:
    S = planted_rows("plain", 200, 8, 0)
    T = S @ random_rotation(8, 1) + 0.3 * planted_rows("plain", 200, 8, 5)
    sums = sums_of(S, T)
    plain, _ = polar(sums.centred()[1], "here")
    distances = [
        float((solve_stage(Procrustes(whiten="full", ridge=ridge), sums, "here").R - plain).norm())
        for ridge in (0.0, 1.0, 1e6)
    ]
    assert distances[0] > 0.1
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-5


def test_z_scores_do_not_depend_on_the_basis_of_the_student(
    planted_rows: Rows, sums_of: Sums
) -> None:
    S = planted_rows("plain", 200, 8, 0)
    T = S @ random_rotation(8, 1) + 0.3 * planted_rows("plain", 200, 8, 5)
    Q = random_rotation(8, 7)
    step = Procrustes(whiten="zscore")
    R = solve_stage(step, sums_of(S, T), "here").R
    turned = solve_stage(step, sums_of(S @ Q, T), "here").R
    torch.testing.assert_close(Q @ turned, R, rtol=0, atol=1e-9)
    assert float((R - solve_stage(Procrustes(), sums_of(S, T), "here").R).norm()) > 1e-3


def test_shrink_keeps_leading_directions_apart(planted_rows: Rows, sums_of: Sums) -> None:
    S = planted_rows("plain", 400, 8, 0)
    T = S @ random_rotation(8, 1) + 0.3 * planted_rows("plain", 400, 8, 5)
    sums = sums_of(S, T)
    solution = solve_stage(Procrustes(shrink=0.5), sums, "here")
    assert solution.k == 4
    student, teacher = torch.linalg.eigh(sums.C_ss)[1], torch.linalg.eigh(sums.C_tt)[1]
    for half in (slice(4, None), slice(None, 4)):
        P, P_t = student[:, half], teacher[:, half]
        assert torch.linalg.matrix_norm(P.T @ solution.R @ P_t, 2) > 1 - 1e-9
        mapped = solution.R.T @ P
        assert float((mapped - P_t @ (P_t.T @ mapped)).abs().max()) < 1e-9
    free = solve_stage(Procrustes(), sums, "here").R
    assert float((student[:, 4:].T @ free @ teacher[:, :4]).abs().max()) > 1e-3
    assert float((free * sums.C_st).sum()) > float((solution.R * sums.C_st).sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "step",
    [Procrustes(), Procrustes(shrink=0.5), Procrustes(whiten="full"), Procrustes(whiten="zscore")],
)
def test_sums_that_are_not_finite_never_reach_lapack(
    planted_rows: Rows,
    sums_of: Sums,
    bad: float,
    step: Procrustes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("LAPACK was called")

    rows = planted_rows("plain", 50, 5, 0)
    sums = sums_of(rows, rows)
    broken = torch.zeros(5, 5, dtype=torch.float64)
    broken[3, 2] = bad
    sums = replace(sums, C_st=sums.C_st + broken, C_ss=sums.C_ss + broken)
    monkeypatch.setattr(scipy.linalg, "svd", called)
    monkeypatch.setattr(torch.linalg, "eigh", called)
    with pytest.raises(RotdistillError, match=r"here: \d+ of 25 values are NaN or Inf"):
        solve_stage(step, sums, "here")
