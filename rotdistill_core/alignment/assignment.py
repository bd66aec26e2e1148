"""Layers of two models in one basis, how alike their heads and neurons are, and the best one-to-one assignment of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.architecture.table import HeadLayout
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.linalg.maps import Map, Maps, Permutation, Rotation


HeadScores = tuple["Tensor", "Tensor"]
"""Similarities of query heads `[H_s, H_t]` and of neurons `[f_s, f_t]`."""
BLOCK_ROWS = 512


def teacher_layers(weights: Weights, pair: Pair) -> list[int]:
    """Return for each of the student's layers the teacher's at the same depth."""
    return [
        min(pair.teacher_depth(boundary), pair.teacher.depth - 1)
        for boundary in weights.lineage.depths[:-1]
    ]


def stream_map(weights: Weights, pair: Pair, maps: Maps, layer: int) -> Rotation:
    """Return the map of the stream as it is now onto the teacher's; models of one width without one are taken to share a basis."""
    import torch

    from rotdistill_core.errors import RecipeError
    from rotdistill_core.linalg.maps import Rotation

    found = maps.rotation(layer) or (
        Rotation(torch.eye(weights.width, dtype=torch.float64))
        if weights.width == pair.teacher.width
        else None
    )
    if found is None:
        raise RecipeError(
            "models of different widths have no weights to compare without a map of the stream; put procrustes before it."
        )
    basis = weights.lineage.basis
    return found if basis is None or maps.rotation(layer) is None else Rotation(basis.T).then(found)


def layer_rows(weights: Weights, layer: int, maps: Mapping[str, Map]) -> dict[str, Tensor]:
    """Return what a layer reads and writes in the bases of `maps`, float64, norm gains absorbed: `q, k, v, gate, up [rows, d + 1]`
    with the bias as last column, and `o, down [rows, d]`, transposed.
    """
    import torch

    from rotdistill_core.linalg.maps import transform_param

    rows: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for template, general in weights.adapter.params.items():
        space = next(
            (axis for axis in general.axes if axis in ("q.{i}", "kv.{i}", "neurons.{i}")), ""
        )
        name, param = template.replace("{i}", str(layer)), general.at(layer)
        if space and name in weights.entries:
            W = weights[name].double()
            W = transform_param(
                W * weights.gain(param.gain) if param.gain else W, param.axes, maps, param.gauge
            )
            if general.axes[-1] == space and W.ndim == 2:
                rows["o" if space == "q.{i}" else "down"] = W.T
            else:
                free = param.gauge.partition(".")[0]
                role = {"q.{i}": "q", "kv.{i}": "v" if free == "value" else "k"}.get(
                    space, "up" if free == "up" else "gate"
                )
                (rows if W.ndim == 2 else biases)[role] = W
    for role in rows.keys() - {"o", "down"}:
        bias = biases.get(role, rows[role].new_zeros(len(rows[role])))
        rows[role] = torch.cat([rows[role], bias[:, None]], 1)
    return rows


def weight_scores(
    S: Mapping[str, Tensor], T: Mapping[str, Tensor], s: HeadLayout, t: HeadLayout
) -> HeadScores:
    """Return the similarities of two layers in one basis. They do not depend on any gauge.

    Heads: mean cosine of the circuits `W_qᵀ W_k` and `W_vᵀ W_oᵀ`. Neurons: mean of the cosine of gate and of `up downᵀ`.
    """
    heads = (_circuits(S, T, "q", "k", s, t) + _circuits(S, T, "o", "v", s, t)) / 2
    a, b = ({role: unit_rows(X[role].float()) for role in ("gate", "up", "down")} for X in (S, T))
    neurons = a["gate"] @ b["gate"].T
    for k in range(
        0, len(neurons), BLOCK_ROWS
    ):  # a whole second matrix [f, f] would double the memory
        neurons[k : k + BLOCK_ROWS] += (a["up"][k : k + BLOCK_ROWS] @ b["up"].T) * (
            a["down"][k : k + BLOCK_ROWS] @ b["down"].T
        )
    return heads, neurons.div_(2)


