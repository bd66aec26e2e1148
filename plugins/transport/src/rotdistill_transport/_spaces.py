"""The maps from the spaces of a fine-tuned model A to those of the student B.

Weights decide where they can. Where the embeddings of B are those of A in another basis,
`E_B = E_A Q`, the two are kin: B is A turned, cut, or trained further. The map of the stream is
then Q, found by least squares where no record of the run has it. Layers, heads and neurons are
matched by weights in that basis, and gauges solved for. Models that are not kin need the maps of an
aligner that ran before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.alignment.assignment import layer_rows, match_layers, weight_scores
from rotdistill_core.architecture.spaces import (
    KEY_GAUGE,
    KEY_VALUE,
    NEURONS,
    QUERY,
    RESIDUAL,
    UP_GAUGE,
    VALUE_GAUGE,
    in_layer,
    kind_of,
)
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Gauge, Map, Maps, Permutation, Rotation
from rotdistill_core.linalg.solvers import polar, require_finite

if TYPE_CHECKING:
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_transport._source import Source

KIN = 0.2
"""Relative distance of the embeddings up to which two models are kin."""
SAME = 5e-3
"""Relative distance up to which two matrices are the same, rounded to bfloat16 or not."""
ROWS_PER_CHANNEL = 16
"""Rows of the embeddings that decide on the basis, for each channel of the stream."""
COMPARED_ROWS = 1024
"""Rows of the embeddings, evenly spread, on which a recorded basis is tried."""


class Stream(NamedTuple):
    """How the residual stream of A becomes that of B at a layer boundary: `x_B = write x_A Q`."""

    Q: Tensor | None
    """`[d_A, d_B]`, float64; None: the identity."""
    read: float
    """Factor of what a reader reads after the norm: the norms are over other numbers of
    channels."""
    write: float
    """Factor of what is written."""

    def turned(self, X: Tensor) -> Tensor:
        """Return rows `X [n, d_A]` in the basis of B `[n, d_B]`."""
        return X if self.Q is None else X @ self.Q


@dataclass(frozen=True, kw_only=True)
class Target:
    """The student that a fine-tune is carried to, with what earlier steps found about it."""

    weights: Weights
    """As the steps before left it."""
    pair: Pair
    maps: Maps
    """An aligner's, from the student to its teacher."""
    activations: ActivationStore | None
    """They say which boundaries were captured, and which are the teacher's at the same depth."""


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """All maps from A to B."""

    streams: Sequence[Stream]
    """One for each layer boundary of B."""
    layers: Sequence[int]
    """For each layer of B, the layer of A."""
    inner: Mapping[str, Map]
    """Space or gauge of a layer of B -> the map. Heads of two widths have none."""
    how: str
    """Where the maps come from, for the notes."""
    similarity: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """`heads`, `neurons` -> mean similarity of what is matched, and of all, its null."""


def find_spaces(source: Source, target: Target) -> Spaces:
    """Return the maps from the base of a fine-tune to the student as it is now.

    Raises:
        RecipeError: the two are not kin, and no aligner found maps between them.
        RotdistillError: a weight is not finite.
    """
    base, weights = source.weights, target.weights
    Q = _recorded_basis(source, weights, target.pair)
    if Q is not None:
        layers: Sequence[int] = weights.lineage.depths[:-1]
        streams, how = _one_stream(Q.matrix, base, weights), "the record of the run"
    else:
        Q = basis_of_embeddings(base, weights)
        if Q is not None:
            streams, how = _one_stream(Q.matrix, base, weights), "weights"
            layers = matched_layers(base, weights, streams[0])
        else:
            streams, layers = _aligned(source, target)
            how = "the aligner"
    found = Spaces(streams=streams, layers=layers, inner={}, how=how)
    return _with_inner_maps(found, base, weights)


class _Basis(NamedTuple):
    matrix: Tensor | None
    """`[d_A, d_B]`; None: the identity."""


