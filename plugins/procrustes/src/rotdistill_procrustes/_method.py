"""Orthogonal Procrustes between the residual streams of student and teacher.

Problem: `max_R tr(Rᵀ C_st)` over `R [d_s, d_t]` with `R Rᵀ = I`, `C_st = Σ x_sᵀ x_t [d_s, d_t]`.
Closed form: `C_st = U S Vᵀ` (thin SVD), `R = U Vᵀ`, scale `tr(Rᵀ C_st) / ‖X_s‖²`.
(Schönemann, Psychometrika 31, 1966. For d_s < d_t it is still the optimum.)

Whitened, with covariances centred within each boundary: `C_ss^{-1/2} C_st C_tt^{-1/2} = U S Vᵀ` is
lifted to `A = C_ss^{-1/2} U Vᵀ C_tt^{1/2} [d_s, d_t]`, which maps one covariance onto the other. R
is the orthogonal factor of A. Z-scores are the same with diagonal covariances. They are taken in
the teacher's coordinates, after the plain solve: the channels of two bases do not correspond, and
z-scores of each side in its own basis would lose a planted rotation.

`shrink` maps the k leading principal directions onto each other only, and the rest onto the rest.
With their projectors P, P' (from C_ss, C_tt) C_st becomes `P C_st P' + (I - P) C_st (I - P')`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.alignment.streams import StageSolution, StreamSums, solve_stages, spectral_gap
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.linalg.precision import CPU
from rotdistill_core.linalg.solvers import eigh, polar
from rotdistill_procrustes._whitening import (
    RELATIVE_FLOOR,
    complete_orthogonal,
    matrix_roots,
    partial_polar,
    variance_roots,
)

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps
    from rotdistill_procrustes.step import Procrustes


def solve(
    options: Procrustes, activations: ActivationStore, maps: Maps, pair: Pair, progress: Progress
) -> Maps:
    """Add a rotation for each stage.

    Raises:
        RecipeError: a ridge without whitening, or streams that cannot be aligned.
        RotdistillError: a stream is not finite, or a solve fails.
    """
    if options.ridge and options.whiten == "none":
        raise RecipeError(
            'procrustes: ridge is for the covariances of whiten = "zscore" or "full"; '
            "it does nothing without."
        )
    return solve_stages(
        activations,
        maps,
        pair,
        progress,
        use=options.use,
        tie=options.tie,
        solve=partial(solve_stage, options),
        squares=options.whiten != "none" or options.shrink < 1,
    )


def solve_stage(options: Procrustes, sums: StreamSums, where: str) -> StageSolution:
    """Return the rotation of one stage from its sums; `where` names the stage in errors."""
    if options.whiten == "none":
        C_ss, C_st, C_tt = sums.C_ss, sums.C_st, sums.C_tt
    else:
        C_ss, C_st, C_tt = sums.centred()
    k = max(1, round(options.shrink * len(C_st)))
    principal_gap = None
    if k < len(C_st):
        C_st, principal_gap = split_at_rank(C_ss, C_st, C_tt, k, where, sums.device)
    if options.whiten == "none":
        R, S = polar(C_st, where, sums.device)
    elif options.whiten == "full":
        A, S = whitened_map(C_ss, C_st, C_tt, options.ridge, where, sums.device)
        R, _ = complete_orthogonal(A, sums.C_st, where, sums.device)
    else:
        plain, _ = polar(sums.C_st, where, sums.device)
        A, S = zscored_map(C_ss, C_st, C_tt, plain, options.ridge, where, sums.device)
        R, _ = complete_orthogonal(A, sums.C_st, where, sums.device)
    gap = spectral_gap(S, len(S)) if principal_gap is None else principal_gap
    return StageSolution(R, S, k, gap)


def whitened_map(
    C_ss: Tensor, C_st: Tensor, C_tt: Tensor, ridge: float, where: str, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """Return the lifted map A `[d_s, d_t]` of fully whitened rows, and its whitened spectrum."""
    student = matrix_roots(C_ss, ridge, where, device)
    teacher = matrix_roots(C_tt, ridge, where, device)
    UV, S = partial_polar(student.inverse @ C_st @ teacher.inverse, where, device)
    return student.inverse @ UV @ teacher.root, S


def zscored_map(
    C_ss: Tensor,
    C_st: Tensor,
    C_tt: Tensor,
    R: Tensor,
    ridge: float,
    where: str,
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor]:
    """Return the lifted map A `[d_s, d_t]` of z-scored rows, and its spectrum.

    The plain rotation R takes the student's rows into the teacher's coordinates first, where the
    channels of both sides correspond.
    """
    student = variance_roots(((C_ss @ R) * R).sum(0), ridge)  # diag(Rᵀ C_ss R)
    teacher = variance_roots(C_tt.diagonal(), ridge)
    correlations = student.inverse[:, None] * (R.T @ C_st) * teacher.inverse
    # Channels without variance are left where R takes them: completed towards the identity.
    identity = torch.eye(len(C_tt), dtype=C_tt.dtype)
    UV, S = complete_orthogonal(correlations, identity, where, device)
    return (R * student.inverse) @ UV * teacher.root, S


def split_at_rank(
    C_ss: Tensor, C_st: Tensor, C_tt: Tensor, k: int, where: str, device: torch.device = CPU
) -> tuple[Tensor, float]:
    """Return C_st without its terms between the k leading principal directions and the others.

    That is `P C_st P' + (I - P) C_st (I - P')`, P and P' the projectors on the k leading directions
    of C_ss and C_tt. The second value is the smaller of both gaps at k.

    Raises:
        RotdistillError: the variances at k and k + 1 are equal, so the k leading directions are
            not determined; or a value is not finite.
    """
    projectors: list[Tensor] = []
    gaps: list[float] = []
    for C in (C_ss, C_tt):
        values, Q = eigh(C, where, device)
        gap = spectral_gap(values.flip(0), k)
        if gap < RELATIVE_FLOOR and values[-k] > RELATIVE_FLOOR * values[-1]:
            raise RotdistillError(
                f"{where}: shrink keeps {k} principal directions, but the variances there are "
                "equal; change shrink."
            )
        projectors.append(Q[:, -k:] @ Q[:, -k:].T)
        gaps.append(gap)
    P, P_t = projectors
    # Expanded, so that no projector I - P is formed.
    inside, left, right = P @ C_st @ P_t, P @ C_st, C_st @ P_t
    return C_st - left - right + 2 * inside, min(gaps)
