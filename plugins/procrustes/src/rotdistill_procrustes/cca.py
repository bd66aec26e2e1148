"""Align residual streams by the directions that they share: regularised canonical correlation analysis.

Problem: `max Σ_i corr(x_s a_i, x_t b_i)` over directions `a_i [d_s]`, `b_i [d_t]` whose variates are uncorrelated and of unit variance.
Closed form: take covariances `C [d, d]` centred within boundaries, shrink them, `C_s <- (1 - γ) C_s + γ mean(diag C_s) I`, C_t likewise and
`C_st <- (1 - γ) C_st`, and with the thin SVD `C_s^{-1/2} C_st C_t^{-1/2} = U ρ Vᵀ` the ρ are the canonical correlations.
(Hotelling, Biometrika 28, 1936; with shrunk covariances: Vinod, Journal of Econometrics 4, 1976.)

The k leading pairs are shared. `A = C_s^{-1/2} U_k V_kᵀ C_t^{1/2} [d_s, d_t]`, of rank k, carries their variates onto each other; R is its
orthogonal factor, completed on the complement of both sides by Procrustes: `R [d_s, d_t]`, `R Rᵀ = I`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.alignment.streams import StageSolution, StreamSums, solve_stages, spectral_gap
from rotdistill_core.planning.cost import Cost, CostContext, alignment_cost
from rotdistill_procrustes.step import complete, roots

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Maps


ROUNDING = 1e-9


@step
class Cca:
    """Find the rotation that carries the student's canonical directions onto the teacher's, and the rest by Procrustes.

    Takes the rows that `procrustes` takes, and gives the same diagnostics; their singular values are the canonical correlations.
    Takes the place of `procrustes` by one word.
    """

    use: Literal["cca"] = "cca"
    tie: PositiveInt | Literal["all"] = "all"
    """`"all"`: one rotation for the whole stream. A number n: one per stage of n layer boundaries (1: every boundary its own)."""
    shrinkage: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share γ of an isotropic covariance of the same trace that is mixed into each side's covariance."""
    correlation: Annotated[float, Field(ge=0, le=1)] | None = None
    """Pairs are shared above this canonical correlation; without it, above the largest one that shuffled rows reach."""

    def cost(self, context: CostContext) -> Cost:
        """Moments of paired rows, and one decomposition for each stage."""
        return alignment_cost(context)

    @hookimpl
    def align(
        self, activations: ActivationStore, maps: Maps, pair: Pair, progress: Progress
    ) -> Maps:
        """See `Specs.align`."""
        return solve_stages(
            activations, maps, pair, progress, self.use, self.tie, self.solve, squares=True
        )

    def solve(self, sums: StreamSums, where: str) -> StageSolution:
        """Return the rotation of one stage."""
        from rotdistill_core.linalg.solvers import svd

        ss, st, tt = sums.centred()
        W_s, _ = roots(self._shrunk(ss), 0.0, where)
        W_t, root = roots(self._shrunk(tt), 0.0, where)
        kept = 1 - self.shrinkage
        U, rho, Vt = svd(kept * W_s @ st @ W_t, where)
        least = self.correlation
        if least is None:
            least = float(svd(kept * W_s @ sums.shuffled().centred()[1] @ W_t, where)[1][0])
        k = int((rho > least + ROUNDING).sum())  # equal correlations are taken or left together
        A = W_s @ U[:, :k] @ Vt[:k] @ root
        return StageSolution(complete(A, sums.M, where)[0], rho, k, spectral_gap(rho, k))

    def _shrunk(self, C: Tensor) -> Tensor:
        import torch

        return (1 - self.shrinkage) * C + self.shrinkage * C.diagonal().mean() * torch.eye(
            len(C), dtype=C.dtype
        )


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Cca]
