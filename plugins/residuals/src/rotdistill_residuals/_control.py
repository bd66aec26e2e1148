"""Controls: a bank whose teacher says nothing about the texts that steps are fitted on, to be held beside the real one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotdistill_core.forward.activations import ActivationStore
    from rotdistill_core.store.output import StepOutput


def controlled(
    kind: str, activations: ActivationStore, out: StepOutput, about: dict[str, Any]
) -> ActivationStore:
    """Return the bank with other teacher rows for fit and validation texts; held-out and guard texts keep theirs.

    `shuffled`: the same rows in another order, one order for all boundaries, the shared prompt left where it is. `reversed`: the rows of
    the boundary that is as far from the other end. `self`: the rows of the student as it was captured, at every boundary that it has.
    """
    import torch

    from rotdistill_core.forward.activations import write_shard

    full, mine = activations.layouts["teacher"], activations.layouts["student"]
    fitted = full.split("fit", "validation").nonzero().flatten()
    fitted = fitted[fitted >= full.prefix]
    order = fitted[torch.randperm(len(fitted), generator=torch.Generator().manual_seed(0))]
    shards = []
    for boundary, shard in enumerate(activations.shards["teacher"]):
        T = activations.rows("teacher", boundary)
        if kind == "shuffled":
            T = T.index_copy(0, fitted, T[order])
        elif kind == "reversed":
            T = T.index_copy(
                0,
                fitted,
                activations.rows("teacher", len(activations.shards["teacher"]) - 1 - boundary)[
                    fitted
                ],
            )
        elif boundary in activations.depths:
            T = T.index_copy(
                0,
                mine.row_indices_in(full),
                activations.rows("student", activations.depths.index(boundary)).to(T),
            )
        else:  # a boundary that the student does not have
            shards.append(shard)
            continue
        shards.append(write_shard(out, kind, boundary, T, T.dtype, {**about, "side": kind}))
    return replace(activations, shards={**activations.shards, "teacher": tuple(shards)})
