"""The solver alone, on generated truth: found again within tolerance or refused with the reason, whatever the spectrum."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from rotdistill_procrustes.step import Procrustes, complete, orthogonal, powers, roots

from rotdistill_core.alignment.streams import StreamSums, cosine, spectral_gap, sum_streams
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
widths, seeds = st.integers(4, 12), st.integers(0, 10**6)
solvers = st.builds(
    lambda whiten, ridge, shrink: Procrustes(whiten=whiten, ridge=ridge if whiten != "none" else 0.0, shrink=shrink),
    st.sampled_from(["none", "zscore", "full"]), st.sampled_from([0.0, 0.01, 1.0]), st.sampled_from([1.0, 0.8, 0.5]),
)  # fmt: skip


def rows(kind: str, n: int, d: int, seed: int) -> torch.Tensor:
    """Return rows `[n, d]` whose spectrum falls 30-fold, in a random basis, with the fault of their kind."""
    maker = torch.Generator().manual_seed(seed)
    n = d - 2 if kind == "few rows" else n
    spread = torch.logspace(0, -1.5, d, dtype=torch.float64)
    if kind == "rank-deficient":
        spread[d // 2 :] = 0
    Z = torch.randn(n, d, dtype=torch.float64, generator=maker)
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


def sums(S: torch.Tensor, T: torch.Tensor, chunk: int = 10**6) -> StreamSums:
    parts = list(
        zip(S.split(chunk), T.split(chunk), T.roll(len(T) // 2, 0).split(chunk), strict=True)
    )
    return sum_streams([parts], S.shape[1], T.shape[1])


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(KINDS), solvers, widths, st.integers(0, 6), seeds)
def test_a_planted_map_is_found_or_refused_with_the_reason(
    kind: str, solver: Procrustes, d: int, wider: int, seed: int
) -> None:
    S = rows(kind, 20 * d, d, seed)
    planted = random_rotation(d + wider, seed + 1)[:d]
    T = S @ planted
    given_sums = sums(S, T)
    values = torch.linalg.eigvalsh(
        given_sums.centred()[0] if solver.whiten != "none" else given_sums.ss
    ).flip(0)
    k = round(solver.shrink * d)
    try:
        made = solver.solve(given_sums, "here")
    except RotdistillError as error:
        assert "here: shrink keeps" in str(error)
        assert "the variances there are equal" in str(error)
        assert values[k - 1] - values[k] < 1e-8 * values[0]
        event("refused")
        return
    event(f"{kind}, {solver.whiten}")
    scale = float(S.norm(dim=-1).max())
    assert float((S @ made.R - T).abs().max()) < 1e-6 * scale
    assert float((made.R @ made.R.T - torch.eye(d, dtype=torch.float64)).abs().max()) < 1e-12
    if torch.linalg.matrix_rank(S) == d and kind in ("plain", "repeated", "shifted"):
        assert float((made.R - planted).abs().max()) < 1e-6
    assert made.k == k
    assert 0 <= made.gap <= 1


@settings(max_examples=60, deadline=None)
@given(solvers, st.integers(16, 24), seeds)
def test_shuffled_rows_give_no_map(solver: Procrustes, d: int, seed: int) -> None:
    S = torch.randn(
        20 * d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ) * torch.linspace(1, 0.7, d)
    T = S @ random_rotation(d, seed + 1)
    true, null = (solver.solve(each, "here").R for each in (sums(S, T), sums(S, T).shuffled()))
    assert cosine(S @ true, T) > 1 - 1e-9
    assert cosine(S @ null, T) < 0.8


@settings(max_examples=60, deadline=None)
@given(
    solvers,
    st.sampled_from(["plain", "rank-deficient", "few rows", "shifted"]),
    widths,
    st.integers(0, 6),
    seeds,
)
def test_other_signs_chunks_and_threads_give_the_same_map(
    solver: Procrustes, kind: str, d: int, wider: int, seed: int
) -> None:
    S = rows(kind, 20 * d, d, seed)
    noise = torch.randn(
        len(S), d + wider, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 2)
    )
    T = (
        S @ random_rotation(d + wider, seed + 1)[:d]
        + (0 if kind in ("rank-deficient", "few rows") else 0.05) * noise
    )
    expected = solver.solve(sums(S, T), "here").R
    with other_signs(seed):
        assert float((solver.solve(sums(S, T), "here").R - expected).abs().max()) < 1e-10
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = solver.solve(sums(S, T, chunk=7), "here").R
    finally:
        torch.set_num_threads(threads)
    assert float((again - expected).abs().max()) < 1e-10


def test_other_signs_are_seen_where_they_matter() -> None:
    C = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    seen = []
    for seed in range(4):
        with other_signs(seed):
            seen.append(
                (torch.linalg.eigh(C)[1].diagonal().sum(), scipy.linalg.svd(C.numpy())[0].trace())
            )
    assert len(set(seen)) > 1


def test_whitening_hears_quiet_channels() -> None:
    """One loud channel pair disagrees, the many quiet ones agree: only the whitened solves follow the majority."""
    d, maker = 8, torch.Generator().manual_seed(0)
    Q, S = random_rotation(d, 3), torch.randn(4000, d, dtype=torch.float64, generator=maker)
    noise = torch.randn(4000, d, dtype=torch.float64, generator=maker)
    T = S @ Q + 0.3 * noise
    S[:, 0] *= 30
    made = sums(S, T)
    wrong = {
        whiten: float((Procrustes(whiten=whiten).solve(made, "here").R - Q).norm())
        for whiten in ("none", "full")
    }
    assert wrong["full"] < 0.5 * wrong["none"]


def test_ridge_goes_from_the_whitened_solve_to_the_plain_one() -> None:
    S = rows("plain", 200, 8, 0)
    T = S @ random_rotation(8, 1) + 0.3 * rows("plain", 200, 8, 5)
    made = sums(S, T)
    plain, _ = polar(made.centred()[1], "here")
    far = [
        float((Procrustes(whiten="full", ridge=ridge).solve(made, "here").R - plain).norm())
        for ridge in (0.0, 1.0, 1e6)
    ]
    assert far[0] > 0.1
    assert far[0] > far[1] > far[2]
    assert far[2] < 1e-5


def test_z_scores_do_not_depend_on_the_basis_of_the_student() -> None:
    S = rows("plain", 200, 8, 0)
    T = S @ random_rotation(8, 1) + 0.3 * rows("plain", 200, 8, 5)
    Q = random_rotation(8, 7)
    R, turned = (Procrustes(whiten="zscore").solve(sums(X, T), "here").R for X in (S, S @ Q))
    torch.testing.assert_close(Q @ turned, R, rtol=0, atol=1e-9)
    assert float((R - Procrustes().solve(sums(S, T), "here").R).norm()) > 1e-3


def test_shrink_keeps_leading_directions_apart() -> None:
    S = rows("plain", 400, 8, 0)
    T = S @ random_rotation(8, 1) + 0.3 * rows("plain", 400, 8, 5)
    made = sums(S, T)
    solution = Procrustes(shrink=0.5).solve(made, "here")
    P, P_t = (torch.linalg.eigh(C)[1][:, -4:] for C in (made.ss, made.tt))
    assert solution.k == 4
    for inside, outside in (
        (P, P_t),
        (torch.linalg.eigh(made.ss)[1][:, :4], torch.linalg.eigh(made.tt)[1][:, :4]),
    ):
        assert torch.linalg.matrix_norm(inside.T @ solution.R @ outside, 2) > 1 - 1e-9
        lost = float(
            (solution.R.T @ inside - outside @ (outside.T @ solution.R.T @ inside)).abs().max()
        )
        assert lost < 1e-9
    free = Procrustes().solve(made, "here").R
    assert float((P.T @ free @ torch.linalg.eigh(made.tt)[1][:, :4]).abs().max()) > 1e-3
    assert float((free * made.M).sum()) > float((solution.R * made.M).sum())


@settings(max_examples=60, deadline=None)
@given(widths, st.integers(0, 6), st.integers(0, 4), seeds)
def test_what_a_map_leaves_open_is_completed_by_procrustes(
    d: int, wider: int, rank: int, seed: int
) -> None:
    Q = random_rotation(d + wider, seed)[:d]
    S = rows("plain", 20 * d, d, seed + 1)
    inside = torch.linalg.eigh(S.T @ S)[1][:, :rank]
    A = inside @ torch.diag(torch.arange(1.0, rank + 1).double()) @ inside.T @ Q
    torch.testing.assert_close(complete(A, S.T @ S @ Q, "here")[0], Q, rtol=0, atol=1e-9)
    other = complete(A, torch.zeros_like(A), "here")[0]
    torch.testing.assert_close(inside.T @ other, inside.T @ Q, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        other @ other.T, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_small_pieces() -> None:
    values = torch.tensor([4.0, 1.0, 1e-12, 0.0, -1e-15], dtype=torch.float64)
    inverse, root = powers(values, 0.0)
    assert inverse.tolist() == [0.5, 1.0, 0.0, 0.0, 0.0]
    assert root.tolist() == [2.0, 1.0, 0.0, 0.0, 0.0]
    assert powers(torch.zeros(3, dtype=torch.float64), 0.0)[0].tolist() == [0.0] * 3
    C = rows("plain", 50, 5, 0).T @ rows("plain", 50, 5, 0)
    W, half = roots(C, 0.0, "here")
    torch.testing.assert_close(W @ C @ W, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(half @ half, C, rtol=0, atol=1e-9)
    S = torch.tensor([4.0, 3.0, 1.0])
    assert [spectral_gap(S, k) for k in range(4)] == [0.0, 0.25, 0.5, 0.25]
    M = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    assert orthogonal(M, "here")[0].diagonal().abs().tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close(polar(M, "here")[0], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "solver",
    [Procrustes(), Procrustes(shrink=0.5), Procrustes(whiten="full"), Procrustes(whiten="zscore")],
)
def test_sums_that_are_not_finite_never_reach_lapack(
    bad: float, solver: Procrustes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("LAPACK was called")

    S = rows("plain", 50, 5, 0)
    S[3, 2] = bad
    made = sums(S, rows("plain", 50, 5, 0))
    monkeypatch.setattr(scipy.linalg, "svd", called)
    monkeypatch.setattr(torch.linalg, "eigh", called)
    with pytest.raises(RotdistillError, match=r"here: \d+ of 25 values are NaN or Inf"):
        solver.solve(made, "here")
