"""Layers of two models in one basis: similarity of heads and neurons, and their best assignment.

Problem: `max_P Σ_j score[P(j), j]` over one-to-one assignments P. (Kuhn, Naval Research Logistics
2, 1955; for neurons of networks: Ainsworth et al., Git Re-Basin, arXiv:2209.04836.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rotdistill_core.architecture.spaces import (
    KEY_VALUE,
    NEURONS,
    QUERY,
    UP_GAUGE,
    VALUE_GAUGE,
    in_layer,
    kind_of,
)
from rotdistill_core.architecture.table import HeadLayout, Param
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.diagnostics import AssignmentDiagnostics, LayerDiagnostics
from rotdistill_core.linalg.maps import Map, Maps, Permutation, Rotation, transform_param
from rotdistill_core.linalg.solvers import require_finite

BLOCK_ROWS = 512
"""Rows of a similarity matrix that are computed at a time."""


class Similarities(NamedTuple):
    """How alike the parts of a student's and a teacher's layer are."""

    heads: Tensor
    """`[H_s, H_t]`, query heads."""
    neurons: Tensor
    """`[f_s, f_t]`."""


def teacher_layers(weights: Weights, pair: Pair) -> list[int]:
    """Return for each of the student's layers the teacher's at the same depth."""
    return [
        min(pair.teacher_depth(boundary), pair.teacher.depth - 1)
        for boundary in weights.lineage.depths[:-1]
    ]


def stream_map(weights: Weights, pair: Pair, maps: Maps, layer: int) -> Rotation:
    """Return the map of the student's stream, as it is now, onto the teacher's.

    Models of one width without a map are taken to share a basis.

    Raises:
        RecipeError: the widths differ, and no earlier step found a map.
    """
    rotation = maps.rotation(layer)
    basis = weights.lineage.basis
    if rotation is None:
        if pair.same and basis is not None and len(basis) == pair.teacher.width:
            return Rotation(basis.T)  # the student is its teacher in another, or a narrower, basis
        if weights.width != pair.teacher.width:
            raise RecipeError(
                "models of different widths have no weights to compare without a map of the "
                "stream; put procrustes before it."
            )
        return Rotation(torch.eye(weights.width, dtype=torch.float64))
    if basis is None:
        return rotation
    if len(basis) != len(rotation.matrix):
        # The stream was cut before the map was found, and may have been turned since. The student
        # is its teacher then, and its basis is known without a map.
        return Rotation(basis.T)
    # Maps start from the basis in which the student was opened; undo what was folded since.
    return Rotation(basis.T).then(rotation)


def layer_rows(weights: Weights, layer: int, maps: Mapping[str, Map]) -> dict[str, Tensor]:
    """Return the parameters of a layer by role, in the bases of `maps`, float64.

    Norm gains are absorbed, those on queries and keys of all heads too. Readers `q, k, v, gate, up`
    are `[rows, d + 1]` with the bias as last column. Writers `o, down` are transposed, `[rows, d]`.
    So each row belongs to one coordinate of a head or to one neuron.
    """
    rows: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    gains: dict[str, Tensor] = {}
    for template, in_any_layer in weights.adapter.params.items():
        name = template.replace("{i}", str(layer))
        kind = _inner_kind(in_any_layer)
        if not kind or name not in weights.entries:
            continue
        param = in_any_layer.at(layer)
        W = weights[name].double()
        if param.gain:
            W = W * weights.gain(param.gain)
        W = transform_param(W, param.axes, maps, param.gauge)
        if W.ndim == 1:
            (gains if param.is_gain else biases)[_reader_role(kind, param)] = W
        elif kind_of(param.axes[-1]) == kind:
            rows["o" if kind == QUERY else "down"] = W.T
        else:
            rows[_reader_role(kind, param)] = W
    for role in rows.keys() - {"o", "down"}:
        W = rows[role]
        bias = biases.get(role, W.new_zeros(len(W)))
        rows[role] = torch.cat([W, bias[:, None]], 1)
        if role in gains:
            rows[role] *= gains[role][:, None]
    return rows


def _inner_kind(param: Param) -> str:
    """Return the kind of the space inside a layer that a parameter has an axis in, or nothing."""
    kinds = [kind_of(axis) for axis in param.axes]
    return next((kind for kind in kinds if kind in (QUERY, KEY_VALUE, NEURONS)), "")


def _reader_role(kind: str, param: Param) -> str:
    """Return the role of a reader; its gauge separates k from v and gate from up."""
    gauge = kind_of(param.gauge)
    if kind == QUERY:
        return "q"
    if kind == KEY_VALUE:
        return "v" if gauge == VALUE_GAUGE else "k"
    return "up" if gauge == UP_GAUGE else "gate"


def weight_scores(
    S: Mapping[str, Tensor], T: Mapping[str, Tensor], s: HeadLayout, t: HeadLayout
) -> Similarities:
    """Return the similarities of two layers in one basis. They do not depend on any gauge.

    Heads: mean cosine of the circuits `W_qᵀ W_k` and `W_vᵀ W_oᵀ`. Neurons: mean of the cosine of
    gate rows and of the products `up downᵀ`.

    Args:
        S: the student's layer; see `layer_rows`.
        T: the teacher's layer.
        s: the student's heads.
        t: the teacher's heads.
    """
    heads = (_circuits(S, T, "q", "k", s, t) + _circuits(S, T, "o", "v", s, t)) / 2
    a = {role: unit_rows(S[role].float()) for role in ("gate", "up", "down")}
    b = {role: unit_rows(T[role].float()) for role in ("gate", "up", "down")}
    neurons = a["gate"] @ b["gate"].T
    # In blocks, because a whole second matrix [f_s, f_t] would double the memory.
    for start in range(0, len(neurons), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        neurons[block] += (a["up"][block] @ b["up"].T) * (a["down"][block] @ b["down"].T)
    return Similarities(heads, neurons.div_(2))


class _Circuit(NamedTuple):
    """The factors of the products `A_hᵀ B_h` of all heads h, and their norms."""

    A: Tensor
    """`[H, width, d]`."""
    B: Tensor
    """`[H, width, d]`, those of the groups repeated for each query head."""
    norms: Tensor
    """`[H]`."""


def _circuit(X: Mapping[str, Tensor], first: str, second: str, heads: HeadLayout) -> _Circuit:
    A = X[first].unflatten(0, (heads.query, -1))  # type: ignore[no-untyped-call]
    B = X[second].unflatten(0, (heads.groups, -1))  # type: ignore[no-untyped-call]
    B = B.repeat_interleave(heads.query // heads.groups, 0)
    # ‖AᵀB‖² is the inner product of A Aᵀ and B Bᵀ, both [width, width].
    norms = ((A @ A.mT) * (B @ B.mT)).sum((1, 2)).clamp_min(1e-30).sqrt()
    return _Circuit(A, B, norms)


def _circuits(
    S: Mapping[str, Tensor],
    T: Mapping[str, Tensor],
    first: str,
    second: str,
    s: HeadLayout,
    t: HeadLayout,
) -> Tensor:
    """Return the cosines `[H_s, H_t]` of the products `A_hᵀ B_h` of two layers.

    Only inner products of size `[width, width]` are formed, never a product `[d, d]`.
    """
    of_student = _circuit(S, first, second, s)
    of_teacher = _circuit(T, first, second, t)
    inner = torch.stack(
        [
            ((a @ of_teacher.A.mT) * (b @ of_teacher.B.mT)).sum((1, 2))
            for a, b in zip(of_student.A, of_student.B, strict=True)
        ]
    )
    cosines: Tensor = inner / of_student.norms[:, None] / of_teacher.norms
    return cosines


def unit_rows(X: Tensor) -> Tensor:
    """Return the rows divided by their norm."""
    rows: Tensor = X / X.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return rows


@dataclass(frozen=True, kw_only=True)
class LayerMatch:
    """The assignment between a student's and a teacher's layer."""

    heads: Permutation
    groups: Permutation
    neurons: Permutation
    head_figures: AssignmentDiagnostics
    neuron_figures: AssignmentDiagnostics

    @property
    def score(self) -> float:
        """How alike the two layers are: mean similarity of heads plus that of neurons."""
        return self.head_figures.score + self.neuron_figures.score

    def maps(self, layer: int, head_width: int | None) -> dict[str, Map]:
        """Return the maps of a layer.

        Heads of two widths have no common coordinates. With `head_width` None they get no map;
        their assignment stands in the diagnostics only.
        """
        maps: dict[str, Map] = {in_layer(NEURONS, layer): self.neurons}
        if head_width is not None:
            maps[in_layer(QUERY, layer)] = self.heads.blocks(head_width)
            maps[in_layer(KEY_VALUE, layer)] = self.groups.blocks(head_width)
        return maps

    def diagnostics(self, reference: int) -> LayerDiagnostics:
        """Return the figures of the layer; `reference` is the teacher's layer."""
        return LayerDiagnostics(
            reference=reference, heads=self.head_figures, neurons=self.neuron_figures
        )


