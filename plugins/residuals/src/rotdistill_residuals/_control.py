"""Negative controls: activations whose teacher rows carry no information on the fitted texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rotdistill_core.data.splits import Side, Split
from rotdistill_core.forward.activations import ActivationStore, write_shard
from rotdistill_core.store.output import StepOutput

Control = Literal["shuffled", "reversed", "self"]


def replace_teacher_rows(
    control: Control, activations: ActivationStore, out: StepOutput, model: str
) -> ActivationStore:
    """Return the activations with other teacher rows for fit and validation texts.

    Held-out texts, texts outside the domain and the shared prompt keep their rows.

    Args:
        control: `shuffled`: the same rows in another order, one order for all boundaries.
            `reversed`: the rows of the boundary that is as far from the other end.
            `self`: the rows of the student as captured, at each boundary that it still has.
        activations: the capture.
        out: takes the new shards.
        model: the teacher's reference, for the sidecars.
    """
    layout = activations.layouts[Side.TEACHER]
    fitted = _fitted_rows(layout.split(Split.FIT, Split.VALIDATION), layout.prefix)
    sidecar = {"model": model, "side": control}
    shards = []
    for boundary, shard in enumerate(activations.shards[Side.TEACHER]):
        if control == "self" and boundary not in activations.depths:
            shards.append(shard)
            continue
        T = activations.rows(Side.TEACHER, boundary)
        if control == "shuffled":
            T = T.index_copy(0, fitted, T[_shuffled(fitted)])
        elif control == "reversed":
            last = len(activations.shards[Side.TEACHER]) - 1
            T = T.index_copy(0, fitted, activations.rows(Side.TEACHER, last - boundary)[fitted])
        else:
            S = activations.rows(Side.STUDENT, activations.depths.index(boundary))
            own, paired = activations.paired_rows(activations.layouts[Side.STUDENT])
            T = T.index_copy(0, paired, S[own].to(T))
        shards.append(write_shard(out, control, boundary, T, T.dtype, sidecar))
    controlled = {**activations.shards, Side.TEACHER: tuple(shards)}
    return replace(activations, shards=controlled, replaced=True)


def _fitted_rows(mask: Tensor, prefix: int) -> Tensor:
    """Return the indices of the masked rows, without those of the shared prompt `[n]`."""
    rows = mask.nonzero().flatten()
    return rows[rows >= prefix]


def _shuffled(rows: Tensor) -> Tensor:
    """Return rows in a random order that is the same on each call."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
