"""The teacher's final states on the training texts: captured ones if there are, else computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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


class KnownStates(NamedTuple):
    """Final states of the teacher on some texts."""

    layout: PackedTexts
    rows: Tensor
    """A row for each row of the layout `[rows, d_t]`."""


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
    known = KnownStates(
        activations.layouts[Side.TEACHER], activations.rows(Side.TEACHER, pair.teacher.depth)
    )
    return states_beside(known, pair, layout, out, progress, ranks)


def states_beside(
    known: KnownStates,
    pair: Pair,
    layout: PackedTexts,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks,
) -> Tensor:
    """Return the teacher's final states `[rows, d_t]`: those of texts that are known, by their ids,
    and computed ones of the others. See `states_of_teacher`."""
    known_ids = {text.id for text in known.layout.texts}
    found = layout.where(lambda text: text.id in known_ids)
    missing = layout.where(lambda text: text.id not in known_ids)
    if not missing.texts:
        return known.rows[found.row_indices_in(known.layout)]
    computed = teacher_final_states(pair.teacher, missing, out, progress, ranks)
    states = torch.empty(layout.rows, known.rows.shape[1], dtype=known.rows.dtype)
    states[missing.row_indices_in(layout)] = computed
    if found.texts:
        states[found.row_indices_in(layout)] = known.rows[found.row_indices_in(known.layout)]
    return states


def _usable(activations: ActivationStore, pair: Pair) -> bool:
    """Whether captured rows are what the teacher would compute."""
    last = activations.sidecar(Side.TEACHER, pair.teacher.depth)
    own = (Side.TEACHER.value, str(pair.teacher.dtype).removeprefix("torch."))
    return (last.get("side"), last.get("dtype")) == own
