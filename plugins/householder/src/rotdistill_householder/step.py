"""Improve a tied rotation by one or two reflections, in closed form.

Problem: `min_v ‖H' (I - 2 v vᵀ) - T‖²` over unit vectors `v [d_t]`; H' = X R are the mapped student rows, T the teacher's, `[n, d_t]`.
Closed form: the error changes by `4 vᵀ G v`, `G = sym(H'ᵀ T) [d_t, d_t]`, so by Rayleigh's quotient the best v is the eigenvector of the
lowest eigenvalue of G, and worth taking only when that is negative. Then `R <- R (I - 2 v vᵀ)`. (Householder, Journal of the ACM 5, 1958.)

Behind a free Procrustes `H'ᵀ T = V S Vᵀ` has no negative eigenvalue, so there is nothing to take, and the step says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.alignment.streams import (
    StreamSums,
    cosine,
    diagnose,
    fit_sums,
    orthogonality,
    paired_streams,
    random_orthogonal,
)
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.planning.cost import Cost, CostContext, alignment_cost

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Map, Maps
    from rotdistill_core.store.output import StepOutput


ROUNDING = 1e-9
"""Share of the largest eigenvalue that counts as zero."""


@step
class Householder:
    """Reflect the rotation of each stage where that brings the mapped student closer to the teacher, twice at most.

    A stage is a run of layer boundaries that share their rotation. Fitted on fit texts; a reflection that does not raise the
    validation cosine is not taken. After a free Procrustes there is nothing to reflect, and the step says so.
    """

    use: Literal["householder"] = "householder"
    most: Annotated[int, Field(ge=1, le=2)] = 2
    """Reflections per stage at most."""
    target: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Stop at this mean cosine of validation rows."""

    def cost(self, context: CostContext) -> Cost:
        """Moments of paired rows, and one decomposition for each stage."""
        return alignment_cost(context)

    @hookimpl
    def refine(
        self,
        activations: ActivationStore,
        maps: Maps,
        pair: Pair,
        out: StepOutput,
        progress: Progress,
    ) -> Maps:
        """See `Specs.refine`."""
        from rotdistill_core.errors import RecipeError
        from rotdistill_core.linalg.maps import Rotation

        groups = stages(maps, len(activations.depths))
        if not groups:
            raise RecipeError(
                "householder: needs an aligner of the residual stream (procrustes, cca) before it."
            )
        found: dict[str, Map] = {}
        diagnostics: dict[int, dict[str, Any]] = {}
        for number, (group, R) in enumerate(groups):
            sums = fit_sums(activations, pair, group, self.use, squares=False)
            made = self._reflect(activations, pair, group, sums, R)
            card: dict[str, Any] = {"householder": made.card}
            rotation = Rotation(made.R, float((made.R * sums.M).sum()) / sums.energy)
            if made.card["reflections"]:
                v = lowest(R.T @ sums.null)[1]
                seen = {
                    "unreflected": R,
                    "after": made.R,
                    "shuffled": reflected(R, v),
                    "random": random_orthogonal(*R.shape),
                }
                card |= {"scale": rotation.scale, **orthogonality(rotation)}
                found |= {f"residual.{boundary}": rotation for boundary in group}
                for mean, (boundary, S, T, rows) in zip(
                    sums.t,
                    paired_streams(activations, pair, group, "validation", self.use),
                    strict=True,
                ):
                    diagnostics[boundary] = card | diagnose(S[rows], T[rows], seen, mean)
            else:
                diagnostics |= dict.fromkeys(group, card)
            out.notes[f"boundaries {group[0]} to {group[-1]}"] = made.card
            progress(
                number + 1,
                len(groups),
                f"{made.card['reflections']} reflections, {made.card['stopped']}",
            )
        typed = {i: LayerDiagnostics.from_dict(card) for i, card in diagnostics.items()}
        return maps.add(found, typed)

    def _reflect(
        self,
        activations: ActivationStore,
        pair: Pair,
        group: list[int],
        sums: StreamSums,
        R: Tensor,
    ) -> Reflected:
        """Return the rotation `[d_s, d_t]` of a stage behind its reflections."""
        rows = float(sums.counts.sum())
        value, v, rounding = lowest(R.T @ sums.M)
        first, shuffled, taken = value, lowest(R.T @ sums.null)[0], 0
        before = reached = self._cosine(activations, pair, group, R)
        while True:
            if value >= -rounding:
                stopped = "the lowest eigenvalue is not negative"
            elif reached >= self.target:
                stopped = "the validation cosine is at its target"
            elif taken == self.most:
                stopped = "no more reflections are allowed"
            elif (
                cosine_then := self._cosine(activations, pair, group, reflected(R, v))
            ) <= reached:
                stopped = "another reflection would not raise the validation cosine"
            else:
                R, reached, taken = reflected(R, v), cosine_then, taken + 1
                value, v, rounding = lowest(R.T @ sums.M)
                continue
            break
        card = {
            "reflections": taken, "stopped": stopped, "lowest_eigenvalue": value / rows, "lowest_eigenvalue_before": first / rows,
            "lowest_eigenvalue_shuffled": shuffled / rows, "cosine_before": before, "cosine_after": reached,
        }  # fmt: skip
        return Reflected(R, card)

    def _cosine(
        self, activations: ActivationStore, pair: Pair, group: list[int], R: Tensor
    ) -> float:
        """Return the mean cosine of the validation rows of some boundaries."""
        from rotdistill_core.forward.activations import rms_normalise

        total, n = 0.0, 0
        for _, S, T, rows in paired_streams(activations, pair, group, "validation", self.use):
            total, n = (
                total + len(rows) * cosine(rms_normalise(S[rows]) @ R, rms_normalise(T[rows])),
                n + len(rows),
            )
        return total / n


@dataclass(frozen=True)
class Reflected:
    """A rotation behind its reflections, and what was done."""

    R: Tensor
    card: dict[str, Any]


def stages(maps: Maps, boundaries: int) -> list[tuple[list[int], Tensor]]:
    """Return runs of boundaries that share their rotation, with that rotation in float64."""
    import torch

    groups: list[tuple[list[int], Tensor]] = []
    for boundary in range(boundaries):
        rotation = maps.rotation(boundary)
        if rotation is None:
            continue
        R = rotation.matrix.double()
        if groups and groups[-1][0][-1] == boundary - 1 and torch.equal(groups[-1][1], R):
            groups[-1][0].append(boundary)
        else:
            groups.append(([boundary], R))
    return groups


def lowest(G: Tensor) -> tuple[float, Tensor, float]:
    """Return the lowest eigenvalue of `sym(G)`, its eigenvector `[d_t]`, and how far from 0 rounding may bring it."""
    import torch

    from rotdistill_core.linalg.solvers import require_finite

    require_finite(G, "householder")
    values, vectors = torch.linalg.eigh((G + G.T) / 2)
    return float(values[0]), vectors[:, 0], ROUNDING * float(values.abs().max())


def reflected(R: Tensor, v: Tensor) -> Tensor:
    """Return `R (I - 2 v vᵀ)`."""
    return R - 2 * (R @ v)[:, None] * v


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Householder]
