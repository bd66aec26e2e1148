"""Whether two checkpoints of one shape are in one basis, measured on their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.linalg.solvers import polar

COMPARED_ROWS = 32
"""Rows of each parameter that are compared, evenly spread."""
OTHER_BASIS = 0.7
"""Relative distance beyond which two parameters are not in one basis."""
BLOCK_ROWS = 8192
"""Rows of an embedding that are in float64 at once."""


def basis_distances(one: Weights, two: Weights) -> dict[str, float]:
    """Return how far two checkpoints are apart in every kind of matrix, in the worst layer.

    See `relative_distance`. A matrix counts with the norm gain before it. In another basis of the
    stream all kinds are far apart; where heads or neurons moved, only theirs are.
    """
    worst: dict[str, float] = {}
    for name, param in one.adapter.expand(one.config).items():
        if len(param.axes) == 2 and name in one.entries and name in two.entries:
            rows = _spread_rows(one.entries[name].shape[0], COMPARED_ROWS)
            A, B = (_read_with_gain(view, name, param.gain, rows) for view in (one, two))
            role = name.split(".")[-2]
            worst[role] = max(worst.get(role, 0.0), relative_distance(A, B))
    return worst


def relative_distance(A: Tensor, B: Tensor) -> float:
    """Return `‖A - B‖ / sqrt(‖A‖ ‖B‖)`: 0 for equal matrices, 1.41 for unrelated ones."""
    return float((A - B).norm() / (A.norm() * B.norm()).sqrt().clamp_min(1e-30))


def is_other_basis(distances: Mapping[str, float]) -> bool:
    """Return whether distances are those of two bases. NaN does not count as far."""
    return any(value > OTHER_BASIS for value in distances.values())


def listed(distances: Mapping[str, float]) -> str:
    """Return distances as text for a message."""
    return ", ".join(f"{role} {value:.2f}" for role, value in distances.items())


def refusal(name: str, distances: Mapping[str, float], view: Weights, base: Weights) -> str:
    """Return why an ingredient cannot be merged as it is, with the measured distances."""
    rows = _spread_rows(base.entries[base.adapter.embedding].shape[0], 32 * COMPARED_ROWS)
    A, B = (w[base.adapter.embedding][rows].double() for w in (view, base))
    R = _embedding_rotation(view, base)
    before, after = relative_distance(A, B), relative_distance(A @ R, B)
    remedy = 'it is kin in another basis, and same_basis = "align" brings it to the student\'s.'
    if after > OTHER_BASIS:
        why = (
            f"No rotation of the stream brings the embeddings nearer than {after:.2f}: it was "
            "trained apart from the student."
        )
    elif before > OTHER_BASIS:
        why = (
            f"One rotation of the stream brings the embeddings from {before:.2f} to {after:.2f}: "
            f"{remedy}"
        )
    else:
        why = f"Its stream is the student's, but heads or neurons are not: {remedy}"
    return (
        f"soups: {name} is not in the student's basis. Relative distances of its weights, in the "
        f"worst layer: {listed(distances)} (0 equal, 1.41 unrelated). {why}"
    )


def _embedding_rotation(view: Weights, base: Weights) -> Tensor:
    """Return the rotation `R [d, d]` that brings `E_view R` nearest to the student's embedding.

    It is the polar factor of `E_viewᵀ E_base`. (Schönemann, Psychometrika 31, 1966.)
    """
    A, B = view[base.adapter.embedding], base[base.adapter.embedding]
    M = torch.zeros(base.width, base.width, dtype=torch.float64)
    for k in range(0, len(A), BLOCK_ROWS):
        M += A[k : k + BLOCK_ROWS].double().T @ B[k : k + BLOCK_ROWS].double()
    return polar(M, "soups: basis")[0]


def _read_with_gain(view: Weights, name: str, gain: str | None, rows: Tensor) -> Tensor:
    W = view[name][rows].float()
    return W * view.gain(gain).float() if gain else W


def _spread_rows(size: int, limit: int) -> Tensor:
    """Return up to `limit` row numbers, evenly spread."""
    return torch.arange(0, size, max(1, -(-size // limit)))
