"""Align two models of one shape from their weights alone, without a single text.

Problem: one rotation R of the stream, and in every layer permutations of heads and neurons and
gauges inside them, so that the student's weights come nearest to the teacher's.
Closed form of each part while the others stand still: R is the polar factor of `Σ W_sᵀ W_t` over
embedding, head, readers and writers with norm gains absorbed (Schönemann, Psychometrika 31, 1966);
heads and neurons are linear assignments; gauges as in `_gauges`. The parts take turns until nothing
changes. (Ainsworth et al., Git Re-Basin, arXiv:2209.04836, for permutations alone.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.alignment.assignment import (
    LayerMatch,
    layer_rows,
    match_layers,
    teacher_layers,
    weight_scores,
)
from rotdistill_core.architecture.spaces import KEY_VALUE, NEURONS, QUERY, in_layer, residual
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.linalg.maps import Map, Maps, Rotation
from rotdistill_core.linalg.solvers import polar
from rotdistill_weight_matching._cost import VOCABULARY_ROWS
from rotdistill_weight_matching._gauges import apply_gauge, shared_gauges, solve_gauge

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_weight_matching.step import WeightMatching

SETTLED = 1e-6
"""Largest entry of `turn - I` below which the rotation counts as settled."""
SPACE_OF_ROLE = {
    "q": QUERY,
    "o": QUERY,
    "k": KEY_VALUE,
    "v": KEY_VALUE,
    "gate": NEURONS,
    "up": NEURONS,
    "down": NEURONS,
}
"""Role of a parameter -> the space inside the layer that its rows live in."""


class LayerAlignment(NamedTuple):
    """The alignment of one layer under some rotation of the stream."""

    maps: dict[str, Map]
    match: LayerMatch
    reference: int
    """The teacher's layer."""
    distance_stream_alone: float
    """`‖S - T‖ / ‖T‖` with the rotation alone."""
    distance: float
    """The same with permutations and gauges."""
    moments: Tensor
    """`Σ W_sᵀ W_t [d, d]` of the aligned layer, for the next rotation."""


class Alignment(NamedTuple):
    """The alignment of two models."""

    R: Tensor
    """The rotation of the stream `[d, d]`."""
    spectrum: Tensor
    """Singular values of the moments that the last rotation was solved from."""
    layers: dict[int, LayerAlignment]
    rounds: int
    last_turn: float
    """Largest entry of `turn - I` in the last round."""


def solve(
    options: WeightMatching,
    weights: Weights,
    maps: Maps,
    pair: Pair,
    out: StepOutput,
    progress: Progress,
) -> Maps:
    """Add the rotation of the stream and the maps of all layers, with their figures.

    Raises:
        RecipeError: the models differ in shape, or the student is in another basis already.
        RotdistillError: a weight is not finite, or a gauge cannot be folded.
    """
    require_one_shape(weights, pair)
    alignment = take_turns(options, weights, pair, progress)
    layers = alignment.layers
    out.notes |= {
        "rounds": alignment.rounds,
        "settled": alignment.last_turn <= SETTLED,
        "last turn": alignment.last_turn,
        **summary([*layers.values()]),
    }
    rotation = Rotation(alignment.R)
    of_stream = LayerDiagnostics(
        stage=0,
        k=len(alignment.R),
        singular_values=tuple(alignment.spectrum.tolist()),
        max_rrt=rotation.error(),
    )
    new_maps: dict[str, Map] = {}
    for layer in layers.values():
        new_maps |= layer.maps
    diagnostics: dict[int, LayerDiagnostics] = {}
    for boundary in range(weights.depth + 1):
        new_maps[residual(boundary)] = rotation
        diagnostics[boundary] = replace(of_stream, layer=boundary)
    for i, layer in layers.items():
        diagnostics[i] = layer_figures(layer).merge(diagnostics[i])
    return maps.add(new_maps, diagnostics)


def take_turns(
    options: WeightMatching, weights: Weights, pair: Pair, progress: Progress
) -> Alignment:
    """Return the alignment after rounds of layers and stream, until the stream settles."""
    references = teacher_layers(weights, pair)
    # Rows of embedding and head are the same tokens in both, whatever heads and neurons are.
    vocabulary = vocabulary_moments(weights, pair.teacher.weights)
    R, spectrum = polar(vocabulary, "weight-matching: vocabulary")
    eye = torch.eye(len(R), dtype=torch.float64)
    layers: dict[int, LayerAlignment] = {}
    last_turn = math.inf
    rounds = 0
    while rounds < options.max_rounds and last_turn > SETTLED:
        rounds += 1
        M = R.T @ vocabulary
        for i in range(weights.depth):
            layers[i] = align_layer(options, weights, pair, i, references[i], R)
            M += layers[i].moments
            progress(i + 1, weights.depth, f"round {rounds}")
        # M is in the basis of R, so its polar factor is how far R still has to turn.
        turn, spectrum = polar(M, f"weight-matching: round {rounds}")
        R = R @ turn
        last_turn = float((turn - eye).abs().max())
    return Alignment(R=R, spectrum=spectrum, layers=layers, rounds=rounds, last_turn=last_turn)


