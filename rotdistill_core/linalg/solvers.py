"""Second moments of paired rows, and the closed-form solves that need nothing else."""

from __future__ import annotations

from collections.abc import Callable

import scipy.linalg
import torch
from torch import Tensor

from rotdistill_core.errors import RotdistillError, SingularError


def require_finite(X: Tensor, where: str) -> None:
    """Raise unless every value is finite: LAPACK may hang, not fail, on Inf."""
    if torch.isfinite(X.sum()):  # one pass and no mask: a sum that is finite has finite terms
        return
    bad = int((~torch.isfinite(X)).sum())
    if bad:
        raise RotdistillError(
            f"{where}: {bad} of {X.numel()} values are NaN or Inf; nothing was solved."
        )


def ridge(xx: Tensor, xy: Tensor, strength: float, where: str) -> Tensor:
    """Return `argmin_B Σ‖y - x B‖² + λ‖B‖² = (xx + λI)⁻¹ xy [d_x, d_y]` with `λ = strength * mean(diag xx)`.

    Raises:
        RotdistillError: non-finite input; SingularError: a matrix that is not positive definite at this strength.
    """
    require_finite(xx, where)
    require_finite(xy, where)
    A = (
        xx.numpy().copy().T
    )  # symmetric; column-major is what LAPACK overwrites without a copy of its own
    A[range(len(A)), range(len(A))] += strength * float(xx.diagonal().mean())
    try:
        factor = scipy.linalg.cho_factor(A, lower=True, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError as error:
        raise SingularError(
            f"{where}: the normal equations are singular at ridge {strength:g}; raise it."
        ) from error
    return torch.from_numpy(scipy.linalg.cho_solve(factor, xy.numpy(), check_finite=False))


def svd(M: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD in float64: gesdd, and gesvd where that does not converge."""
    require_finite(M, where)
    array = M.double().cpu().numpy()
    for driver in ("gesdd", "gesvd"):
        try:
            U, S, Vt = scipy.linalg.svd(
                array, full_matrices=False, lapack_driver=driver, check_finite=False
            )
            return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vt)
        except scipy.linalg.LinAlgError:
            continue
    raise RotdistillError(f"{where}: the singular value decomposition does not converge.")


def polar(
    M: Tensor, where: str, solve: Callable[[Tensor, str], tuple[Tensor, Tensor, Tensor]] = svd
) -> tuple[Tensor, Tensor]:
    """Return `(R, S)`: the orthogonal factor `R = U Vᵀ [d, e]`, d <= e, that maximises `tr(Rᵀ M)`, and the spectrum of M.

    Where M has no say (its null space) R is completed towards the identity, so the answer does not depend on the LAPACK
    at hand. det R = -1 is allowed. (Schönemann, Psychometrika 31, 1966.)
    """
    U, S, Vt = solve(M, where)
    floor = float(S.max()) * max(M.shape) * torch.finfo(torch.float64).eps
    rank = int((floor < S).sum())
    if rank == M.shape[0]:
        return U @ Vt, S
    left = torch.linalg.svd(U[:, :rank], full_matrices=True)[0][:, rank:]
    right = torch.linalg.svd(Vt[:rank].T, full_matrices=True)[0][:, rank:]
    eye = torch.eye(*M.shape, dtype=torch.float64)
    A, _, Bt = torch.linalg.svd(left.T @ eye @ right, full_matrices=False)
    return U[:, :rank] @ Vt[:rank] + left @ A @ Bt @ right.T, S
