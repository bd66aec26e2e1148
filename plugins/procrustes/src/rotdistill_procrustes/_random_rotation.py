"""Random rotations, uniform over all of their shape: the orthogonal factor of Gaussian noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rotdistill_core.architecture.spaces import residual
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Map, Maps, Rotation

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_procrustes.random_rotation import RandomRotation


def solve(options: RandomRotation, weights: Weights, maps: Maps, pair: Pair) -> Maps:
    """Add a random rotation for each layer boundary.

    Raises:
        RecipeError: the student is wider than the teacher.
    """
    d_s, d_t = weights.width, pair.teacher.width
    if d_s > d_t:
        raise RecipeError(
            f"random-rotation: the student is wider ({d_s}) than the teacher ({d_t}). "
            "Take a teacher that is as wide or wider."
        )
    generator = torch.Generator().manual_seed(options.seed)
    rotation = random_rotation(d_s, d_t, generator)
    rotations: dict[str, Map] = {residual(0): rotation}
    for boundary in range(1, weights.depth + 1):
        if options.tie == 1:
            rotation = random_rotation(d_s, d_t, generator)
        rotations[residual(boundary)] = rotation
    return maps.add(rotations, {})


def random_rotation(d_s: int, d_t: int, generator: torch.Generator) -> Rotation:
    """Return a random `R [d_s, d_t]` with `R Rᵀ = I`."""
    noise = torch.randn(d_t, d_s, dtype=torch.float64, generator=generator)
    return Rotation(torch.linalg.qr(noise).Q.T.contiguous())
