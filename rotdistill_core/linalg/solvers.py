"""Closed-form solves in float64: ridge regression, SVD, eigenvectors, the orthogonal factor.

Matrices come from the host and solutions go back to it. With `device` the work is done there if
its float64 is fast (`float64_device`). A solution from a device is checked against its equation;
if it fails, or the device's solver does, LAPACK solves it on the CPU.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from rotdistill_core.errors import RotdistillError, SingularError
from rotdistill_core.linalg.precision import CPU, SUM_DTYPE, float64_device

DEVICE_TOLERANCE = 1e-9
"""Largest relative error at which the solution of a device is taken."""


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
            f"{where}: {bad} of {X.numel()} values are NaN or Inf; nothing was solved. A model "
            'overflowed there: compute in a wider dtype (dtype = "float32" of teacher and student).'
        )


def ridge(
    xx: Tensor, xy: Tensor, strength: float, where: str, device: torch.device = CPU
) -> Tensor:
    """Solve a ridge regression from its second moments.

    Problem: `min_B Σ ‖y - x B‖² + λ ‖B‖²` with `λ = strength · mean(diag xx)`.
    Closed form: `B = (xx + λ I)⁻¹ xy`, by Cholesky.
    (Hoerl and Kennard, Technometrics 12, 1970.)

    Args:
        xx: `Σ x xᵀ [d_x, d_x]`, float64.
        xy: `Σ x yᵀ [d_x, d_y]`, float64.
        strength: ridge as a multiple of the mean diagonal, so that it does not depend on scale.
        where: names the place in errors.
        device: where the rows were; see the module.

    Returns:
        `B [d_x, d_y]`, on the host.

    Raises:
        RotdistillError: a value is not finite.
        SingularError: the matrix is not positive definite at this strength.
    """
    require_finite(xx, where)
    require_finite(xy, where)
    found = _ridge_on_device(xx, xy, strength, float64_device(device))
    if found is not None:
        return found
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


def _ridge_on_device(
    xx: Tensor, xy: Tensor, strength: float, device: torch.device
) -> Tensor | None:
    """Return the solution of `ridge` from a device; None from a CPU, or if it is not accurate.

    Accurate means `‖A B - xy‖ <= tolerance · (‖A‖ ‖B‖ + ‖xy‖)` with `A = xx + λ I`.
    """
    if device.type == "cpu":
        return None
    A = xx.to(device, copy=True)
    A.diagonal().add_(strength * A.diagonal().mean())
    right = xy.to(device)
    factor, failed = torch.linalg.cholesky_ex(A)
    if bool(failed):
        return None
    B = torch.cholesky_solve(right, factor)
    error = (A @ B - right).norm() / (A.norm() * B.norm() + right.norm()).clamp_min(1e-300)
    return B.cpu() if float(error) <= DEVICE_TOLERANCE else None


def svd(M: Tensor, where: str, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD `U, S, Vt` of `M` in float64, singular values in falling order.

    LAPACK's gesdd is fast and fails to converge on rare matrices; gesvd is tried next.

    Args:
        M: the matrix `[d, e]`.
        where: names the place in errors.
        device: where the rows were that M is made of; see the module.

    Raises:
        RotdistillError: a value is not finite, or neither driver converges.
    """
    require_finite(M, where)
    found = _svd_on_device(M, float64_device(device))
    if found is not None:
        return found
    array = M.double().cpu().numpy()
    for driver in ("gesdd", "gesvd"):
        try:
            U, S, Vt = scipy.linalg.svd(
                array, full_matrices=False, lapack_driver=driver, check_finite=False
            )
            return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vt)
        except scipy.linalg.LinAlgError:
            continue
    raise RotdistillError(
        f"{where}: the singular value decomposition does not converge. "
        "Fit on more texts, or with a larger ridge where the step has one."
    )


def _svd_on_device(M: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the result of `svd` from a device; None from a CPU, or if it is not accurate.

    Accurate means that `U S Vᵀ` is M, relative to its norm.
    """
    if device.type == "cpu":
        return None
    A = M.to(device, SUM_DTYPE)
    try:
        U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    error = ((U * S) @ Vt - A).norm() / A.norm().clamp_min(1e-300)
    return (U.cpu(), S.cpu(), Vt.cpu()) if float(error) <= DEVICE_TOLERANCE else None


def eigh(C: Tensor, where: str, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues `[d]`, rising, and eigenvectors `[d, d]` of a symmetric matrix.

    Args:
        C: the matrix `[d, d]`.
        where: names the place in errors.
        device: where the rows were that C is made of; see the module.

    Raises:
        RotdistillError: a value is not finite.
    """
    require_finite(C, where)
    target = float64_device(device)
    if target.type != "cpu":
        A = C.to(target, SUM_DTYPE)
        values, vectors = torch.linalg.eigh(A)
        error = (A @ vectors - vectors * values).norm() / A.norm().clamp_min(1e-300)
        if float(error) <= DEVICE_TOLERANCE:
            return values.cpu(), vectors.cpu()
    values, vectors = torch.linalg.eigh(C.cpu().to(SUM_DTYPE))
    return values, vectors


def polar(M: Tensor, where: str, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Return the orthogonal factor of `M [d, e]`, d <= e, and its singular values `[d]`.

    Problem: `max_R tr(Rᵀ M)` over `R [d, e]` with `R Rᵀ = I`.
    Closed form: `R = U Vᵀ` of the thin SVD `M = U S Vᵀ`. det R = -1 is allowed.
    (Schönemann, Psychometrika 31, 1966.)

    M does not determine R in its null space. There R is completed towards the identity, so the
    answer does not depend on the LAPACK that is installed.

    Args:
        M: the matrix `[d, e]`.
        where: names the place in errors.
        device: where the rows were that M is made of; see the module.

    Raises:
        RotdistillError: a value is not finite, or the SVD does not converge.
    """
    U, S, Vt = svd(M, where, device)
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
