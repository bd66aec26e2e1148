"""Solve the gauges of every layer against the teacher's layer, and measure what they bring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.alignment.assignment import layer_rows, stream_map, teacher_layers
from rotdistill_core.architecture.spaces import KEY_VALUE, NEURONS, QUERY, RESIDUAL, in_layer
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.diagnostics import GaugeDiagnostics, LayerDiagnostics
from rotdistill_core.linalg.maps import Gauge, Map, Maps
from rotdistill_weight_matching._gauges import (
    SIDES,
    Rows,
    apply_gauge,
    shared_gauges,
    solve_gauge,
)

if TYPE_CHECKING:
    from rotdistill_core.architecture.table import HeadLayout
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_weight_matching.head_gauge import HeadGauge


def solve(
    options: HeadGauge,
    weights: Weights,
    maps: Maps,
    pair: Pair,
    out: StepOutput,
    progress: Progress,
) -> Maps:
    """Add the gauges of all layers, with their figures.

    Raises:
        RecipeError: none of the gauges asked for is free in both models.
        RotdistillError: a weight is not finite, or a gauge cannot be folded.
    """
    kinds = sorted(shared_gauges(weights, pair) & set(options.gauges))
    if not kinds:
        raise RecipeError(
            "head-gauge: the two models have neither heads nor neurons of one shape in which these "
            "gauges are free. Leave the step out."
        )
    heads = weights.adapter.heads(weights.config)
    new_maps: dict[str, Map] = {}
    diagnostics: dict[int, LayerDiagnostics] = {}
    figures: dict[str, list[GaugeDiagnostics]] = {kind: [] for kind in kinds}
    for i, at_same_depth in enumerate(teacher_layers(weights, pair)):
        to_teacher = {RESIDUAL: stream_map(weights, pair, maps, i), **_permutations(maps, i)}
        S = layer_rows(weights, i, to_teacher)
        T = layer_rows(pair.teacher.weights, reference_layer(maps, i, at_same_depth), {})
        for kind in kinds:
            where = f"head-gauge: layer {i}"
            gauge = solve_gauge(kind, S, T, heads, options.value_gauge, where)
            new_maps[in_layer(kind, i)] = gauge
            figures[kind].append(distances(kind, S, T, gauge, heads))
        gauges = {kind: figures[kind][i] for kind in kinds}
        diagnostics[i] = LayerDiagnostics(gauges=gauges)
        progress(i + 1, weights.depth, "gauges")
    for kind in kinds:
        out.notes[kind] = _means(figures[kind])
    return maps.add(new_maps, diagnostics)


def _permutations(maps: Maps, layer: int) -> dict[str, Map]:
    """Return the bijections of a layer's heads and neurons that an earlier step found."""
    spaces = [in_layer(kind, layer) for kind in (QUERY, KEY_VALUE, NEURONS)]
    return {space: maps[space] for space in spaces if space in maps and maps[space].square}


def reference_layer(maps: Maps, layer: int, default: int) -> int:
    """Return the teacher's layer that an earlier aligner matched a layer with, or `default`."""
    measured = maps.diagnostics.get(layer)
    return default if measured is None or measured.reference is None else measured.reference


def distances(kind: str, S: Rows, T: Rows, gauge: Gauge, heads: HeadLayout) -> GaugeDiagnostics:
    """Return `‖S - T‖ / ‖T‖` before and after a gauge, and the null.

    The null fits a gauge to a teacher whose stream coordinates are out of step by half of them.
    """
    out_of_step = {role: T[role].roll(T[role].shape[1] // 2, 1) for role in SIDES[kind]}
    chance = solve_gauge(kind, S, {**T, **out_of_step}, heads, "orthogonal", "chance")
    return GaugeDiagnostics(
        distance_before=_distance(kind, S, T),
        distance_after=_distance(kind, apply_gauge(kind, gauge, S), T),
        distance_chance=_distance(kind, apply_gauge(kind, chance, S), out_of_step),
    )


def _distance(kind: str, S: Rows, T: Rows) -> float:
    """Return `‖S - T‖ / ‖T‖` over both sides of a gauge."""
    difference = _energy([S[role] - T[role] for role in SIDES[kind]])
    whole = _energy([T[role] for role in SIDES[kind]])
    return float((difference / whole).sqrt())


def _energy(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.pow(2).sum() for part in parts]).sum()


def _means(layers: list[GaugeDiagnostics]) -> dict[str, float]:
    """Return the figures of a gauge, averaged over layers, for the notes."""
    return {
        "distance_before": sum(layer.distance_before for layer in layers) / len(layers),
        "distance_after": sum(layer.distance_after for layer in layers) / len(layers),
        "distance_chance": sum(layer.distance_chance for layer in layers) / len(layers),
    }
