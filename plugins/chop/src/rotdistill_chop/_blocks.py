"""Fewer neurons and key/value heads per layer; the writer that is left makes up for what goes.

A writer `D [d, n]` reads activations with moments `C = AᵀwA + λI [n, n]`. A block b of its columns
is cut, all other columns s are refitted. That costs `tr(D_b [(C⁻¹)_bb]⁻¹ D_bᵀ)`, and the columns
that stay become

    D_s - D_b [(C⁻¹)_bb]⁻¹ (C⁻¹)_bs = D_s + D_b C_bs (C_ss)⁻¹

which is the ridge regression towards the output of the whole writer. (Hassibi and Stork, Second
order derivatives for network pruning: Optimal Brain Surgeon, NIPS 1992.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_chop._rows import regression_weights
from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.forward.layerwise import LayerwiseForward, Observer, Progress
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.solvers import require_finite
from rotdistill_core.store.casts import cast_that_fits

RIDGE = 1e-3
"""λ of refits in the same pass as a cut, as a multiple of the mean diagonal of the moments."""
ROUNDS = 16
"""In how many rounds blocks go: costs are computed anew after each."""


class PrunedWriter(NamedTuple):
    """What is left of a writer."""

    blocks: Tensor
    """Indices of the blocks that stay, rising [keep]."""
    writer: Tensor
    """Their columns, refitted `[d, keep * size]`."""


def prune_blocks(C: Tensor, D: Tensor, size: int, keep: int, where: str) -> PrunedWriter:
    """Cut the blocks of columns that cost least once the others are refitted.

    Args:
        C: moments of the writer's inputs `[n, n]`, float64.
        D: the writer `[d, n]`, float64.
        size: columns of a block.
        keep: number of blocks to keep.
        where: names the writer in errors.

    Raises:
        RotdistillError: C holds NaN or Inf.
    """
    require_finite(C, where)
    left = torch.arange(len(C) // size)
    per_round = -(-(len(left) - keep) // ROUNDS)
    diagonal = C.diagonal().mean().clamp_min(1e-30)
    inverse = torch.cholesky_inverse(
        torch.linalg.cholesky(C + RIDGE * diagonal * torch.eye(len(C), dtype=C.dtype))
    )
    while len(left) > keep:
        # (C⁻¹)_bb [blocks, size, size] and D_b [blocks, d, size] of every block.
        grid = inverse.reshape(len(left), size, len(left), size)
        inverse_bb = grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        D_b = D.reshape(len(D), len(left), size).permute(1, 0, 2)
        cost = (D_b @ torch.linalg.inv(inverse_bb) * D_b).sum((1, 2))

        # The cheapest blocks go.
        goes = torch.zeros(len(left), dtype=torch.bool)
        number = min(per_round, len(left) - keep)
        goes[cost.topk(number, largest=False).indices] = True
        b = block_columns(goes.nonzero().flatten(), size)
        s = block_columns((~goes).nonzero().flatten(), size)

        # Refit the columns that stay, and update their inverse by its Schur complement.
        X = torch.linalg.solve(inverse[b][:, b], inverse[b][:, s])
        D = D[:, s] - D[:, b] @ X
        inverse = inverse[s][:, s] - inverse[s][:, b] @ X
        left = left[~goes]
    return PrunedWriter(left, D)


def block_columns(blocks: Tensor, size: int) -> Tensor:
    """Return the columns of some blocks of `size` columns."""
    return (blocks[:, None] * size + torch.arange(size)).flatten()


class SitePlan(NamedTuple):
    """How many blocks of a space stay."""

    space: str
    """The space that the writer reads."""
    size: int
    """Channels of a block."""
    keep: int
    """Number of blocks that stay."""


def prune_layers(
    weights: Weights, forward: LayerwiseForward, neurons: int, kv_heads: int, progress: Progress
) -> Weights:
    """Return a view with fewer neurons and key/value heads, the latter with their query heads.

    Each layer chooses its own, and the writers are refitted to what stays.

    Args:
        weights: the student.
        forward: a forward pass of it at boundary 0; its rows are those that are fitted.
        neurons: number of neurons of each MLP that stay.
        kv_heads: number of key/value heads of each attention that stay.
        progress: called after each layer.
    """
    adapter = weights.adapter
    heads = adapter.heads(weights.config)
    queries = heads.query // heads.groups
    sizes = adapter.sizes(weights.config)
    edited: dict[str, Tensor | LazyTensor] = {}
    for i in forward:
        plans = {
            "heads": SitePlan(f"q.{i}", queries * heads.width, kv_heads),
            "neurons": SitePlan(f"neurons.{i}", 1, neurons),
        }
        plans = {
            site: plan for site, plan in plans.items() if plan.size * plan.keep < sizes[plan.space]
        }
        widths = {site: sizes[plan.space] for site, plan in plans.items()}
        for site, C in input_moments(forward, widths).items():
            plan = plans[site]
            name = writer_of(weights, plan.space)
            D = weights[name].to("cpu").double()
            pruned = prune_blocks(C, D, plan.size, plan.keep, f"chop: {name}")
            kept = {plan.space: block_columns(pruned.blocks, plan.size)}
            if site == "heads":
                kept[f"kv.{i}"] = block_columns(pruned.blocks, heads.width)
            edited |= select_coordinates(weights, kept)
            edited[name] = cast_that_fits(pruned.writer, weights.dtype, name)
        progress(i + 1, weights.depth, f"{neurons} neurons, {kv_heads} key/value heads")
    config = {
        adapter.neurons_key: neurons,
        adapter.groups_key: kv_heads,
        adapter.query_key: queries * kv_heads,
    }
    return weights.edit(edited, **config, head_dim=heads.width)


def writer_of(weights: Weights, space: str) -> str:
    """Return the name of the parameter that carries a space into the residual stream."""
    for name, param in weights.adapter.expand(weights.config).items():
        if param.axes == ("residual", space):
            return name
    raise KeyError(space)


def input_moments(forward: LayerwiseForward, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Send all rows through the open layer; return the moments `[n, n]` of its writers' inputs.

    Args:
        forward: a forward pass with an open layer.
        widths: site -> size n of the activations there.
    """
    moments = {site: Moments(n, 1) for site, n in widths.items()}
    weights = regression_weights(forward)
    observers: dict[str, Observer] = {
        site: partial(_add_inputs, sums, weights) for site, sums in moments.items()
    }
    forward.run(observers)
    return {site: sums.xx for site, sums in moments.items()}


def _add_inputs(moments: Moments, weights: Tensor, rows: Tensor, A: Tensor) -> None:
    moments.add(A, A[:, :1], weights[rows])  # only the moments of A with itself are used


def select_coordinates(
    weights: Weights, kept: Mapping[str, Tensor]
) -> dict[str, Tensor | LazyTensor]:
    """Return the parameters that have one of these spaces, with only some coordinates of it.

    Args:
        weights: the model.
        kept: space -> indices of the coordinates that stay.
    """
    selected: dict[str, Tensor | LazyTensor] = {}
    for name, param in weights.adapter.expand(weights.config).items():
        if name not in weights.entries or not kept.keys() & set(param.axes):
            continue
        entry = weights.entries[name]
        shape = tuple(
            len(kept[space]) if space in kept else n
            for space, n in zip(param.axes, entry.shape, strict=True)
        )
        selected[name] = LazyTensor(shape, entry.dtype, partial(_select, entry, param.axes, kept))
    return selected


def _select(entry: LazyTensor, axes: tuple[str, ...], kept: Mapping[str, Tensor]) -> Tensor:
    tensor = entry.read()
    for axis, space in enumerate(axes):
        if space in kept:
            tensor = tensor.index_select(axis, kept[space])
    return tensor