def match_layers(similarities: Similarities, s: HeadLayout, t: HeadLayout) -> LayerMatch:
    """Return the best assignment between two layers, whole groups of heads together."""
    heads, groups = assign_heads(similarities.heads, s, t)
    neurons = assign(similarities.neurons)
    return LayerMatch(
        heads=_permutation(heads, s.query),
        groups=_permutation(groups, s.groups),
        neurons=_permutation(neurons, len(similarities.neurons)),
        head_figures=_figures(heads, similarities.heads, keep_permutation=True),
        neuron_figures=_figures(neurons, similarities.neurons),
    )


def _permutation(index: Tensor, old_size: int) -> Permutation:
    return Permutation(index, None if old_size == len(index) else old_size)


def _figures(index: Tensor, score: Tensor, keep_permutation: bool = False) -> AssignmentDiagnostics:
    """Return the score of an assignment, with its nulls: nothing moved, and chance."""
    assigned = (index >= 0).nonzero().flatten()
    moved = int((index != torch.arange(len(index))).sum())
    return AssignmentDiagnostics(
        identity=moved == 0,
        moved=moved,
        of=len(index),
        score=float(score[index[assigned], assigned].mean()),
        identity_score=float(score.diagonal().mean()),
        random_score=float(score.mean()),
        permutation=tuple(index.tolist()) if keep_permutation else None,
    )


