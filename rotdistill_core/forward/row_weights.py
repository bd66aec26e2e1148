"""TODO: rotdistill_core.forward.row_weights."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.forward.activations import massive_activation_mask

if TYPE_CHECKING:
    from rotdistill_core.data.packed import PackedTexts

SINK_RMS = 10.0
"""Longest target of a sink row, in medians of the rows' RMS. Readers see its direction only; at full length (over 100 medians) the
regression, which must make it out of activations like any other's, would leak it into every row."""


def clip_sinks(goal: Tensor) -> Tensor:
    """Return targets `[rows, d]` with sinks cut to `SINK_RMS` medians."""
    rms = goal.double().pow(2).mean(-1).sqrt()
    return goal * (SINK_RMS * rms.median() / rms.clamp_min(1e-30)).clamp_max(1.0).to(goal)[:, None]


def row_weights(
    goal: Tensor, layout: PackedTexts, prompt: float, sinks: float, answers: float, own: Set[str]
) -> Tensor:
    """Return how often each row counts [rows]: those of the shared prompt, of sinks, and of the answers in the texts `own` more."""
    factor = torch.ones(len(goal), dtype=torch.float64)
    factor[: layout.prefix] = prompt
    for text, start, end in zip(layout.texts, layout.starts, layout.starts[1:], strict=False):
        if text.id in own:
            factor[max(start, start + text.answer - 1 - layout.prefix) : end] = answers
    factor[massive_activation_mask(goal).index_fill(0, torch.zeros(1, dtype=torch.long), True)] = (
        sinks
    )
    return factor
