"""Match layers of two models, and inside them heads and neurons, by linear assignment.

Problem: `max_P Σ_j score[P(j), j]` over one-to-one assignments P. (Kuhn, Naval Research Logistics
2, 1955; Ainsworth et al., Git Re-Basin, arXiv:2209.04836.) Heads take two levels, because the query
heads of a key/value head can only move together: query heads inside each pair of groups, then
groups on those totals. The assignments themselves are `rotdistill_core.alignment.assignment`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rotdistill_core.alignment.assignment import (
    LayerMatch,
    Similarities,
    assign,
    layer_rows,
    match_layers,
    stream_map,
    teacher_layers,
    weight_scores,
)
from rotdistill_core.architecture.spaces import RESIDUAL
from rotdistill_core.data.splits import Side
from rotdistill_core.linalg.diagnostics import AssignmentDiagnostics, LayerDiagnostics
from rotdistill_core.linalg.maps import Map, Maps
from rotdistill_core.store.layout import RunLayout
from rotdistill_hungarian_permute._activations import ActivationComparison

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_hungarian_permute.step import HungarianPermute

Comparison = Callable[[int, int], Similarities]
"""Number of a student's layer, number of a teacher's layer -> their similarities."""


def solve(
    options: HungarianPermute,
    weights: Weights,
    maps: Maps,
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
) -> Maps:
    """Add the assignments of all layers, with their figures.

    Raises:
        RecipeError: the streams have different widths and no map, or the tokenizers differ where
            activations are compared.
        RotdistillError: a similarity is not finite.
    """
    activations = None
    compare: Comparison = partial(compare_weights, weights, pair, maps)
    if options.criterion == "activations":
        activations = ActivationComparison(
            weights, pair, samples, options.max_texts, options.within_stage
        )
        compare = activations.compare
    s = weights.adapter.heads(weights.config)
    t = pair.teacher.adapter.heads(pair.teacher.config)
    partners = teacher_layers(weights, pair)
    new_maps: dict[str, Map] = {}
    diagnostics: dict[int, LayerDiagnostics] = {}
    for start in range(0, weights.depth, options.within_stage):
        stage = range(start, min(start + options.within_stage, weights.depth))
        # Every student layer of the stage with every teacher layer of it.
        matches = {
            (i, j): match_layers(compare(i, partners[j]), s, t) for i in stage for j in stage
        }
        for i, j in assign_layers(matches, stage):
            match = matches[i, j]
            new_maps |= match.maps(i, s.width if s.width == t.width else None)
            diagnostics[i] = match.diagnostics(reference=partners[j])
        progress(stage.stop, weights.depth, options.criterion)
    if activations is not None:
        diagnostics |= store_attention(activations, diagnostics, weights.depth, out)
    heads = [layer.heads for layer in diagnostics.values() if layer.heads]
    neurons = [layer.neurons for layer in diagnostics.values() if layer.neurons]
    out.notes |= {"heads": summary(heads), "neurons": summary(neurons)}
    return maps.add(new_maps, diagnostics)


def compare_weights(
    weights: Weights, pair: Pair, maps: Maps, student_layer: int, teacher_layer: int
) -> Similarities:
    """Return the similarities of two layers by their weights, in the teacher's basis."""
    rotation = stream_map(weights, pair, maps, student_layer)
    S = layer_rows(weights, student_layer, {RESIDUAL: rotation})
    T = layer_rows(pair.teacher.weights, teacher_layer, {})
    s = weights.adapter.heads(weights.config)
    t = pair.teacher.adapter.heads(pair.teacher.config)
    return weight_scores(S, T, s, t)


def assign_layers(
    matches: dict[tuple[int, int], LayerMatch], stage: range
) -> list[tuple[int, int]]:
    """Return pairs (student layer, position of the teacher layer), one to one inside a stage."""
    scores = torch.tensor([[matches[i, j].score for j in stage] for i in stage])
    sources = assign(scores).tolist()
    return [(stage.start + source, j) for j, source in zip(stage, sources, strict=True)]


def store_attention(
    activations: ActivationComparison,
    diagnostics: dict[int, LayerDiagnostics],
    depth: int,
    out: StepOutput,
) -> dict[int, LayerDiagnostics]:
    """Commit the attention maps of one text, and return the diagnostics that name their files.

    Maps are kept for the first, the middle and the last layer.
    """
    updated: dict[int, LayerDiagnostics] = {}
    for layer in sorted({0, depth // 2, depth - 1}):
        reference = diagnostics[layer].reference
        assert reference is not None
        both = {
            "student": activations.sample_maps[Side.STUDENT, layer],
            "teacher": activations.sample_maps[Side.TEACHER, reference],
        }
        path = out.tensors(RunLayout.attention_maps(layer), both)
        updated[layer] = replace(diagnostics[layer], attention=out.relative(path))
    return updated


def summary(layers: Sequence[AssignmentDiagnostics]) -> dict[str, Any]:
    """Return the notes on heads or neurons: how many layers change, and mean scores."""
    return {
        "layers that change": sum(not layer.identity for layer in layers),
        "of": len(layers),
        "score": sum(layer.score for layer in layers) / len(layers),
        "identity_score": sum(layer.identity_score for layer in layers) / len(layers),
        "random_score": sum(layer.random_score for layer in layers) / len(layers),
    }
