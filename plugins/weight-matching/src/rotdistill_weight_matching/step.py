"""Align two models of one shape from their weights alone, without a single text.

Problem: one rotation R of the stream, and in every layer permutations of heads and neurons and gauges inside them, that carry the
student's weights nearest to the teacher's. Each is in closed form while the others stand still: R is the polar factor of
`Σ W_sᵀ W_t` over embedding, head, readers and writers with norm gains absorbed (Schönemann, Psychometrika 31, 1966), heads and neurons
are linear assignments, gauges as in `head-gauge`. They take turns until nothing changes. (Ainsworth et al., Git Re-Basin,
arXiv:2209.04836, for permutations alone.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.alignment.assignment import layer_rows, match, teacher_layers, weight_scores
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.planning.cost import Cost, CostContext, assignment_cost
from rotdistill_weight_matching.head_gauge import SIDES, shared_gauges, solve

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Map, Maps
    from rotdistill_core.store.output import StepOutput


SETTLED = 1e-6
"""Turn of the stream, largest entry, below which assignments are taken to have settled."""
BLOCK = 8192
SPACES = {
    "q": "q",
    "o": "q",
    "k": "kv",
    "v": "kv",
    "gate": "neurons",
    "up": "neurons",
    "down": "neurons",
}


@step
class WeightMatching:
    """Find the rotation of the stream, permutations of heads and neurons, and gauges between two models of one shape, from weights.

    A student cut in depth is compared with the layers that it kept. The vocabulary is what both models share, so embedding
    and head give the first rotation. Needs no capture.
    """

    use: Literal["weight-matching"] = "weight-matching"
    rounds: PositiveInt = 10
    """Most turns of rotation, assignment and gauges; it stops when nothing changes."""
    value: Literal["orthogonal", "invertible"] = "orthogonal"
    """Which matrices value and output may take inside a head: orthogonal ones, or any invertible one."""

    def cost(self, context: CostContext) -> Cost:
        """Two layers at a time, and the similarities of their heads and neurons."""
        return assignment_cost(context)

    @hookimpl
    def align(
        self, weights: Weights, maps: Maps, pair: Pair, out: StepOutput, progress: Progress
    ) -> Maps:
        """See `Specs.align`."""
        import torch

        from rotdistill_core.linalg.maps import Rotation
        from rotdistill_core.linalg.solvers import polar

        _require_one_shape(weights, pair)
        kept = teacher_layers(weights, pair)
        base = vocabulary_moments(weights, pair.teacher.weights)
        R, spectrum = polar(base, "weight-matching: vocabulary")
        eye, turns = torch.eye(len(R), dtype=torch.float64), [math.inf]
        found: dict[str, Map] = {}
        diagnostics: dict[int, dict[str, Any]] = {}
        for done in range(1, self.rounds + 1):
            M = R.T @ base
            for i in range(weights.depth):
                made, diagnostics[i], told = self._layer(weights, pair, i, kept[i], R)
                found |= made
                M += told
                progress(i + 1, weights.depth, f"round {done}")
            turn, spectrum = polar(M, f"weight-matching: round {done}")
            R = R @ turn
            turns.append(float((turn - eye).abs().max()))
            if turns[-1] <= SETTLED:
                break
        out.notes |= {
            "rounds": done,
            "settled": turns[-1] <= SETTLED,
            "last turn": turns[-1],
        } | _means(diagnostics)
        rotation = Rotation(R)
        for b in range(weights.depth + 1):
            about = {
                "layer": b,
                "stage": 0,
                "k": len(R),
                "singular_values": spectrum.tolist(),
                "max_rrt": rotation.error(),
            }
            found[f"residual.{b}"], diagnostics[b] = rotation, {**diagnostics.get(b, {}), **about}
        typed = {i: LayerDiagnostics.from_dict(card) for i, card in diagnostics.items()}
        return maps.add(found, typed)

    def _layer(
        self, weights: Weights, pair: Pair, i: int, reference: int, R: Tensor
    ) -> tuple[dict[str, Map], dict[str, Any], Tensor]:
        """Return the maps of one layer's heads and neurons, their figures, and what the layer then says about the stream."""
        import torch

        heads, d = weights.adapter.heads(weights.config), len(R)
        S = {
            role: torch.cat([X[:, :d] @ R, X[:, d:]], 1)
            for role, X in layer_rows(weights, i, {}).items()
        }
        T = layer_rows(pair.teacher.weights, reference, {})
        before = _distance(S, T)
        made = match(weight_scores(S, T, heads, heads), heads, heads)
        found = made.maps(i, heads.width)
        S = {role: found[f"{SPACES[role]}.{i}"].apply(X, 0) for role, X in S.items()}
        for name in sorted(shared_gauges(weights, pair)):
            gauge = solve(name, S, T, heads, self.value, f"weight-matching: layer {i}")
            found[f"{name}.{i}"] = gauge
            one, other = SIDES[name]
            S |= {one: gauge.apply(S[one], 0), other: gauge.dual().apply(S[other], 0)}
        about = {
            "reference": reference,
            **made.about,
            "distance_stream_alone": before,
            "distance": _distance(S, T),
        }
        return (
            found,
            about,
            sum((moments(S[role][:, :d], T[role][:, :d]) for role in S), torch.zeros_like(R)),
        )