def assign_heads(score: Tensor, s: HeadLayout, t: HeadLayout) -> tuple[Tensor, Tensor]:
    """Return the student's query head and group for each of the teacher's, or -1.

    The query heads of a key/value head move together, so the assignment has two levels: query heads
    inside each pair of groups, then groups on the totals of these.

    Args:
        score: similarities of query heads `[H_s, H_t]`.
        s: the student's heads.
        t: the teacher's heads.

    Returns:
        Query heads `[H_t]` and groups `[G_t]`.
    """
    student_share = s.query // s.groups
    teacher_share = t.query // t.groups
    tiles = score.reshape(s.groups, student_share, t.groups, teacher_share).transpose(1, 2)
    inner: dict[tuple[int, int], Tensor] = {}
    total = torch.zeros(s.groups, t.groups)
    for a in range(s.groups):
        for b in range(t.groups):
            index = assign(tiles[a, b])
            assigned = (index >= 0).nonzero().flatten()
            total[a, b] = tiles[a, b][index[assigned], assigned].sum()
            inner[a, b] = index
    groups = assign(total)
    heads = torch.full((t.groups, teacher_share), -1)
    for b, a in enumerate(groups.tolist()):
        if a >= 0:
            heads[b] = torch.where(inner[a, b] < 0, -1, a * student_share + inner[a, b])
    return heads.flatten(), groups


def assign(score: Tensor) -> Tensor:
    """Return for each column of `score [n, m]` its row in the best one-to-one assignment, or -1.

    Raises:
        RotdistillError: a score is not finite.
    """
    require_finite(score, "assignment")
    best = score.argmax(0)
    if score.shape[0] == score.shape[1] == len(set(best.tolist())):
        return best  # every column has its best row already
    # Negated in place and back, because `maximize=True` would copy the matrix.
    rows, columns = linear_sum_assignment(score.neg_().numpy())
    score.neg_()
    index = torch.full((score.shape[1],), -1)
    index[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return index
