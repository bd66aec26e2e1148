"""How much each row counts in a regression on the residual stream.

Every row that a refit leaves out still goes through the edited layer, so attention sinks and the
shared prompt stay in the fit. They are few and every token attends to them: they count more.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.row_rms import massive_rows, mean_square

SINK_RMS = 10.0
"""Largest RMS of a target, in medians of all rows.

Readers see a row's direction only. A sink at full length (over 100 medians) would leak into every
row, because the regression makes it out of the same activations as all other rows.
"""


def clip_sinks(targets: Tensor) -> Tensor:
    """Return targets `[rows, d]`, with longer ones shortened to `SINK_RMS` medians.

    They stay on their device.
    """
    return shortened(targets, sink_factors(mean_square(targets)))


def sink_factors(squares: Tensor) -> Tensor:
    """Return by what each row is multiplied to be no sink [rows], at most 1.

    Args:
        squares: the mean square of each row [rows].
    """
    rms = squares.sqrt()
    return (SINK_RMS * rms.median() / rms.clamp_min(1e-30)).clamp_max(1.0)


def shortened(targets: Tensor, factors: Tensor) -> Tensor:
    """Return targets `[rows, d]`, each multiplied by its factor [rows], on their device."""
    return targets * factors.to(targets)[:, None]


def row_weights(
    squares: Tensor,
    layout: PackedTexts,
    *,
    prompt: float,
    sink: float,
    own_sink: float,
    teacher_answer: float = 1.0,
    teacher_answered: Set[str] = frozenset(),
) -> Tensor:
    """Return the weight of each row [rows], on the host; a row of none of these kinds has weight 1.

    Sinks are position 0 and massive activations. Their weight is above that of all other kinds.

    Args:
        squares: the mean square of each row [rows], by which sinks are recognised.
        layout: the texts of the rows.
        prompt: weight of a row of the shared prefix.
        sink: weight of a sink in the shared prefix, which every text reads that begins with it.
        own_sink: weight of any other sink, which only its own text reads.
        teacher_answer: weight of a row that predicts an answer written by the teacher.
        teacher_answered: ids of the texts with such an answer.
    """
    weights = torch.ones(len(squares), dtype=torch.float64)
    weights[: layout.prefix] = prompt
    for text, start, end in zip(layout.texts, layout.starts, layout.starts[1:], strict=False):
        if text.id in teacher_answered:
            first = max(start, start + text.answer - 1 - layout.prefix_length(text))
            weights[first:end] = teacher_answer
    sinks = massive_rows(squares).index_fill(0, torch.zeros(1, dtype=torch.long), True)
    shared = torch.arange(len(squares)) < layout.prefix
    weights[sinks & shared] = sink
    weights[sinks & ~shared] = own_sink
    return weights


def sharing_texts(layout: PackedTexts) -> int:
    """Return how many texts to fit on begin with the shared prefix."""
    return sum(text.split == Split.FIT and not text.plain for text in layout.texts)


def over_mean_square(weights: Tensor, squares: Tensor) -> Tensor:
    """Return row weights [rows] divided by the mean square of each row [rows].

    A reader normalises its input, so an error counts relative to the length of its row.
    """
    return weights / squares.clamp_min(1e-12)