def align_layer(
    options: WeightMatching,
    weights: Weights,
    pair: Pair,
    layer: int,
    reference: int,
    R: Tensor,
) -> LayerAlignment:
    """Return the maps of one layer's heads and neurons under a rotation `R [d, d]` of the stream.

    Args:
        options: which matrices a value gauge may be.
        weights: the student.
        pair: teacher and student.
        layer: number of the student's layer.
        reference: number of the teacher's layer.
        R: the rotation of the stream so far.
    """
    heads = weights.adapter.heads(weights.config)
    d = len(R)
    # The last column of readers is their bias, which the stream does not rotate.
    S = {
        role: torch.cat([rows[:, :d] @ R, rows[:, d:]], 1)
        for role, rows in layer_rows(weights, layer, {}).items()
    }
    T = layer_rows(pair.teacher.weights, reference, {})
    distance_stream_alone = layer_distance(S, T)
    # First which head and neuron is which, then what is free inside them.
    match = match_layers(weight_scores(S, T, heads, heads), heads, heads)
    layer_maps = match.maps(layer, heads.width)
    S = {
        role: layer_maps[in_layer(SPACE_OF_ROLE[role], layer)].apply(rows, 0)
        for role, rows in S.items()
    }
    for kind in sorted(shared_gauges(weights, pair)):
        where = f"weight-matching: layer {layer}"
        gauge = solve_gauge(kind, S, T, heads, options.value_gauge, where)
        layer_maps[in_layer(kind, layer)] = gauge
        S |= apply_gauge(kind, gauge, S)
    moments = torch.zeros_like(R)
    for role in S:
        moments = moments + unit_moments(S[role][:, :d], T[role][:, :d])
    return LayerAlignment(
        maps=layer_maps,
        match=match,
        reference=reference,
        distance_stream_alone=distance_stream_alone,
        distance=layer_distance(S, T),
        moments=moments,
    )


def unit_moments(S: Tensor, T: Tensor) -> Tensor:
    """Return `Sᵀ T [d, d]` with both at norm 1, so that no parameter counts for its size."""
    moments: Tensor = S.T @ T / (S.norm() * T.norm()).clamp_min(1e-30)
    return moments


def vocabulary_moments(weights: Weights, teacher: Weights) -> Tensor:
    """Return the moments `[d, d]` of embedding and head, the final norm gain absorbed.

    Their rows are the same tokens in both models, so nothing has to be matched first.
    """
    ones = torch.ones(weights.width, dtype=torch.float64)
    embeddings = _scaled_moments(
        weights[weights.adapter.embedding], teacher[teacher.adapter.embedding], ones, ones
    )
    heads = _scaled_moments(
        weights.head(),
        teacher.head(),
        weights.gain(weights.adapter.norm),
        teacher.gain(teacher.adapter.norm),
    )
    return embeddings + heads


def _scaled_moments(S: Tensor, T: Tensor, student_gain: Tensor, teacher_gain: Tensor) -> Tensor:
    """Return `Sᵀ T [d, d]`, columns times their gains, both sides at norm 1."""
    M = torch.zeros(S.shape[1], T.shape[1], dtype=torch.float64)
    student_energy = 0.0
    teacher_energy = 0.0
    for start in range(0, len(S), VOCABULARY_ROWS):
        A = S[start : start + VOCABULARY_ROWS].double() * student_gain
        B = T[start : start + VOCABULARY_ROWS].double() * teacher_gain
        M += A.T @ B
        student_energy += float(A.pow(2).sum())
        teacher_energy += float(B.pow(2).sum())
    product = student_energy * teacher_energy
    scaled: Tensor = M / max(product**0.5, 1e-30)
    return scaled


def layer_distance(S: Mapping[str, Tensor], T: Mapping[str, Tensor]) -> float:
    """Return `‖S - T‖ / ‖T‖` of a layer, each parameter counted alike."""
    parts = [float((S[role] - T[role]).norm() / T[role].norm().clamp_min(1e-30)) for role in T]
    return math.sqrt(sum(part**2 for part in parts) / len(parts))


def layer_figures(layer: LayerAlignment) -> LayerDiagnostics:
    """Return the figures of a layer."""
    distances = {
        "distance_stream_alone": layer.distance_stream_alone,
        "distance": layer.distance,
    }
    return replace(layer.match.diagnostics(layer.reference), extra=distances)


def summary(layers: Sequence[LayerAlignment]) -> dict[str, Any]:
    """Return the figures of all layers, for the notes."""
    alone = sum(layer.distance_stream_alone for layer in layers) / len(layers)
    return {
        "layers whose heads change": sum(not x.match.head_figures.identity for x in layers),
        "layers whose neurons change": sum(not x.match.neuron_figures.identity for x in layers),
        "distance_stream_alone": alone,
        "distance": sum(layer.distance for layer in layers) / len(layers),
    }


def require_one_shape(weights: Weights, pair: Pair) -> None:
    """Raise RecipeError unless both models have one shape and the student its original basis."""
    if weights.lineage.basis is not None:
        raise RecipeError(
            "weight-matching: the student is in another basis already; put it before basis-fold."
        )
    teacher = pair.teacher.weights
    student_sizes = weights.adapter.sizes(weights.config)
    teacher_sizes = teacher.adapter.sizes(teacher.config)
    shared = student_sizes.keys() & teacher_sizes.keys()
    different = [space for space in shared if student_sizes[space] != teacher_sizes[space]]
    if pair.student.depth != pair.teacher.depth:
        different.append("depth")
    student_heads = weights.adapter.heads(weights.config)
    teacher_heads = teacher.adapter.heads(teacher.config)
    if different or student_heads != teacher_heads:
        what = min(different, default="heads")
        raise RecipeError(
            f"weight-matching: needs models of one shape, these differ in {what}; "
            'use "procrustes" and "hungarian-permute".'
        )
