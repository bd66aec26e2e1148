"""The gauges inside matched heads and neurons, in closed form.

The layers stand in one basis, with heads and neurons already matched. S are the student's rows, T
the teacher's; both sides of a gauge count alike.

`value`: a matrix G per key/value head, `V' = Gᵀ V` and `O' = G⁻¹ O` (rows of v, columns of o).
Orthogonal: the polar factor of `V_s V_tᵀ + Σ O_s O_tᵀ`. (Schönemann, Psychometrika 31, 1966.)
Invertible: the minimum of `‖Gᵀ V_s - V_t‖² + ‖O_s - G O_t‖²`, a Sylvester equation.

`key`: a complex factor c per key/value head and rotary pair, `K' = c K`, `Q' = Q / c̄`.
`up`: a factor s per neuron, `U' = s U`, `D' = D / s`.
Phase or sign is that of the largest inner product. The size is the geometric mean of what either
side asks for. A least-squares size would shrink to nothing between models that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from scipy.linalg import solve_sylvester
from torch import Tensor

from rotdistill_core.architecture.spaces import (
    KEY_GAUGE,
    NEURONS,
    UP_GAUGE,
    VALUE_GAUGE,
    in_layer,
    kind_of,
)
from rotdistill_core.architecture.table import HeadLayout
from rotdistill_core.errors import RotdistillError
from rotdistill_core.linalg.maps import Gauge
from rotdistill_core.linalg.solvers import polar, require_finite

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights

Rows = Mapping[str, Tensor]
"""Role -> rows of a layer's parameter; see `layer_rows`."""
ValueGauge = Literal["orthogonal", "invertible"]


class GaugeSides(NamedTuple):
    """Roles of the parameters on both sides of a gauge."""

    producer: str
    consumer: str


SIDES = {
    VALUE_GAUGE: GaugeSides("v", "o"),
    KEY_GAUGE: GaugeSides("k", "q"),
    UP_GAUGE: GaugeSides("up", "down"),
}
MAX_CONDITION = 1e4
"""Condition of a gauge beyond which a fold would lose digits."""


def shared_gauges(weights: Weights, pair: Pair) -> set[str]:
    """Return the gauges of the student's table whose heads or neurons have the teacher's shape."""
    student, teacher = weights.adapter, pair.teacher.adapter
    gauges = {kind_of(param.gauge) for param in student.params.values() if param.gauge}
    if student.heads(weights.config) != teacher.heads(pair.teacher.config):
        gauges -= {VALUE_GAUGE, KEY_GAUGE}
    neurons = in_layer(NEURONS, 0)
    if student.sizes(weights.config)[neurons] != teacher.sizes(pair.teacher.config)[neurons]:
        gauges -= {UP_GAUGE}
    return gauges


def solve_gauge(
    kind: str, S: Rows, T: Rows, heads: HeadLayout, value_gauge: ValueGauge, where: str
) -> Gauge:
    """Return the gauge that brings the student's rows nearest to the teacher's.

    Args:
        kind: `value`, `key` or `up`.
        S: the student's layer.
        T: the teacher's layer.
        heads: the layout of heads, the same in both.
        value_gauge: which matrices a `value` gauge may be.
        where: names the layer in errors.

    Raises:
        RotdistillError: a row is not finite, or an invertible gauge is too ill-conditioned to fold.
    """
    blocks = len(S["up"]) if kind == UP_GAUGE else heads.groups
    producer, consumer = SIDES[kind]
    A, B, C, D = (
        rows.reshape(blocks, -1, rows.shape[-1])
        for rows in (S[producer], T[producer], S[consumer], T[consumer])
    )
    for rows in (A, B, C, D):
        require_finite(rows, f"{where}: {kind}")
    if kind == UP_GAUGE:
        return _factors(A, B, C, D)
    if kind == KEY_GAUGE:
        return _factors(*(_rotary_pairs(rows, heads.width) for rows in (A, B, C, D)))
    # The query heads of a group side by side: o is [groups, width, heads of the group x d].
    C, D = (
        rows.reshape(blocks, -1, heads.width, rows.shape[-1]).transpose(1, 2).flatten(2)
        for rows in (C, D)
    )
    G = torch.stack(
        [
            _value_matrix(a, b, c, d, value_gauge, f"{where}: value")
            for a, b, c, d in zip(A, B, C, D, strict=True)
        ]
    )
    condition = float(torch.linalg.cond(G).max())
    if condition > MAX_CONDITION:
        raise RotdistillError(
            f"{where}: the value gauge has condition {condition:.0e}: the two models are too "
            'unlike for an invertible one; use "orthogonal".'
        )
    return Gauge(G)


def apply_gauge(kind: str, gauge: Gauge, S: Rows) -> dict[str, Tensor]:
    """Return the rows on both sides of a gauge after it; consumers take its dual."""
    producer, consumer = SIDES[kind]
    return {
        producer: gauge.apply(S[producer], 0),
        consumer: gauge.dual().apply(S[consumer], 0),
    }


def _value_matrix(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, value_gauge: ValueGauge, where: str
) -> Tensor:
    """Return `G [k, k]` for `Gᵀ A ~ B [k, d]` and `C ~ G D [k, g d]`."""
    # Each side at norm 1, so that neither counts for its size.
    a = 1.0 / float((A.norm() * B.norm()).clamp_min(1e-30))
    c = 1.0 / float((C.norm() * D.norm()).clamp_min(1e-30))
    M = a * A @ B.T + c * C @ D.T
    if value_gauge == "orthogonal":
        return polar(M, where)[0]
    # The gradient vanishes where (A Aᵀ) G + G (D Dᵀ) = A Bᵀ + C Dᵀ.
    G = solve_sylvester((a * A @ A.T).numpy(), (c * D @ D.T).numpy(), M.numpy())
    return torch.from_numpy(G)


def _rotary_pairs(rows: Tensor, width: int) -> Tensor:
    """Return rows `[groups, heads width, d]` as complex `[groups, heads, width / 2, d]`.

    RoPE turns the pair (j, j + width / 2) as one complex number.
    """
    halves = rows.reshape(len(rows), -1, 2, width // 2, rows.shape[-1])
    return torch.complex(halves[:, :, 0], halves[:, :, 1])


def _factors(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Gauge:
    """Return the factors c for `c A ~ B` and `C / c̄ ~ D`.

    Rows are `[n, 1, d]` real (neurons) or `[groups, heads, pairs, d]` complex (rotary pairs).
    """
    a, b, c, d = (_inner(rows, rows).real.sqrt() for rows in (A, B, C, D))
    # The geometric mean of b / a and c / d; 1 where a side is zero.
    size = torch.where((a * d > 0) & (b * c > 0), b * c / (a * d), 1.0).sqrt()
    turn = size * _inner(A, B) + _inner(C, D) / size
    phase = torch.where(turn.abs() > 0, turn / turn.abs().clamp_min(1e-300), 1.0)
    factor = phase * size
    if not factor.is_complex():
        return Gauge(factor[:, None, None])
    # Multiplication by x + i y, on the pairs (j, j + width / 2).
    x, y = torch.diag_embed(factor.real), torch.diag_embed(factor.imag)
    return Gauge(torch.cat([torch.cat([x, y], -1), torch.cat([-y, x], -1)], -2))


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    """Return inner products over the stream, and over the query heads that share a factor."""
    return (X.conj() * Y).sum((1, -1))
