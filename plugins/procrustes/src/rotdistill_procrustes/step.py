"""Orthogonal Procrustes between the residual streams of student and teacher.

Problem: `max_R tr(Rᵀ M)` over `R [d_s, d_t]` with `R Rᵀ = I`, `M = Σ x_sᵀ x_t`. Closed form: `M = U S Vᵀ` (thin SVD), `R = U Vᵀ`,
scale `s = tr(Rᵀ M) / ‖X_s‖²`. (Schönemann, Psychometrika 31, 1966; rectangular with d_s <= d_t it is still the optimum.)

Whitened, with covariances `C_s [d_s, d_s]`, `C_st [d_s, d_t]`, `C_t [d_t, d_t]` centred within each boundary:
`C_s^{-1/2} C_st C_t^{-1/2} = U S Vᵀ` is lifted to `A = C_s^{-1/2} U Vᵀ C_t^{1/2} [d_s, d_t]`, which carries one covariance onto the
other; R is its orthogonal factor. Z-scores are the same with diagonal covariances, taken in the teacher's coordinates, behind the plain
solve: the channels of two bases do not correspond, and z-scores of each in its own would lose a planted rotation.

`shrink` lets the k leading principal directions map onto each other only, and the rest onto the rest: with their projectors P, P'
(from `ΣX_sᵀX_s`, `ΣX_tᵀX_t`) M becomes `P M P' + (I - P) M (I - P')`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.alignment.streams import StageSolution, StreamSums, solve_stages, spectral_gap
from rotdistill_core.planning.cost import Cost, CostContext, alignment_cost

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps


FLOOR = 1e-10
"""Share of the largest variance below which a direction holds nothing but rounding."""


@step
class Procrustes:
    """Find the rotation that carries the student's residual stream onto the teacher's.

    Rows are divided by their RMS; position 0 and massive-activation rows are left out. Solved on fit texts, the cosines in the
    diagnostics are on validation texts, beside those of shuffled teacher rows, of a random rotation and of the teacher's mean.
    """

    use: Literal["procrustes"] = "procrustes"
    tie: PositiveInt | Literal["all"] = "all"
    """`"all"`: one rotation for the whole stream. A number n: one per stage of n layer boundaries (1: every boundary its own)."""
    shrink: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the student's width whose principal directions are solved apart from the rest, against noise; 1 for one solve."""
    whiten: Literal["none", "zscore", "full"] = "none"
    """`"none"`: rows as they are. `"zscore"`: every channel counts alike, in the teacher's coordinates. `"full"`: every direction does."""
    ridge: Annotated[float, Field(ge=0)] = 0.0
    """Added to the covariances before whitening, as a multiple of their mean diagonal. Refused without whitening."""

    def cost(self, context: CostContext) -> Cost:
        """Moments of paired rows, and one decomposition for each stage."""
        return alignment_cost(context)

    @hookimpl
    def align(
        self, activations: ActivationStore, maps: Maps, pair: Pair, progress: Progress
    ) -> Maps:
        """See `Specs.align`."""
        if self.ridge and self.whiten == "none":
            from rotdistill_core.errors import RecipeError

            raise RecipeError(
                'procrustes: ridge is for the covariances of whiten = "zscore" or "full"; it does nothing without.'
            )
        squares = self.whiten != "none" or self.shrink < 1
        return solve_stages(
            activations, maps, pair, progress, self.use, self.tie, self.solve, squares
        )

    def solve(self, sums: StreamSums, where: str) -> StageSolution:
        """Return the rotation of one stage."""
        from rotdistill_core.linalg.solvers import polar

        ss, st, tt = (sums.ss, sums.M, sums.tt) if self.whiten == "none" else sums.centred()
        k = max(1, round(self.shrink * len(st)))
        gap = None
        if k < len(st):
            st, gap = pinch(ss, st, tt, k, where)
        if self.whiten == "none":
            R, S = polar(st, where)
        else:
            A, S = (
                self._full(ss, st, tt, where)
                if self.whiten == "full"
                else self._zscored(ss, st, tt, polar(sums.M, where)[0], where)
            )
            R, _ = complete(A, sums.M, where)
        return StageSolution(R, S, k, gap if gap is not None else spectral_gap(S, len(S)))

    def _full(self, ss: Tensor, st: Tensor, tt: Tensor, where: str) -> tuple[Tensor, Tensor]:
        """Return the lifted map `[d_s, d_t]` of the fully whitened rows, and the spectrum."""
        (W_s, _), (W_t, root_t) = roots(ss, self.ridge, where), roots(tt, self.ridge, where)
        UV, S = orthogonal(W_s @ st @ W_t, where)
        return W_s @ UV @ root_t, S

    def _zscored(
        self, ss: Tensor, st: Tensor, tt: Tensor, R: Tensor, where: str
    ) -> tuple[Tensor, Tensor]:
        """Return the lifted map `[d_s, d_t]` of z-scored rows, the student's carried over by the plain rotation R first."""
        import torch

        (i_s, _), (i_t, r_t) = (
            powers(v, self.ridge) for v in (((ss @ R) * R).sum(0), tt.diagonal())
        )
        UV, S = complete(i_s[:, None] * (R.T @ st) * i_t, torch.eye(len(tt), dtype=tt.dtype), where)
        return (R * i_s) @ UV * r_t, S


