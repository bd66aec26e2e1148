"""What a refit aims at: the teacher's rows in the student's basis, how much each row counts, and the KL that judges the whole."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from rotdistill_judge import Scores, by_text, judged
from rotdistill_predictions import compare, shared_tokens
from torch import Tensor

from rotdistill_core.bank import massive
from rotdistill_core.errors import RecipeError
from rotdistill_core.walk import Walk

if TYPE_CHECKING:
    from rotdistill_core.api import Bank, Layout, Maps, Pair, Samples, Weights

JUDGED_ROWS = 1024
SINK_RMS = 10.0
"""Longest target of a sink row, in medians of the rows' RMS. Readers see its direction only; at full length (over 100 medians) the
regression, which must make it out of activations like any other's, would leak it into every row."""


def shortened(goal: Tensor) -> Tensor:
    """Return targets `[rows, d]` with sinks cut to `SINK_RMS` medians."""
    rms = goal.double().pow(2).mean(-1).sqrt()
    return goal * (SINK_RMS * rms.median() / rms.clamp_min(1e-30)).clamp_max(1.0).to(goal)[:, None]


def counts(goal: Tensor, layout: Layout, prompt: float, sinks: float, answers: float, own: Set[str]) -> Tensor:
    """Return how often each row counts [rows]: those of the shared prompt, of sinks, and of the answers in the texts `own` more."""
    factor = torch.ones(len(goal), dtype=torch.float64)
    factor[: layout.prefix] = prompt
    for text, start, end in zip(layout.texts, layout.starts, layout.starts[1:], strict=False):
        if text.id in own:
            factor[max(start, start + text.answer - 1 - layout.prefix) : end] = answers
    factor[massive(goal).index_fill(0, torch.zeros(1, dtype=torch.long), True)] = sinks
    return factor


def goal_at(weights: Weights, maps: Maps, bank: Bank, pair: Pair, layout: Layout, boundary: int) -> Tensor:
    """Return the teacher's states at the matched depth, in the student's basis `[rows, d_s]`.

    A student cut from the teacher shares its basis. Else the aligner's map of this boundary carries the teacher's rows back, and
    each is scaled to the length of the student's own row: readers see directions only, and sinks stay what they are.

    Raises RecipeError for models of different bases when no aligner stands before this step.
    """
    lineage = weights.lineage
    depth = lineage.depths[boundary]
    T = bank.teacher(layout, depth).double()
    if not pair.same:
        captured = bank.depths.index(depth)
        rotation = maps.rotation(captured)
        if rotation is None or pair.anchor:
            raise RecipeError(
                "writer-refit: teacher and student have different bases; put an aligner (procrustes) before this step, and no [anchor]."
            )
        T = T @ rotation.matrix.T.double() / rotation.scale
        own, side = torch.full((len(T),), torch.nan, dtype=torch.float64), bank.layouts["student"]
        both = replace(side, texts=tuple(text for text in side.texts if text in layout.texts))
        own[both.rows_in(layout)] = bank.rows("student", captured).double().norm(dim=-1)[both.rows_in(side)]
        T = torch.where(own.isnan()[:, None], T, T * (own / T.norm(dim=-1).clamp_min(1e-12))[:, None])
    if lineage.basis is not None:
        T = T @ lineage.basis.to(T)
    return T.float() if weights.dtype != torch.float64 else T


def follows(weights: Weights, maps: Maps, bank: Bank, pair: Pair, samples: Samples, boundary: int) -> bool:
    """Try on two texts whether the student's stream is still the teacher's up to a boundary, so that it need not be walked again."""
    walk = Walk(weights, samples.layout.select("validation", most=2), pair.student.device, pair.student.dtype)
    for i in walk:
        if i == boundary:
            break
        walk.run()
    goal = goal_at(weights, maps, bank, pair, walk.layout, boundary)
    return bool((walk.states - goal.to(walk.states)).norm() <= 1e-3 * goal.norm())


def kl_on(split: str, weights: Weights, walk: Walk | None, bank: Bank, pair: Pair, samples: Samples) -> Scores:
    """Return the KL on what the texts of a split answer; `walk` has been through them already, or is made here."""
    if walk is None:
        walk = Walk(weights, samples.layout.select(split), pair.student.device, pair.student.dtype)
        for _ in walk:
            walk.run()
    rows, targets, text = judged(walk.layout, samples, split, JUDGED_ROWS)
    T, S = bank.teacher(walk.layout, pair.student.depth)[rows], walk.states[rows]
    return by_text(compare(pair.teacher.weights, T, weights, S, targets, shared_tokens(pair)).kl, text)