def _circuits(
    S: Mapping[str, Tensor],
    T: Mapping[str, Tensor],
    one: str,
    other: str,
    s: HeadLayout,
    t: HeadLayout,
) -> Tensor:
    """Return the cosines `[H_s, H_t]` of the products `A_hᵀ B_g`, from `k x k` inner products alone."""
    import torch

    def split(X: Mapping[str, Tensor], heads: HeadLayout) -> tuple[Tensor, Tensor, Tensor]:
        A, B = X[one].unflatten(0, (heads.query, -1)), X[other].unflatten(0, (heads.groups, -1))  # type: ignore[no-untyped-call]
        B = B.repeat_interleave(heads.query // heads.groups, 0)
        return A, B, ((A @ A.mT) * (B @ B.mT)).sum((1, 2)).clamp_min(1e-30).sqrt()

    (A, B, n), (C, D, m) = split(S, s), split(T, t)
    inner = torch.stack([((a @ C.mT) * (b @ D.mT)).sum((1, 2)) for a, b in zip(A, B, strict=True)])
    cosines: Tensor = inner / n[:, None] / m
    return cosines


def unit_rows(X: Tensor) -> Tensor:
    """Return the rows divided by their norm."""
    rows: Tensor = X / X.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return rows


@dataclass(frozen=True)
class Match:
    """The assignment between two layers."""

    heads: Permutation
    groups: Permutation
    neurons: Permutation
    about: Mapping[str, Mapping[str, Any]]
    """Part -> figures for the card."""

    @property
    def score(self) -> float:
        """How alike the two layers are."""
        return float(sum(part["score"] for part in self.about.values()))

    def maps(self, layer: int, width: int | None) -> dict[str, Map]:
        """Return the maps of a layer. Heads of two widths have no common coordinates, so they (`None`) are told in the card only."""
        found: dict[str, Map] = {f"neurons.{layer}": self.neurons}
        if width is not None:
            found |= {
                f"q.{layer}": self.heads.blocks(width),
                f"kv.{layer}": self.groups.blocks(width),
            }
        return found


def match(scores: HeadScores, s: HeadLayout, t: HeadLayout) -> Match:
    """Return the best assignment between two layers, whole groups of heads together."""
    from rotdistill_core.linalg.maps import Permutation

    heads, groups = assign_heads(scores[0], s, t)
    neurons = assign(scores[1])

    def assignment(index: Tensor, old: int) -> Permutation:
        return Permutation(index, None if old == len(index) else old)

    about = {
        "heads": {**_figures(heads, scores[0]), "permutation": heads.tolist()},
        "neurons": _figures(neurons, scores[1]),
    }
    return Match(
        assignment(heads, s.query),
        assignment(groups, s.groups),
        assignment(neurons, len(scores[1])),
        about,
    )


def _figures(index: Tensor, score: Tensor) -> dict[str, Any]:
    """Return what an assignment scores, beside its nulls: nothing moved, and chance."""
    import torch

    taken = (index >= 0).nonzero().flatten()
    moved = int((index != torch.arange(len(index))).sum())
    return {
        "identity": moved == 0, "moved": moved, "of": len(index), "score": float(score[index[taken], taken].mean()),
        "identity_score": float(score.diagonal().mean()), "random_score": float(score.mean()),
    }  # fmt: skip


def assign_heads(score: Tensor, s: HeadLayout, t: HeadLayout) -> tuple[Tensor, Tensor]:
    """Return for each of the teacher's query heads and groups the student's, or -1: inside each pair of groups, then over groups."""
    import torch

    each, other = s.query // s.groups, t.query // t.groups
    tiles = score.reshape(s.groups, each, t.groups, other).transpose(1, 2)
    inner = {(a, b): assign(tiles[a, b]) for a in range(s.groups) for b in range(t.groups)}
    total = torch.zeros(s.groups, t.groups)
    for (a, b), index in inner.items():
        taken = (index >= 0).nonzero().flatten()
        total[a, b] = tiles[a, b][index[taken], taken].sum()
    groups = assign(total)
    heads = torch.full((t.groups, other), -1)
    for b, a in enumerate(groups.tolist()):
        if a >= 0:
            heads[b] = torch.where(inner[a, b] < 0, -1, a * each + inner[a, b])
    return heads.flatten(), groups


def assign(score: Tensor) -> Tensor:
    """Return for each column of `score [n, m]` its row in the best one-to-one assignment, or -1."""
    import torch
    from scipy.optimize import linear_sum_assignment

    from rotdistill_core.linalg.solvers import require_finite

    require_finite(score, "assignment")
    best = score.argmax(0)
    if score.shape[0] == score.shape[1] == len(set(best.tolist())):
        return best  # every column has its best row already
    rows, columns = linear_sum_assignment(
        score.neg_().numpy()
    )  # maximize=True would copy the matrix
    score.neg_()
    index = torch.full((score.shape[1],), -1)
    index[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return index
