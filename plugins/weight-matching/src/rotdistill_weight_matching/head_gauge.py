"""What is free inside a matched head or neuron, in closed form, so that its weights come as close to the teacher's as they can.

Problem, for layers in one basis with heads and neurons already matched. `value`: a matrix G per key/value head, `V' = Gᵀ V` and
`O' = G⁻¹ O` (rows of v, columns of o): the polar factor of `V_s V_tᵀ + Σ O_s O_tᵀ` (Schönemann, Psychometrika 31, 1966), or for any
invertible G the minimum of `‖Gᵀ V_s - V_t‖² + ‖O_s - G O_t‖²`, a Sylvester equation. `key`: a complex factor c per key/value head and
rotary pair, `K' = c K`, `Q' = Q / c̄`; `up`: a factor s per neuron, `U' = s U`, `D' = D / s`. Of both, phase or sign has the largest inner
product, and the size is the geometric mean of what either side asks for, which cannot collapse where the two models differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal

from rotdistill_core import hookimpl, step
from rotdistill_core.alignment.assignment import layer_rows, stream_map, teacher_layers
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.planning.cost import Cost, CostContext, assignment_cost

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.architecture.table import HeadLayout
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.linalg.maps import Gauge, Map, Maps
    from rotdistill_core.store.output import StepOutput


Rows = Mapping[str, "Tensor"]
SIDES = {"value": ("v", "o"), "key": ("k", "q"), "up": ("up", "down")}
"""Gauge -> what produces and what consumes its space."""
STEEP = 1e4
"""Condition of a gauge beyond which folding it would lose digits."""


@step
class HeadGauge:
    """Solve the gauges inside the student's heads and neurons against the teacher's layer, in closed form. Exact to fold.

    Wants what `hungarian-permute` found, and a map of the stream where the models have no common basis.
    """

    use: Literal["head-gauge"] = "head-gauge"
    gauges: list[Literal["value", "key", "up"]] = field(
        default_factory=lambda: ["value", "key", "up"]
    )
    """Which: `value` between v and o, `key` between q and k, `up` between up and down."""
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
        from rotdistill_core.errors import RecipeError

        heads = weights.adapter.heads(weights.config)
        free = shared_gauges(weights, pair) & set(self.gauges)
        if not free:
            raise RecipeError(
                "head-gauge: the two models have neither heads nor neurons of one shape in which these gauges are free."
            )
        found: dict[str, Map] = {}
        diagnostics: dict[int, dict[str, Any]] = {}
        for i, j in enumerate(teacher_layers(weights, pair)):
            inner = {
                space: maps[space]
                for space in (f"q.{i}", f"kv.{i}", f"neurons.{i}")
                if space in maps and maps[space].square
            }
            S = layer_rows(weights, i, {"residual": stream_map(weights, pair, maps, i), **inner})
            T = layer_rows(pair.teacher.weights, reference_layer(maps, i, j), {})
            solved = {
                name: solve(name, S, T, heads, self.value, f"head-gauge: layer {i}")
                for name in sorted(free)
            }
            found |= {f"{name}.{i}": gauge for name, gauge in solved.items()}
            diagnostics[i] = {
                "gauges": {
                    name: _distances(name, S, T, gauge, heads) for name, gauge in solved.items()
                }
            }
            progress(i + 1, weights.depth, "gauges")
        for name in sorted(free):
            figures = [card["gauges"][name] for card in diagnostics.values()]
            out.notes[name] = {
                key: sum(f[key] for f in figures) / len(figures) for key in figures[0]
            }
        typed = {i: LayerDiagnostics.from_dict(card) for i, card in diagnostics.items()}
        return maps.add(found, typed)


def reference_layer(maps: Maps, layer: int, default: int) -> int:
    """Return the teacher's layer that an earlier aligner matched a layer with, or `default`."""
    measured = maps.diagnostics.get(layer)
    return default if measured is None or measured.reference is None else measured.reference


def shared_gauges(weights: Weights, pair: Pair) -> set[str]:
    """Return the gauges that the student's table has and whose heads or neurons have the teacher's shape."""
    teacher, s, t = (
        pair.teacher,
        weights.adapter.sizes(weights.config),
        pair.teacher.adapter.sizes(pair.teacher.config),
    )
    free = {param.gauge.partition(".")[0] for param in weights.adapter.params.values()} - {""}
    if weights.adapter.heads(weights.config) != teacher.adapter.heads(teacher.config):
        free -= {"value", "key"}
    return free - {"up"} if s["neurons.0"] != t["neurons.0"] else free


