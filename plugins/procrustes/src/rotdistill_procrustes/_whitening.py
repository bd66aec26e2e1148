"""Roots of covariances, and orthogonal factors of maps that a null space leaves incomplete."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_core.linalg.precision import CPU
from rotdistill_core.linalg.solvers import eigh, polar, svd

RELATIVE_FLOOR = 1e-10
"""Share of the largest variance below which a direction holds nothing but rounding."""
RANK_FLOOR = 1e-8
"""Share of the largest singular value below which one counts as rounding."""


class Roots(NamedTuple):
    """The powers -1/2 and 1/2 of variances or of a covariance, both 0 where it is 0."""

    inverse: Tensor
    root: Tensor


def variance_roots(values: Tensor, ridge: float) -> Roots:
    """Return the roots of variances `[d]`, `ridge` times their mean added first."""
    values = values.clamp_min(0) + ridge * values.mean()
    kept = values > RELATIVE_FLOOR * values.max()
    root = values.clamp_min(1e-300).sqrt() * kept
    return Roots(inverse=kept / root.masked_fill(~kept, 1), root=root)


def matrix_roots(C: Tensor, ridge: float, where: str, device: torch.device = CPU) -> Roots:
    """Return the roots `[d, d]` of a covariance, `ridge` times its mean diagonal added first."""
    values, Q = eigh(C, where, device)
    inverse, root = variance_roots(values, ridge)
    return Roots(inverse=(Q * inverse) @ Q.T, root=(Q * root) @ Q.T)


def partial_polar(M: Tensor, where: str, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Return `U Vᵀ` over the singular values of M that are not rounding, and all of them."""
    U, S, Vt = svd(M, where, device)
    rank = int((RANK_FLOOR * S[0] < S).sum())
    return U[:, :rank] @ Vt[:rank], S


def complete_orthogonal(
    A: Tensor, M: Tensor, where: str, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """Return the orthogonal factor `[d_s, d_t]` of A, and A's singular values.

    In the null space of A the factor is completed by that of M. In the null space of both it is
    completed towards the identity.
    """
    UV, S = partial_polar(A, where, device)
    # ‖UV‖² is the rank of A.
    if round(float(UV.pow(2).sum())) == len(A):
        return UV, S
    # M outside the row and column space of A.
    rest = M - UV @ (UV.T @ M)
    rest = rest - (rest @ UV.T) @ UV
    return polar(UV + rest / max(float(M.norm()), 1e-300), where, device)[0], S
