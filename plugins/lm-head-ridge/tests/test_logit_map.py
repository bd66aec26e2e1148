"""The map before the head: planted truth, never worse, and a coarser vocabulary loses only KL."""

from __future__ import annotations

import pytest
import torch
from rotdistill_lm_head_ridge._logit_map import (
    ReducedTargets,
    fit_logit_map,
    reduced_targets,
    top_tokens,
)
from torch import Tensor

from rotdistill_core.errors import RotdistillError

ALL_TOKENS = torch.arange(40)


def problem(
    seed: int = 0, n: int = 400, d: int = 6, V: int = 40, size: float = 0.4
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, a head, and a planted map; channels differ in size by a factor of 100."""
    maker = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, d)
    X = torch.randn(n, d, generator=maker) * scale
    H = torch.randn(V, d, generator=maker) / scale
    M = size * torch.randn(d, d, generator=maker) / scale[:, None] * scale
    return X, H, M


def mapped_logits(X: Tensor, H: Tensor, M: Tensor) -> Tensor:
    return (X + X @ M) @ H.T


def targets_of(X: Tensor, H: Tensor, M: Tensor, tokens: Tensor) -> ReducedTargets:
    """Return the targets of a teacher that is the student with a map."""
    log_probs = mapped_logits(X, H, M).log_softmax(-1)
    return reduced_targets(
        lambda rows: log_probs[rows], lambda rows: X[rows] @ H.T, torch.arange(len(X)), tokens
    )


def quiet(*_: object) -> None:
    """Take progress and show nothing."""


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_map_is_found_from_probabilities_alone(seed: int) -> None:
    X, H, M = problem(seed)
    fit, held = (targets_of(rows, H, M, ALL_TOKENS) for rows in (X[:300], X[300:]))

    def validation_kl(N: Tensor) -> float:
        return float(held.kl(mapped_logits(X[300:], H, N)).mean())

    found = fit_logit_map(X[:300], H, fit, validation_kl, 0.0, 60, quiet)
    start = validation_kl(torch.zeros_like(M))
    assert start > 0.05
    assert validation_kl(found) < 1e-4 * start
    made, wanted = (mapped_logits(X, H, N).log_softmax(-1) for N in (found, M))
    torch.testing.assert_close(made, wanted, rtol=0, atol=0.1)


def test_a_larger_penalty_moves_logits_less() -> None:
    X, H, M = problem()
    fit = targets_of(X, H, M, ALL_TOKENS)
    moved = []
    for penalty in (0.0, 1e-2, 1e2):
        found = fit_logit_map(
            X, H, fit, lambda N: float(fit.kl(mapped_logits(X, H, N)).mean()), penalty, 30, quiet
        )
        moved.append(float((X @ found @ H.T).pow(2).mean()))
    assert moved[0] > moved[1] > 10 * moved[2]


def test_a_map_that_validation_rejects_is_zero() -> None:
    X, H, M = problem()
    fit = targets_of(X, H, M, ALL_TOKENS)
    opposite = targets_of(X, H, -M, ALL_TOKENS)
    steps: list[int] = []
    found = fit_logit_map(
        X,
        H,
        fit,
        lambda N: float(opposite.kl(mapped_logits(X, H, N)).mean()),
        0.0,
        30,
        lambda step, _: steps.append(step),
    )
    assert torch.equal(found, torch.zeros_like(M))
    assert steps == [1, 2, 3]  # its patience


def test_tokens_put_together_keep_their_probability() -> None:
    X, H, M = problem()
    some = torch.tensor([1, 5, 7, 30])
    reduced = targets_of(X, H, M, some)
    torch.testing.assert_close(reduced.probs.sum(-1), torch.ones(len(X)))
    p, q = mapped_logits(X, H, M).log_softmax(-1), (X @ H.T).log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1)
    assert (reduced.kl(X @ H[some].T) <= whole + 1e-5).all()  # a coarser partition
    torch.testing.assert_close(
        targets_of(X, H, M, ALL_TOKENS).kl(X @ H.T), whole, rtol=1e-4, atol=1e-5
    )


def test_top_tokens_are_those_of_either_model() -> None:
    teacher = torch.full((5, 50), -20.0)
    teacher[:, 3], teacher[0, 9] = 0.0, -0.1
    student = torch.zeros(5, 50)
    student[:, 17] = 30.0
    chosen = top_tokens(
        lambda rows: teacher[rows].log_softmax(-1),
        lambda rows: student[rows],
        torch.arange(5),
        limit=3,
        per_row=2,
    )
    assert chosen.tolist() == [3, 9, 17]


def test_rows_that_are_not_finite_are_refused() -> None:
    X, H, M = problem()
    fit = targets_of(X, H, M, ALL_TOKENS)
    X[3, 2] = torch.nan
    with pytest.raises(RotdistillError, match="head map: rows: 1 of 2400 values"):
        fit_logit_map(X, H, fit, lambda _: 0.0, 0.0, 3, quiet)