def solve(name: str, S: Rows, T: Rows, heads: HeadLayout, value: str, where: str) -> Gauge:
    """Return the gauge that carries the student's rows S nearest to the teacher's T."""
    import torch

    from rotdistill_core.errors import RotdistillError
    from rotdistill_core.linalg.maps import Gauge
    from rotdistill_core.linalg.solvers import require_finite

    groups = len(S["up"]) if name == "up" else heads.groups
    A, B, C, D = (
        X[role].reshape(groups, -1, X[role].shape[-1]) for role in SIDES[name] for X in (S, T)
    )
    for X in (A, B, C, D):
        require_finite(X, f"{where}: {name}")
    if name != "value":
        return _factors(*((_pairs(X, heads.width) if name == "key" else X) for X in (A, B, C, D)))
    C, D = (
        X.reshape(groups, -1, heads.width, X.shape[-1]).transpose(1, 2).flatten(2) for X in (C, D)
    )
    G = torch.stack(
        [_matrix(*each, value, f"{where}: value") for each in zip(A, B, C, D, strict=True)]
    )
    if (steep := float(torch.linalg.cond(G).max())) > STEEP:
        raise RotdistillError(
            f'{where}: the value gauge has condition {steep:.0e}: the two models are too unlike for an invertible one; use "orthogonal".'
        )
    return Gauge(G)


def _matrix(A: Tensor, B: Tensor, C: Tensor, D: Tensor, value: str, where: str) -> Tensor:
    """Return `G [k, k]` for `Gᵀ A ~ B [k, d]` and `C ~ G D [k, g d]`, both sides counted alike."""
    import torch
    from scipy.linalg import solve_sylvester

    from rotdistill_core.linalg.solvers import polar

    a, c = (1.0 / float((X.norm() * Y.norm()).clamp_min(1e-30)) for X, Y in ((A, B), (C, D)))
    M = a * A @ B.T + c * C @ D.T
    if value == "orthogonal":
        return polar(M, where)[0]
    return torch.from_numpy(
        solve_sylvester((a * A @ A.T).numpy(), (c * D @ D.T).numpy(), M.numpy())
    )


def _pairs(X: Tensor, width: int) -> Tensor:
    """Return complex rows `[groups, heads, width / 2, d]` of rows `[groups, heads width, d]`: RoPE turns (j, j + width / 2)."""
    import torch

    halves = X.reshape(len(X), -1, 2, width // 2, X.shape[-1])
    return torch.complex(halves[:, :, 0], halves[:, :, 1])


def _factors(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Gauge:
    """Return the factors c for `c A ~ B` and `C / c̄ ~ D`, rows `[n, 1, d]` real or `[groups, heads, pairs, d]` complex."""
    import torch

    from rotdistill_core.linalg.maps import Gauge

    over = (1, -1)  # all query heads of a group share a factor

    def inner(X: Tensor, Y: Tensor) -> Tensor:
        return (X.conj() * Y).sum(over)

    a, b, c, d = (inner(X, X).real.sqrt() for X in (A, B, C, D))
    size = torch.where((a * d > 0) & (b * c > 0), b * c / (a * d), 1.0).sqrt()
    turn = size * inner(A, B) + inner(C, D) / size
    factor = torch.where(turn.abs() > 0, turn / turn.abs().clamp_min(1e-300), 1.0) * size
    if not factor.is_complex():
        return Gauge(factor[:, None, None])
    a, b = torch.diag_embed(factor.real), torch.diag_embed(factor.imag)
    return Gauge(torch.cat([torch.cat([a, b], -1), torch.cat([-b, a], -1)], -2))


def _distances(name: str, S: Rows, T: Rows, gauge: Gauge, heads: HeadLayout) -> dict[str, float]:
    """Return `‖S - T‖ / ‖T‖` before and after, and after a fit to the teacher with its stream coordinates out of step (chance)."""
    import torch

    one, other = both = SIDES[name]
    away = {role: X.roll(X.shape[1] // 2, 1) for role, X in T.items() if role in both}

    def distance(X: Rows, Y: Rows) -> float:
        off, whole = (
            torch.stack([Z.pow(2).sum() for Z in some]).sum()
            for some in ([X[r] - Y[r] for r in both], [Y[r] for r in both])
        )
        return float((off / whole).sqrt())

    def after(G: Gauge) -> Rows:
        return {one: G.apply(S[one], 0), other: G.dual().apply(S[other], 0)}

    chance = distance(after(solve(name, S, {**T, **away}, heads, "orthogonal", "chance")), away)
    return {
        "distance_before": distance(S, T),
        "distance_after": distance(after(gauge), T),
        "distance_chance": chance,
    }


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [HeadGauge]
