"""Planted truth: the same model in another basis, and the maps that lead there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import scipy.linalg
import torch
from torch import Tensor

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.linalg.maps import Gauge, Map, Permutation, Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing.compute import save_folder


def random_rotation(size: int, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix `[size, size]` in float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, dtype=torch.float64, generator=generator)
    Q: Tensor = torch.linalg.qr(noise)[0]
    return Q


def rotated_twin(model: Model, folder: Path, seed: int = 0) -> tuple[Model, Tensor]:
    """Write the model in a random basis of its stream.

    Returns:
        The opened twin, and the planted rotation `Q [d, d]`: its states are `X Q`.
    """
    Q = random_rotation(model.width, seed)
    save_folder(model.weights.fold({"residual": Rotation(Q)}), model.folder, folder)
    return open_model(ModelRef(model=str(folder))), Q


def scramble(
    weights: Weights, seed: int = 0, invertible: bool = False
) -> tuple[Weights, dict[str, Map]]:
    """Return the same model in a random basis of everything that its table leaves free.

    That is one rotation of the stream (where the table allows one), and in every layer a
    permutation of key/value groups and of query heads inside them, one of neurons, value/output
    gauges (orthogonal, or any `invertible` ones), query/key gauges and signed up/down scales.

    Returns:
        The view, and the maps that were planted.
    """
    planted: dict[str, Map] = {}
    for maps in whole_permutations(weights, seed).values():
        planted |= {space: found for space, found in maps.items() if space != "residual"}
    planted |= gauges(weights, seed, invertible)
    if not weights.adapter.gains(weights.config)[1]:
        planted["residual"] = Rotation(random_rotation(weights.width, seed))
    # A checkpoint like any other: its lineage does not say that its basis changed.
    return replace(weights.fold(planted), lineage=weights.lineage), planted


def whole_permutations(weights: Weights, seed: int = 3) -> dict[str, dict[str, Map]]:
    """Return permutations that change no logit, by what they move.

    They move channels of the stream, and in each layer the neurons, and the heads.
    """
    sizes = weights.adapter.sizes(weights.config)
    heads, groups, width = weights.adapter.heads(weights.config)
    shuffled = partial(torch.randperm, generator=torch.Generator().manual_seed(seed))
    channels = Permutation(shuffled(sizes["residual"]))
    moved: dict[str, dict[str, Map]] = {"channels of the stream": {"residual": channels}}
    for i in range(weights.depth):
        neurons = Permutation(shuffled(sizes[f"neurons.{i}"]))
        moved[f"neurons of layer {i}"] = {f"neurons.{i}": neurons}
        order = shuffled(groups)
        # A group's query heads follow it, in a new order among themselves.
        inside = torch.arange(heads).view(groups, -1)[order]
        inside = torch.stack([group[shuffled(len(group))] for group in inside]).flatten()
        moved[f"heads of layer {i}"] = {
            f"kv.{i}": Permutation(order).blocks(width),
            f"q.{i}": Permutation(inside).blocks(width),
        }
    return moved


def gauges(weights: Weights, seed: int = 0, invertible: bool = False) -> dict[str, Map]:
    """Return random gauges of every space that the table leaves free."""
    generator = torch.Generator().manual_seed(seed)
    adapter, config = weights.adapter, weights.config
    sizes = adapter.sizes(config)
    _, groups, width = adapter.heads(config)
    free = {param.gauge.removesuffix("*") for param in adapter.expand(config).values()}
    found: dict[str, Map] = {}
    for i in range(weights.depth):
        noise = torch.randn(groups, width, width, dtype=torch.float64, generator=generator)
        polar = torch.rand(2, groups, width // 2, dtype=torch.float64, generator=generator)
        scales = torch.randn(sizes[f"neurons.{i}"], dtype=torch.float64, generator=generator)
        value = 0.3 * noise / width**0.5 + torch.eye(width)
        if not invertible:
            value = torch.linalg.qr(noise)[0]
        factors = torch.polar(0.5 + polar[1], 2 * torch.pi * polar[0])
        blocks = {
            "value": value,
            "key": rotary_blocks(factors),
            "up": (scales.sign() * (0.5 + scales.abs()))[:, None, None],
        }
        for name, block in blocks.items():
            if f"{name}.{i}" in free:
                found[f"{name}.{i}"] = Gauge(block)
    return found


def rotary_blocks(factors: Tensor) -> Tensor:
    """Return the matrices that multiply rotary pairs by complex factors.

    Args:
        factors: complex `[n, k / 2]`; factor j belongs to the pair (j, j + k / 2).

    Returns:
        `[n, k, k]`.
    """
    a = torch.diag_embed(factors.real)
    b = torch.diag_embed(factors.imag)
    return torch.cat([torch.cat([a, b], -1), torch.cat([-b, a], -1)], -2)


@contextmanager
def other_signs(seed: int) -> Iterator[None]:
    """Let every decomposition return other signs, which are as right as those that it returned."""
    generator = torch.Generator().manual_seed(seed)
    svd = scipy.linalg.svd
    eigh = torch.linalg.eigh

    def signs(n: int) -> Tensor:
        return 1 - 2 * torch.randint(0, 2, (n,), generator=generator).double()

    def flipped_svd(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        U, S, Vt = svd(*args, **kwargs)
        flip = signs(len(S)).numpy()
        return U * flip, S, flip[:, None] * Vt

    def flipped_eigh(A: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(A)
        return values, vectors * signs(len(values))

    with (
        mock.patch.object(scipy.linalg, "svd", flipped_svd),
        mock.patch.object(torch.linalg, "eigh", flipped_eigh),
    ):
        yield
