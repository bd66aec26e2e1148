"""Regularised canonical correlation analysis between the residual streams of two models.

Problem: `max Σ_i corr(x_s a_i, x_t b_i)` over directions `a_i [d_s]`, `b_i [d_t]` whose variates
are uncorrelated and of unit variance.
Closed form: take covariances centred within boundaries and shrink them,
`C_ss <- (1 - γ) C_ss + γ mean(diag C_ss) I`, C_tt likewise, `C_st <- (1 - γ) C_st`. With the thin
SVD `C_ss^{-1/2} C_st C_tt^{-1/2} = U ρ Vᵀ` the ρ are the canonical correlations.
(Hotelling, Biometrika 28, 1936; shrunk covariances: Vinod, Journal of Econometrics 4, 1976.)

The k leading pairs are shared. `A = C_ss^{-1/2} U_k V_kᵀ C_tt^{1/2} [d_s, d_t]`, of rank k, maps
their variates onto each other. R is its orthogonal factor, completed on the complement of both
sides by Procrustes: `R [d_s, d_t]`, `R Rᵀ = I`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.alignment.streams import StageSolution, StreamSums, solve_stages, spectral_gap
from rotdistill_core.linalg.solvers import svd
from rotdistill_procrustes._whitening import complete_orthogonal, matrix_roots

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_procrustes.cca import Cca

ROUNDING = 1e-9
"""Difference of correlations that counts as none, so that equal ones are kept or left together."""


def solve(
    options: Cca, activations: ActivationStore, maps: Maps, pair: Pair, progress: Progress
) -> Maps:
    """Add a rotation for each stage; for errors see `solve_stages`."""
    return solve_stages(
        activations,
        maps,
        pair,
        progress,
        use=options.use,
        tie=options.tie,
        solve=partial(solve_stage, options),
        squares=True,
    )


def solve_stage(options: Cca, sums: StreamSums, where: str) -> StageSolution:
    """Return the rotation of one stage from its sums; `where` names the stage in errors."""
    C_ss, C_st, C_tt = sums.centred()
    student = matrix_roots(_shrunk(C_ss, options.shrinkage), 0.0, where, sums.device)
    teacher = matrix_roots(_shrunk(C_tt, options.shrinkage), 0.0, where, sums.device)
    kept = 1 - options.shrinkage
    U, rho, Vt = svd(kept * student.inverse @ C_st @ teacher.inverse, where, sums.device)
    threshold = options.min_correlation
    if threshold is None:
        # Chance: the largest correlation that shuffled rows reach.
        _, C_st_shuffled, _ = sums.shuffled().centred()
        null = svd(kept * student.inverse @ C_st_shuffled @ teacher.inverse, where, sums.device)
        threshold = float(null[1][0])
    k = int((rho > threshold + ROUNDING).sum())
    # A maps the variates of the shared pairs onto each other; Procrustes decides the rest.
    A = student.inverse @ U[:, :k] @ Vt[:k] @ teacher.root
    R, _ = complete_orthogonal(A, sums.C_st, where, sums.device)
    return StageSolution(R, rho, k, spectral_gap(rho, k))


def _shrunk(C: Tensor, shrinkage: float) -> Tensor:
    """Return `(1 - γ) C + γ mean(diag C) I`."""
    isotropic = shrinkage * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    return (1 - shrinkage) * C + isotropic
