"""The student's final states: captured ones, while it is still the student that was captured, and walked ones else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.forward.layerwise import LayerwiseForward

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress


TRIED, CLOSE = 2, 1e-3
"""Validation texts that are walked to see whether captured rows are the student's still, and how near each row must be, of its length."""


def final_states(
    weights: Weights,
    activations: ActivationStore,
    model: Model,
    layout: PackedTexts,
    progress: Progress,
) -> Tensor:
    """Return the stream behind the last layer `[rows, d]`, in front of the final norm; texts that were not captured are walked."""
    side = activations.layouts["student"]
    known = {text.id for text in side.texts}
    there, others = (
        replace(layout, texts=tuple(t for t in layout.texts if (t.id in known) is k))
        for k in (True, False)
    )
    few = there.select("validation", most=TRIED)
    rows = activations.rows("student", len(activations.depths) - 1)
    if (
        few.texts
        and activations.depths == weights.lineage.depths
        and (rows.shape[1], rows.dtype) == (weights.width, model.dtype)
    ):
        tried, kept = _walked(weights, model, few, lambda *_: None), rows[few.row_indices_in(side)]
        if bool(((tried - kept).norm(dim=1) <= CLOSE * kept.norm(dim=1)).all()):
            states = torch.empty(layout.rows, weights.width, dtype=model.dtype)
            states[there.row_indices_in(layout)] = rows[there.row_indices_in(side)]
            if others.texts:
                others = others.select(
                    *{text.split for text in others.texts}
                )  # without the prefix where none of them has it
                states[others.row_indices_in(layout)] = _walked(weights, model, others, progress)
            return states
    return _walked(weights, model, layout, progress)


def _walked(weights: Weights, model: Model, layout: PackedTexts, progress: Progress) -> Tensor:
    walk = LayerwiseForward(weights, layout, model.device, model.dtype)
    for i in walk:
        walk.run()
        progress(i + 1, weights.depth + 1, f"{layout.rows} rows")
    return walk.states.cpu()