def powers(values: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return variances (plus ridge) to the power -1/2 and 1/2, both 0 where there is no variance."""
    values = values.clamp_min(0) + ridge * values.mean()
    kept = values > FLOOR * values.max()
    root = values.clamp_min(1e-300).sqrt() * kept
    return kept / root.masked_fill(~kept, 1), root


def roots(C: Tensor, ridge: float, where: str) -> tuple[Tensor, Tensor]:
    """Return `C^{-1/2}` and `C^{1/2}` of a covariance (plus ridge), both 0 in its null space."""
    import torch

    from rotdistill_core.linalg.solvers import require_finite

    require_finite(C, where)
    values, Q = torch.linalg.eigh(C)
    inverse, root = powers(values, ridge)
    return (Q * inverse) @ Q.T, (Q * root) @ Q.T


def pinch(ss: Tensor, st: Tensor, tt: Tensor, k: int, where: str) -> tuple[Tensor, float]:
    """Return `P M P' + (I - P) M (I - P')`, P and P' the projectors on the k leading principal directions, and the gap at k.

    Raises:
        RotdistillError: the variances at k and k + 1 are equal, so that there are no k leading directions.
    """
    import torch

    from rotdistill_core.errors import RotdistillError
    from rotdistill_core.linalg.solvers import require_finite

    projectors, gaps = [], []
    for C in (ss, tt):
        require_finite(C, where)
        values, Q = torch.linalg.eigh(C)
        gaps.append(spectral_gap(values.flip(0), k))
        if gaps[-1] < FLOOR and values[-k] > FLOOR * values[-1]:
            raise RotdistillError(
                f"{where}: shrink keeps {k} principal directions, but the variances there are equal; change shrink."
            )
        projectors.append(Q[:, -k:] @ Q[:, -k:].T)
    P, P_t = projectors
    inside, left, right = P @ st @ P_t, P @ st, st @ P_t
    return st - left - right + 2 * inside, min(gaps)


def orthogonal(M: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return `U Vᵀ` over the singular values of M that are not rounding, and all of them."""
    from rotdistill_core.linalg.solvers import svd

    U, S, Vt = svd(M, where)
    rank = int((1e-8 * S[0] < S).sum())
    return U[:, :rank] @ Vt[:rank], S


def complete(A: Tensor, M: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return the orthogonal factor `[d_s, d_t]` of A, and A's spectrum.

    Where A has no say, the factor is completed by that of M; where M has none either, towards the identity.
    """
    from rotdistill_core.linalg.solvers import polar

    UV, S = orthogonal(A, where)
    if round(float(UV.pow(2).sum())) == len(A):
        return UV, S
    rest = M - UV @ (UV.T @ M)
    rest = rest - (rest @ UV.T) @ UV
    return polar(UV + rest / max(float(M.norm()), 1e-300), where)[0], S


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Procrustes]
