"""The student's states after the last layer: captured ones where they still hold, else computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.data.splits import Side, Split
from rotdistill_core.forward.layerwise import LayerwiseForward

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress


PROBE_TEXTS = 2
"""Validation texts that are computed anew, to see whether captured rows are still the student's."""
PROBE_TOLERANCE = 1e-3
"""Largest distance of a computed row from the captured one, relative to the captured row's norm."""


def final_states(
    weights: Weights,
    activations: ActivationStore,
    model: Model,
    layout: PackedTexts,
    progress: Progress,
) -> Tensor:
    """Return the stream after the last layer and before the final norm, `[rows, d]`.

    Captured rows are used if the student is still the one that was captured. Texts without
    captured rows are computed; if the student was edited since, all are.
    """
    captured_layout = activations.layouts[Side.STUDENT]
    captured_ids = {text.id for text in captured_layout.texts}
    captured = replace(layout, texts=tuple(t for t in layout.texts if t.id in captured_ids))
    missing = layout.where(lambda text: text.id not in captured_ids)
    rows = activations.rows(Side.STUDENT, len(activations.depths) - 1)
    same_shape = (rows.shape[1], rows.dtype) == (weights.width, model.dtype)
    probe = captured.select(Split.VALIDATION, limit=PROBE_TEXTS)
    if (
        not probe.texts
        or activations.depths != weights.lineage.depths
        or not same_shape
        or not _agree(_computed(weights, model, probe), rows[probe.row_indices_in(captured_layout)])
    ):
        return _computed(weights, model, layout, progress)
    states = torch.empty(layout.rows, weights.width, dtype=model.dtype)
    states[captured.row_indices_in(layout)] = rows[captured.row_indices_in(captured_layout)]
    if missing.texts:
        computed = _computed(weights, model, missing, progress)
        states[missing.row_indices_in(layout)] = computed
    return states


def _agree(computed: Tensor, captured: Tensor) -> bool:
    """Return whether every computed row `[n, d]` is near its captured one."""
    distance = (computed - captured).norm(dim=1)
    return bool((distance <= PROBE_TOLERANCE * captured.norm(dim=1)).all())


def _computed(
    weights: Weights, model: Model, layout: PackedTexts, progress: Progress | None = None
) -> Tensor:
    """Send the rows of a layout through all layers; return their states `[rows, d]`."""
    forward = LayerwiseForward(weights, layout, model.device, model.dtype)
    for layer in forward:
        forward.run()
        if progress:
            progress(layer + 1, weights.depth + 1, f"{layout.rows} rows")
    return forward.states.cpu()