def _one_stream(Q: Tensor | None, base: Weights, weights: Weights) -> list[Stream]:
    read = math.sqrt(base.width / weights.width)
    return [Stream(Q, read, 1.0)] * (weights.depth + 1)


def _recorded_basis(source: Source, weights: Weights, pair: Pair) -> _Basis | None:
    """Return the basis that the run has recorded, if the base is its student as it was opened.

    A record says nothing of what happened to a checkpoint outside, so embeddings are compared.
    """
    if source.base.fingerprint != pair.student.fingerprint:
        return None
    Q = weights.lineage.basis
    if (Q.shape[1] if Q is not None else source.weights.width) != weights.width:
        return None
    E_A, E_B = (view[view.adapter.embedding] for view in (source.weights, weights))
    rows = torch.arange(0, min(len(E_A), len(E_B)), max(1, len(E_A) // COMPARED_ROWS))
    A, B = E_A[rows].double(), E_B[rows].double()
    A = A if Q is None else A @ Q
    return _Basis(Q) if float((A - B).norm()) <= KIN * float(B.norm()) else None


def basis_of_embeddings(base: Weights, weights: Weights) -> _Basis | None:
    """Return Q of `E_B = E_A Q`, the embeddings of two models of one vocabulary; None: none is
    near.

    Problem: `min_Q ‖E_A Q - E_B‖²`. Closed form: `Q = (E_AᵀE_A)⁻¹ E_AᵀE_B`, with a second step on
    what the first leaves. Then the orthogonal factor, `QᵀQ = I` or `Q Qᵀ = I`.
    (Schönemann, Psychometrika 31, 1966.)

    Rows are evenly spread, many more than there are unknowns in a column.
    """
    one, two = (view.entries[view.adapter.embedding] for view in (base, weights))
    n = min(one.shape[0], two.shape[0])
    rows = torch.arange(0, n, max(1, n // (ROWS_PER_CHANNEL * one.shape[1])))
    A, B = one.read()[rows].double(), two.read()[rows].double()
    if A.shape == B.shape and _distance(A, B) <= SAME:
        return _Basis(None)
    C = A.T @ A
    require_finite(C, "transport: embeddings of the base")
    require_finite(B, "transport: embeddings of the student")
    # Channels that no token uses would make it singular; `polar` completes them.
    C.diagonal().add_(1e-12 * C.diagonal().mean())
    factor = torch.linalg.cholesky(C)
    Q = torch.cholesky_solve(A.T @ B, factor)
    # The second step takes away what rounding of C has left in the first.
    Q = Q + torch.cholesky_solve(A.T @ (B - A @ Q), factor)
    wide = Q.shape[0] <= Q.shape[1]
    R = polar(Q if wide else Q.T, "transport: basis")[0]
    Q = R if wide else R.T
    return _Basis(Q) if _distance(A @ Q, B) <= KIN else None


def _distance(A: Tensor, B: Tensor) -> float:
    """Return `‖A - B‖ / ‖B‖`."""
    return float((A - B).norm() / B.norm().clamp_min(1e-300))


def matched_layers(base: Weights, weights: Weights, stream: Stream) -> list[int]:
    """Return for each layer of B the layer of A that it was, rising.

    Layers are compared by the cosine of `W_gateᵀ W_gate`, which no order of neurons changes. The
    best rising choice is found by dynamic programming.
    """
    if base.depth == weights.depth:
        return list(range(base.depth))
    own = [_gram(weights, i) for i in range(weights.depth)]
    score = torch.full((weights.depth, base.depth), -math.inf)
    for j in range(base.depth):
        G = _gram(base, j)
        if stream.Q is not None:
            Q = stream.Q.float()
            G = Q.T @ G @ Q
        for i, F in enumerate(own):
            score[i, j] = (F * G).sum() / (F.norm() * G.norm()).clamp_min(1e-300)
    if weights.depth > base.depth:
        return [int(j) for j in score.argmax(1).cummax(0).values]
    # best[i, j]: layers up to i, of which the last one is j.
    best, back = score.clone(), torch.zeros_like(score, dtype=torch.long)
    for i in range(1, weights.depth):
        before, place = best[i - 1].cummax(0)
        best[i, 0] = -math.inf
        best[i, 1:] = score[i, 1:] + before[:-1]
        back[i, 1:] = place[:-1]
    chosen = [int(best[-1].argmax())]
    for i in range(weights.depth - 1, 0, -1):
        chosen.append(int(back[i, chosen[-1]]))
    return chosen[::-1]


def _gram(weights: Weights, layer: int) -> Tensor:
    table = weights.adapter.expand(weights.config)
    gate = in_layer(NEURONS, layer)
    name = next(
        name
        for name, param in table.items()
        if param.axes == (gate, RESIDUAL) and not param.gauge and name in weights.entries
    )
    W = weights[name].float()
    gain = table[name].gain
    W = W * weights.gain(gain).float() if gain else W
    return W.T @ W


def _aligned(source: Source, target: Target) -> tuple[list[Stream], list[int]]:
    """Return streams and layers as an aligner found them between the student and its teacher."""
    weights, maps, pair = target.weights, target.maps, target.pair
    activations = target.activations
    base, teacher = source.base, pair.teacher
    like_teacher = (base.width, base.depth) == (teacher.width, teacher.depth)
    depths = weights.lineage.depths
    captured = activations.depths if activations else tuple(range(len(depths)))
    numbers = [captured.index(depth) if depth in captured else -1 for depth in depths]
    rotations = [maps.rotation(number) for number in numbers]
    if not like_teacher or pair.anchor or any(rotation is None for rotation in rotations):
        why = (
            "no aligner ran before this step that maps the student to its teacher at every layer"
            if like_teacher
            else "the recipe's teacher has another shape than the base, so no aligner can help"
        )
        raise RecipeError(
            f"transport: the student is not {base.ref.model} in another basis or cut (its "
            f"embeddings are others), and {why}. Make the fine-tune or its base the teacher of the "
            "recipe, and put residuals and procrustes before this step, without an [anchor]."
        )
    streams = []
    for number, rotation in zip(numbers, rotations, strict=True):
        assert rotation is not None
        R = rotation.matrix.double()
        if weights.lineage.basis is not None:
            R = weights.lineage.basis.T @ R
        diagnostics = maps.diagnostics.get(number)
        # How long the student's stream is beside the teacher's.
        ratio = (diagnostics.rms_ratio if diagnostics else None) or 1.0
        streams.append(Stream(R.T, rotation.scale, ratio))
    boundaries = activations.teacher_boundaries if activations else ()
    at = [boundaries[d] if boundaries else pair.teacher_depth(d) for d in depths[:-1]]
    return streams, [min(boundary, base.depth - 1) for boundary in at]


def _with_inner_maps(found: Spaces, base: Weights, weights: Weights) -> Spaces:
    """Match heads and neurons of every layer by weights in one basis, and solve for gauges."""
    s, t = base.adapter.heads(base.config), weights.adapter.heads(weights.config)
    gauges = {kind_of(p.gauge) for p in weights.adapter.params.values() if p.gauge}
    inner: dict[str, Map] = {}
    figures: dict[str, list[tuple[float, float]]] = {"heads": [], "neurons": []}
    for i, j in enumerate(found.layers):
        stream = found.streams[i]
        S = layer_rows(base, j, {} if stream.Q is None else {RESIDUAL: Rotation(stream.Q)})
        T = layer_rows(weights, i, {})
        # Only readers are the same before and after a refit. Their last column is the bias.
        for role in ("q", "k", "v", "gate", "up"):
            S[role] = torch.cat([stream.read * S[role][:, :-1], S[role][:, -1:]], 1)
        roles = [role for role in ("q", "k", "v", "gate", "up") if S[role].shape == T[role].shape]
        if len(roles) == 5 and all(_distance(S[role], T[role]) <= SAME for role in roles):
            continue
        match = match_layers(weight_scores(S, T, s, t), s, t)
        layer = match.maps(i, s.width if s.width == t.width else None)
        figures["heads"].append((match.head_figures.score, match.head_figures.random_score))
        figures["neurons"].append((match.neuron_figures.score, match.neuron_figures.random_score))
        inner |= layer
        heads, neurons = layer.get(in_layer(KEY_VALUE, i)), layer[in_layer(NEURONS, i)]
        if isinstance(heads, Permutation):
            for kind, role in ((VALUE_GAUGE, "v"), (KEY_GAUGE, "k")):
                G = _gauge(kind, heads.apply(S[role], 0), T[role], t.width)
                if kind in gauges and G is not None:
                    inner[in_layer(kind, i)] = Gauge(G)
        G = _gauge(UP_GAUGE, neurons.apply(S["up"], 0), T["up"], 1)
        if UP_GAUGE in gauges and G is not None:
            inner[in_layer(UP_GAUGE, i)] = Gauge(G)
    means = {
        kind: (sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs))
        for kind, pairs in figures.items()
        if pairs
    }
    return replace(found, inner=inner, similarity=means)


def _gauge(kind: str, S: Tensor, T: Tensor, width: int) -> Tensor | None:
    """Return the gauge `T = Gᵀ S` of each head or neuron `[n, width, width]`.

    None where it is no better than none: then what differs is not a gauge, as after a training run.

    Args:
        kind: `value` (any matrix), `key` (a complex factor for each rotary pair), `up` (a factor).
        S: rows of A, matched `[n width, d]`.
        T: rows of B `[n width, d]`.
        width: coordinates of a head, or 1.
    """
    A, B = S.reshape(-1, width, S.shape[1]), T.reshape(-1, width, T.shape[1])
    if kind == KEY_GAUGE:
        half = width // 2
        a = torch.complex(A[:, :half], A[:, half:])
        b = torch.complex(B[:, :half], B[:, half:])
        c = (b * a.conj()).sum(-1) / a.abs().square().sum(-1).clamp_min(1e-300)
        real, imag = torch.diag_embed(c.real), torch.diag_embed(c.imag)
        # Row by row, (x, y) becomes (x re - y im, x im + y re).
        G = torch.cat([torch.cat([real, imag], -1), torch.cat([-imag, real], -1)], -2)
    else:
        C = A @ A.mT
        floor = (1e-14 * C.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(1e-30)
        eye = torch.eye(width, dtype=C.dtype)
        # Towards the identity where A leaves it open.
        G = eye + torch.linalg.solve(C + floor[:, None, None] * eye, A @ (B - A).mT)
    without, left = float((B - A).norm()), float((B - G.mT @ A).norm())
    return G if left < 0.1 * without and without > SAME * float(B.norm()) else None


def random_spaces(found: Spaces, base: Weights, weights: Weights, seed: int) -> Spaces:
    """Return random maps between the same spaces, a control: rotations, and other orders."""
    generator = torch.Generator().manual_seed(seed)
    a, b = base.width, weights.width
    noise = torch.randn(max(a, b), min(a, b), dtype=torch.float64, generator=generator)
    Q = torch.linalg.qr(noise)[0]
    Q = Q if a >= b else Q.T
    inner: dict[str, Map] = {}
    sizes, own = base.adapter.sizes(base.config), weights.adapter.sizes(weights.config)
    one, two = base.adapter.heads(base.config), weights.adapter.heads(weights.config)
    for i, j in enumerate(found.layers):
        spaces = [(NEURONS, sizes[in_layer(NEURONS, j)], own[in_layer(NEURONS, i)], 1)]
        if one.width == two.width:
            spaces.append((QUERY, one.query, two.query, one.width))
            spaces.append((KEY_VALUE, one.groups, two.groups, one.width))
        for kind, old, new, width in spaces:
            order = torch.randperm(max(old, new), generator=generator)[:new]
            index = torch.where(order < old, order, -1)
            inner[in_layer(kind, i)] = Permutation(index, old).blocks(width)
    streams = [stream._replace(Q=Q) for stream in found.streams]
    return replace(found, streams=streams, inner=inner)
