"""The student's final states: captured ones, while it is still the student that was captured, and walked ones else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.walk import Walk

if TYPE_CHECKING:
    from rotdistill_core.api import Bank, Layout, Model, Progress, Weights

TRIED, CLOSE = 2, 1e-3
"""Validation texts that are walked to see whether captured rows are the student's still, and how near each row must be, of its length."""


def final_states(weights: Weights, bank: Bank, model: Model, layout: Layout, progress: Progress) -> Tensor:
    """Return the stream behind the last layer `[rows, d]`, in front of the final norm; texts that were not captured are walked."""
    side = bank.layouts["student"]
    known = {text.id for text in side.texts}
    there, others = (replace(layout, texts=tuple(t for t in layout.texts if (t.id in known) is k)) for k in (True, False))
    few = there.select("validation", most=TRIED)
    rows = bank.rows("student", len(bank.depths) - 1)
    if few.texts and bank.depths == weights.lineage.depths and (rows.shape[1], rows.dtype) == (weights.width, model.dtype):
        tried, kept = _walked(weights, model, few, lambda *_: None), rows[few.rows_in(side)]
        if bool(((tried - kept).norm(dim=1) <= CLOSE * kept.norm(dim=1)).all()):
            states = torch.empty(layout.rows, weights.width, dtype=model.dtype)
            states[there.rows_in(layout)] = rows[there.rows_in(side)]
            if others.texts:
                others = others.select(*{text.split for text in others.texts})  # without the prefix where none of them has it
                states[others.rows_in(layout)] = _walked(weights, model, others, progress)
            return states
    return _walked(weights, model, layout, progress)


def _walked(weights: Weights, model: Model, layout: Layout, progress: Progress) -> Tensor:
    walk = Walk(weights, layout, model.device, model.dtype)
    for i in walk:
        walk.run()
        progress(i + 1, weights.depth + 1, f"{layout.rows} rows")
    return walk.states.cpu()
