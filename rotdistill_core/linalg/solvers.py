"""Closed-form solves in float64: ridge regression, SVD, and the orthogonal factor of a matrix."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from rotdistill_core.errors import RotdistillError, SingularError


def require_finite(X: Tensor, where: str) -> None:
    """Raise unless every value is finite: on Inf, LAPACK may hang instead of failing.

    Raises:
        RotdistillError: `X` holds NaN or Inf; the message starts with `where`.
    """
    # A finite sum has finite terms. This takes one pass and no mask.
    if torch.isfinite(X.sum()):
        return
    bad = int((~torch.isfinite(X)).sum())
    if bad:
        raise RotdistillError(
            f"{where}: {bad} of {X.numel()} values are NaN or Inf; nothing was solved."
        )


def ridge(xx: Tensor, xy: Tensor, strength: float, where: str) -> Tensor:
    """Solve a ridge regression from its second moments.

    Problem: `min_B Σ ‖y - x B‖² + λ ‖B‖²` with `λ = strength · mean(diag xx)`.
    Closed form: `B = (xx + λ I)⁻¹ xy`, by Cholesky.
    (Hoerl and Kennard, Technometrics 12, 1970.)

    Args:
        xx: `Σ x xᵀ [d_x, d_x]`, float64.
        xy: `Σ x yᵀ [d_x, d_y]`, float64.
        strength: ridge as a multiple of the mean diagonal, so that it does not depend on scale.
        where: names the place in errors.

    Returns:
        `B [d_x, d_y]`.

    Raises:
        RotdistillError: a value is not finite.
        SingularError: the matrix is not positive definite at this strength.
    """
    require_finite(xx, where)
    require_finite(xy, where)
    # `xx` is symmetric; its transpose is column-major, which LAPACK overwrites without a copy.
    A = xx.numpy().copy().T
    A[range(len(A)), range(len(A))] += strength * float(xx.diagonal().mean())
    try:
        factor = scipy.linalg.cho_factor(A, lower=True, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError as error:
        raise SingularError(
            f"{where}: the normal equations are singular at ridge {strength:g}; raise it."
        ) from error
    return torch.from_numpy(scipy.linalg.cho_solve(factor, xy.numpy(), check_finite=False))


def svd(M: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD `U, S, Vt` of `M` in float64, singular values in falling order.

    LAPACK's gesdd is fast and fails to converge on rare matrices; gesvd is tried next.

    Raises:
        RotdistillError: a value is not finite, or neither driver converges.
    """
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


def polar(M: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return the orthogonal factor of `M [d, e]`, d <= e, and its singular values `[d]`.

    Problem: `max_R tr(Rᵀ M)` over `R [d, e]` with `R Rᵀ = I`.
    Closed form: `R = U Vᵀ` of the thin SVD `M = U S Vᵀ`. det R = -1 is allowed.
    (Schönemann, Psychometrika 31, 1966.)

    M does not determine R in its null space. There R is completed towards the identity, so the
    answer does not depend on the LAPACK that is installed.

    Raises:
        RotdistillError: a value is not finite, or the SVD does not converge.
    """
    U, S, Vt = svd(M, where)
    floor = float(S.max()) * max(M.shape) * torch.finfo(torch.float64).eps
    rank = int((floor < S).sum())
    if rank == M.shape[0]:
        return U @ Vt, S
    # Bases of what M leaves open on either side.
    left = torch.linalg.svd(U[:, :rank], full_matrices=True)[0][:, rank:]
    right = torch.linalg.svd(Vt[:rank].T, full_matrices=True)[0][:, rank:]
    # Between them, the orthogonal map that is nearest to the identity.
    eye = torch.eye(*M.shape, dtype=torch.float64)
    A, _, Bt = torch.linalg.svd(left.T @ eye @ right, full_matrices=False)
    return U[:, :rank] @ Vt[:rank] + left @ A @ Bt @ right.T, S
