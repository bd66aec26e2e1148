"""A narrower residual stream: its principal directions stay, and readers are refitted.

The stream is cut in its principal basis, one basis for all layers (Ashkboos et al., SliceGPT,
arXiv:2401.15024). Its readers are refitted to predict from k channels what they read in all D. The
mean square over k channels is up to D/k of the mean square over all, so norm gains become
`sqrt(D/k)` and eps becomes `eps D/k`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rotdistill_chop._blocks import RIDGE, select_coordinates
from rotdistill_chop._rows import token_weights
from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.forward.layerwise import LayerwiseForward, Progress
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.linalg.moments import Moments
from rotdistill_core.linalg.precision import float64_device
from rotdistill_core.linalg.solvers import eigh, ridge


def narrow_stream(
    weights: Weights,
    forward_of: Callable[[Weights], LayerwiseForward],
    width: int,
    progress: Progress,
) -> Weights:
    """Return a view with a stream of `width` principal directions, readers refitted, head untied.

    The new stream is the old one times a basis `[D, width]`, which the lineage keeps.

    Args:
        weights: the student.
        forward_of: starts a forward pass of a model over the rows that are fitted.
        width: k, the width of the new stream.
        progress: called after each layer of two passes.

    Raises:
        RecipeError: norms after attention or MLP, so the stream cannot be rotated.
    """
    adapter, D = weights.adapter, weights.width
    # An identity raises before the work where no rotation is possible.
    weights.fold({"residual": Rotation(torch.eye(D, dtype=torch.float64))})
    Q = principal_directions(weights, forward_of(weights), progress)
    rotated = weights.fold({"residual": Rotation(Q)})
    edited = select_coordinates(rotated, {"residual": torch.arange(width)})
    edited |= refit_readers(rotated, forward_of(weights), Q, width, progress)
    gain = torch.full((width,), math.sqrt(D / width) - adapter.gain_offset)
    for name in adapter.gains(weights.config)[0]:
        edited[name] = gain.clone()

    eps = float(weights.config[adapter.eps_key])
    # Norms of other spaces (heads, in Qwen3) share eps and keep it.
    eps_is_shared = any(
        param.is_gain and "residual" not in param.axes for param in adapter.params.values()
    )
    config = {
        adapter.width_key: width,
        adapter.eps_key: eps if eps_is_shared else eps * (D / width),
        "head_dim": adapter.heads(weights.config).width,
    }
    narrow = rotated.edit(edited, **config)
    old_basis = weights.lineage.basis
    basis = Q[:, :width] if old_basis is None else old_basis @ Q[:, :width]
    return replace(narrow, lineage=replace(narrow.lineage, basis=basis))


def principal_directions(weights: Weights, forward: LayerwiseForward, progress: Progress) -> Tensor:
    """Return the orthogonal basis `[D, D]` of the readers' inputs, largest variance first."""
    D = weights.width
    eps = float(weights.config[weights.adapter.eps_key])
    place = float64_device(forward.device)
    total = torch.zeros(D, D, dtype=torch.float64, device=place)
    for point in norm_inputs(forward):
        X = point.states.to(place, torch.float64)
        Z = normalise(X, D, eps) * point.weights.to(place)[:, None].sqrt()
        total += Z.T @ Z
        progress(point.layers, 2 * weights.depth, "principal directions")
    directions = eigh(total.cpu(), "chop: principal directions", forward.device)[1]
    # Eigenvalues rise.
    return directions.flip(1)


def refit_readers(
    rotated: Weights, forward: LayerwiseForward, Q: Tensor, width: int, progress: Progress
) -> dict[str, LazyTensor]:
    """Return readers `[out, k]` of the first k principal directions, in float64.

    After a norm, let `Y [n, D]` be the rows in the principal basis and `Z [n, k]` the rows of the
    narrow stream, both normalised. Ridge regression finds `M [k, D]` with `Y ≈ Z M`, and a reader
    `W` of Y becomes `W Mᵀ`. It regresses `Y - (Z, 0)`, so λ shrinks M towards plain truncation.

    Args:
        rotated: the student in its principal basis.
        forward: a forward pass of the student in its old basis, at boundary 0.
        Q: the principal basis `[D, D]`.
        width: k.
        progress: called after each layer.
    """
    adapter, depth, D = rotated.adapter, rotated.depth, rotated.width
    eps = float(rotated.config[adapter.eps_key])
    table = adapter.expand(rotated.config)
    place = float64_device(forward.device)
    readers: dict[str, LazyTensor] = {}
    for point in norm_inputs(forward):
        Y = point.states.to(place, torch.float64) @ Q.to(place)
        Z = normalise(Y[:, :width], D, eps)
        truncated = torch.nn.functional.pad(Z, (0, D - width))
        moments = Moments(width, D)
        moments.add(Z, normalise(Y, D, eps) - truncated, point.weights)
        where = f"chop: readers of {point.gain}"
        correction = ridge(moments.xx, moments.xy, RIDGE, where, forward.device)
        M = torch.eye(width, D, dtype=torch.float64) + correction
        for name, param in table.items():
            if param.gain == point.gain and len(param.axes) == 2:
                shape = (rotated.entries[name].shape[0], width)
                readers[name] = LazyTensor(
                    shape, torch.float64, partial(_refitted_reader, rotated, name, M)
                )
        progress(depth + point.layers, 2 * depth, "readers")
    return readers


def _refitted_reader(rotated: Weights, name: str, M: Tensor) -> Tensor:
    return rotated[name] @ M.T


def normalise(X: Tensor, size: int, eps: float) -> Tensor:
    """Return rows `[n, k]` after a norm whose mean square is over `size` coordinates.

    That is a norm of gain 1 for `k = size`, of gain `sqrt(size / k)` for k of `size` coordinates.
    """
    return X * torch.rsqrt(X.pow(2).sum(-1, keepdim=True) / size + eps)


class NormInput(NamedTuple):
    """What a norm of the residual stream reads."""

    gain: str
    """Name of the norm's gain."""
    states: Tensor
    """The stream before the norm `[rows, D]`."""
    weights: Tensor
    """How much each row counts [rows]."""
    layers: int
    """Number of layers that all rows have passed."""


def norm_inputs(forward: LayerwiseForward) -> Iterator[NormInput]:
    """Yield the inputs of all norms that readers follow, in the order of the model."""
    adapter, config = forward.weights.adapter, forward.weights.config
    gains = adapter.gains(config)[0]
    for i in forward:
        layer = f"{adapter.layers}.{i}."
        mid_gain = f"{layer}{adapter.sites['mid'].module}.weight"
        first_gain = next(name for name in gains if name.startswith(layer) and name != mid_gain)
        weights = token_weights(forward.states, forward.layout)
        yield NormInput(first_gain, forward.states, weights, i)

        mid = torch.empty_like(forward.states)
        forward.run({"mid": partial(_scatter, mid)})
        yield NormInput(mid_gain, mid, weights, i + 1)
    weights = token_weights(forward.states, forward.layout)
    yield NormInput(adapter.norm, forward.states, weights, forward.weights.depth)


def _scatter(states: Tensor, rows: Tensor, X: Tensor) -> None:
    states[rows.to(states.device)] = X.to(states)
