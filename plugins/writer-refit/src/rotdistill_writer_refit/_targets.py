"""What a refit aims at: the teacher's rows in the student's basis, how much each row counts, and the KL that judges the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import TextScores, scored_rows, scores_by_text
from rotdistill_core.evaluation.divergence import compare_logits, shared_vocabulary
from rotdistill_core.forward.layerwise import LayerwiseForward

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.linalg.maps import Maps


JUDGED_ROWS = 1024


def target_states(
    weights: Weights,
    maps: Maps,
    activations: ActivationStore,
    pair: Pair,
    layout: PackedTexts,
    boundary: int,
) -> Tensor:
    """Return the teacher's states at the matched depth, in the student's basis `[rows, d_s]`.

    A student cut from the teacher shares its basis. Else the aligner's map of this boundary carries the teacher's rows back, and
    each is scaled to the length of the student's own row: readers see directions only, and sinks stay what they are.

    Raises RecipeError for models of different bases when no aligner stands before this step.
    """
    lineage = weights.lineage
    depth = lineage.depths[boundary]
    T = activations.teacher(layout, depth).double()
    if not pair.same:
        captured = activations.depths.index(depth)
        rotation = maps.rotation(captured)
        if rotation is None or pair.anchor:
            raise RecipeError(
                "writer-refit: teacher and student have different bases; put an aligner (procrustes) before this step, and no [anchor]."
            )
        T = T @ rotation.matrix.T.double() / rotation.scale
        own, side = (
            torch.full((len(T),), torch.nan, dtype=torch.float64),
            activations.layouts["student"],
        )
        both = replace(side, texts=tuple(text for text in side.texts if text in layout.texts))
        own[both.row_indices_in(layout)] = (
            activations.rows("student", captured).double().norm(dim=-1)[both.row_indices_in(side)]
        )
        T = torch.where(
            own.isnan()[:, None], T, T * (own / T.norm(dim=-1).clamp_min(1e-12))[:, None]
        )
    if lineage.basis is not None:
        T = T @ lineage.basis.to(T)
    return T.float() if weights.dtype != torch.float64 else T


def matches_teacher_until(
    weights: Weights,
    maps: Maps,
    activations: ActivationStore,
    pair: Pair,
    samples: Samples,
    boundary: int,
) -> bool:
    """Try on two texts whether the student's stream is still the teacher's up to a boundary, so that it need not be walked again."""
    walk = LayerwiseForward(
        weights,
        samples.layout.select("validation", most=2),
        pair.student.device,
        pair.student.dtype,
    )
    for i in walk:
        if i == boundary:
            break
        walk.run()
    goal = target_states(weights, maps, activations, pair, walk.layout, boundary)
    return bool((walk.states - goal.to(walk.states)).norm() <= 1e-3 * goal.norm())


def kl_on(
    split: str,
    weights: Weights,
    walk: LayerwiseForward | None,
    activations: ActivationStore,
    pair: Pair,
    samples: Samples,
) -> TextScores:
    """Return the KL on what the texts of a split answer; `walk` has been through them already, or is made here."""
    if walk is None:
        walk = LayerwiseForward(
            weights, samples.layout.select(split), pair.student.device, pair.student.dtype
        )
        for _ in walk:
            walk.run()
    rows, targets, text = scored_rows(walk.layout, samples, split, JUDGED_ROWS)
    T, S = activations.teacher(walk.layout, pair.student.depth)[rows], walk.states[rows]
    return scores_by_text(
        compare_logits(pair.teacher.weights, T, weights, S, targets, shared_vocabulary(pair)).kl,
        text,
    )
