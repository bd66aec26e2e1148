"""The map in front of the head: planted truth, never worse, and what is put together stays what it was."""

from __future__ import annotations

import pytest
import torch
from rotdistill_lm_head_ridge._kl_head import Lesson, fit_map, lesson, likeliest
from torch import Tensor

from rotdistill_core.errors import RotdistillError


def problem(
    seed: int = 0, n: int = 400, d: int = 6, V: int = 40, size: float = 0.4
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, a head, and a planted map; channels of very different size."""
    maker = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=maker) * torch.logspace(-1, 1, d)
    H = torch.randn(V, d, generator=maker) / torch.logspace(-1, 1, d)
    return (
        X,
        H,
        size
        * torch.randn(d, d, generator=maker)
        / torch.logspace(-1, 1, d)[:, None]
        * torch.logspace(-1, 1, d),
    )


def lessons(X: Tensor, H: Tensor, M: Tensor, tokens: Tensor) -> Lesson:
    said = ((X + X @ M) @ H.T).log_softmax(-1)
    return lesson(lambda a, b: said[a:b], lambda a, b: X[a:b] @ H.T, len(X), tokens)


def quiet(*_: object) -> None:
    """Listen to nothing."""


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_map_is_found_from_probabilities_alone(seed: int) -> None:
    X, H, M = problem(seed)
    fit, held = (lessons(rows, H, M, torch.arange(40)) for rows in (X[:300], X[300:]))

    def judge(N: Tensor) -> float:
        return float(held.kl((X[300:] + X[300:] @ N) @ H.T).mean())

    found = fit_map(X[:300], H, fit, judge, 0.0, 60, quiet)
    start = judge(torch.zeros_like(M))
    assert start > 0.05
    assert judge(found) < 1e-4 * start
    logits, wanted = ((X + X @ N) @ H.T for N in (found, M))
    torch.testing.assert_close(logits.log_softmax(-1), wanted.log_softmax(-1), rtol=0, atol=0.1)


def test_a_stronger_anchor_moves_less() -> None:
    X, H, M = problem()
    fit = lessons(X, H, M, torch.arange(40))
    moved = []
    for strength in (0.0, 1e-2, 1e2):
        found = fit_map(
            X, H, fit, lambda N: float(fit.kl((X + X @ N) @ H.T).mean()), strength, 30, quiet
        )
        moved.append(float((X @ found @ H.T).pow(2).mean()))
    assert moved[0] > moved[1] > 10 * moved[2]


def test_what_validation_does_not_like_is_not_taken() -> None:
    X, H, M = problem()
    fit, against = lessons(X, H, M, torch.arange(40)), lessons(X, H, -M, torch.arange(40))
    found = fit_map(
        X, H, fit, lambda N: float(against.kl((X + X @ N) @ H.T).mean()), 0.0, 30, quiet
    )
    assert torch.equal(found, torch.zeros_like(M))


def test_tokens_put_together_keep_their_weight() -> None:
    X, H, M = problem()
    some = torch.tensor([1, 5, 7, 30])
    made = lessons(X, H, M, some)
    torch.testing.assert_close(made.p.sum(-1), torch.ones(len(X)))
    said, own = ((X + X @ M) @ H.T).log_softmax(-1), (X @ H.T).log_softmax(-1)
    whole = (said.exp() * (said - own)).sum(-1)
    together = made.kl(X @ H[some].T)
    assert (together <= whole + 1e-5).all()  # a coarser partition tells less apart
    torch.testing.assert_close(
        lessons(X, H, M, torch.arange(40)).kl(X @ H.T), whole, rtol=1e-4, atol=1e-5
    )


def test_the_likeliest_tokens_of_either_are_told_apart() -> None:
    said = torch.full((5, 50), -20.0)
    said[:, 3], said[0, 9] = 0.0, -0.1
    made = torch.zeros(5, 50)
    made[:, 17] = 30.0
    chosen = likeliest(lambda a, b: said[a:b].log_softmax(-1), lambda a, b: made[a:b], 5, 3, each=2)
    assert chosen.tolist() == [3, 9, 17]


def test_rows_that_are_not_finite_are_refused() -> None:
    X, H, M = problem()
    fit = lessons(X, H, M, torch.arange(40))
    X[3, 2] = torch.nan
    with pytest.raises(RotdistillError, match="head map: rows: 1 of 2400 values"):
        fit_map(X, H, fit, lambda _: 0.0, 0.0, 3, quiet)
