"""The teacher's final states on the training texts: captured ones if there are, else computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Side
from rotdistill_core.evaluation.acceptance import teacher_final_states
from rotdistill_core.forward.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput


def states_of_teacher(
    pair: Pair,
    layout: PackedTexts,
    activations: ActivationStore | None,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return the teacher's states after its last layer, before the final norm, `[rows, d_t]`.

    Args:
        pair: teacher and student of one tokenizer.
        layout: the training texts.
        activations: what was captured; its rows are used if they are the teacher's own, in the
            dtype in which it computes. A negative control replaces them, and a capture may round.
        out: takes what has to be computed.
        progress: called once for each layer.
        ranks: the processes that share the texts.
    """
    if activations is None or not _usable(activations, pair):
        return teacher_final_states(pair.teacher, layout, out, progress, ranks).clone()
    captured_layout = activations.layouts[Side.TEACHER]
    captured_ids = {text.id for text in captured_layout.texts}
    captured = layout.where(lambda text: text.id in captured_ids)
    missing = layout.where(lambda text: text.id not in captured_ids)
    rows = activations.rows(Side.TEACHER, pair.teacher.depth)
    if not missing.texts:
        return rows[captured.row_indices_in(captured_layout)]
    computed = teacher_final_states(pair.teacher, missing, out, progress, ranks)
    states = torch.empty(layout.rows, rows.shape[1], dtype=rows.dtype)
    states[missing.row_indices_in(layout)] = computed
    if captured.texts:
        found = rows[captured.row_indices_in(captured_layout)]
        states[captured.row_indices_in(layout)] = found
    return states


def _usable(activations: ActivationStore, pair: Pair) -> bool:
    """Whether captured rows are what the teacher would compute."""
    last = activations.sidecar(Side.TEACHER, pair.teacher.depth)
    own = (Side.TEACHER.value, str(pair.teacher.dtype).removeprefix("torch."))
    return (last.get("side"), last.get("dtype")) == own