def moments(S: Tensor, T: Tensor) -> Tensor:
    """Return `Sᵀ T [d, d]` with both counted at norm 1, so that no parameter is heard for its size."""
    scaled: Tensor = S.T @ T / (S.norm() * T.norm()).clamp_min(1e-30)
    return scaled


def vocabulary_moments(weights: Weights, teacher: Weights) -> Tensor:
    """Return the moments of embedding and head, whose rows are the same tokens in both models; the final gain is absorbed."""
    import torch

    total = torch.zeros(weights.width, weights.width, dtype=torch.float64)
    for head in (False, True):
        S, T = ((w.head() if head else w[w.adapter.embedding]) for w in (weights, teacher))
        f, g = (
            w.gain(w.adapter.norm) if head else torch.ones(w.width, dtype=torch.float64)
            for w in (weights, teacher)
        )
        M, s, t = torch.zeros_like(total), 0.0, 0.0
        for k in range(0, len(S), BLOCK):  # a vocabulary in float64 takes gigabytes
            A, B = S[k : k + BLOCK].double() * f, T[k : k + BLOCK].double() * g
            M, s, t = M + A.T @ B, s + float(A.pow(2).sum()), t + float(B.pow(2).sum())
        total += M / max((s * t) ** 0.5, 1e-30)
    return total


def _distance(S: dict[str, Tensor], T: dict[str, Tensor]) -> float:
    """Return `‖S - T‖ / ‖T‖` of a layer, each parameter counted alike."""
    parts = [float((S[role] - T[role]).norm() / T[role].norm().clamp_min(1e-30)) for role in T]
    return math.sqrt(sum(part**2 for part in parts) / len(parts))


def _means(diagnostics: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all layers for the notes."""
    moved = {
        part: sum(not card[part]["identity"] for card in diagnostics.values())
        for part in ("heads", "neurons")
    }
    means = {
        key: sum(card[key] for card in diagnostics.values()) / len(diagnostics)
        for key in ("distance_stream_alone", "distance")
    }
    return {**{f"layers whose {part} change": n for part, n in moved.items()}, **means}


def _require_one_shape(weights: Weights, pair: Pair) -> None:
    from rotdistill_core.errors import RecipeError

    if weights.lineage.basis is not None:
        raise RecipeError(
            "weight-matching: the student is in another basis already; put it before basis-fold."
        )
    mine, theirs = (
        (v.adapter.sizes(v.config), v.adapter.heads(v.config))
        for v in (weights, pair.teacher.weights)
    )
    differ = [
        space for space in mine[0].keys() & theirs[0].keys() if mine[0][space] != theirs[0][space]
    ]
    differ += ["depth"] if pair.student.depth != pair.teacher.depth else []
    if differ or mine[1] != theirs[1]:
        what = min(differ, default="heads")
        raise RecipeError(
            f'weight-matching: needs models of one shape, these differ in {what}; use "procrustes" and "hungarian-permute".'
        )


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [WeightMatching]
