"""Whether two checkpoints of one shape speak of the same coordinates, measured on their weights, and how one is brought to the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from rotdistill_weight_matching import WeightMatching, vocabulary_moments
from torch import Tensor

from rotdistill_core.checkpoint.lazy import open_tensors
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.linalg.solvers import polar
from rotdistill_core.store.output import StepOutput

ROWS = 32
"""Rows of each parameter that are compared, evenly spread."""
APART = 0.7
"""Distance `‖A - B‖ / sqrt(‖A‖ ‖B‖)` beyond which two parameters are not in one basis; 0 for equal ones, 1.41 for unrelated ones."""


def mismatch(one: Weights, two: Weights) -> dict[str, float]:
    """Return how far two checkpoints are from each other in every kind of matrix, in the worst layer; norm gains count as their readers'.

    In another basis of the stream all of them are far, where heads or neurons moved only theirs.
    """
    worst: dict[str, float] = {}
    for name, param in one.adapter.expand(one.config).items():
        if len(param.axes) == 2 and name in one.entries and name in two.entries:
            some = _some(one.entries[name].shape[0], ROWS)
            A, B = (_read(view, name, param.gain, some) for view in (one, two))
            role = name.split(".")[-2]
            worst[role] = max(worst.get(role, 0.0), _distance(A, B))
    return worst


def _read(view: Weights, name: str, gain: str | None, some: Tensor) -> Tensor:
    W = view[name][some].float()
    return W * view.gain(gain).float() if gain else W


def _distance(A: Tensor, B: Tensor) -> float:
    return float((A - B).norm() / (A.norm() * B.norm()).sqrt().clamp_min(1e-30))


def far(apart: dict[str, float]) -> bool:
    """Say whether a mismatch is that of two bases. A value that is not a number is none."""
    return any(value > APART for value in apart.values())


def refusal(name: str, apart: dict[str, float], view: Weights, base: Weights) -> str:
    """Return why an ingredient cannot be merged as it is, with what was measured."""
    shown = ", ".join(f"{role} {value:.2f}" for role, value in apart.items())
    some = _some(base.entries[base.adapter.embedding].shape[0], 32 * ROWS)
    A, B = (w[base.adapter.embedding][some].double() for w in (view, base))
    R, _ = polar(vocabulary_moments(view, base), "soups: basis")
    before, after = _distance(A, B), _distance(A @ R, B)
    if after > APART:
        why = f"No rotation of the stream brings the embeddings nearer than {after:.2f}: it was trained apart from the student."
    else:
        turned = (
            f"One rotation of the stream brings the embeddings from {before:.2f} to {after:.2f}"
        )
        turned = (
            turned
            if before > APART
            else "Its stream is the student's, but heads or neurons are not"
        )
        why = f'{turned}: it is kin in another basis, and same_basis = "align" brings it to the student\'s.'
    told = (
        f"Relative distances of its weights, in the worst layer: {shown} (0 equal, 1.41 unrelated)."
    )
    return f"soups: {name} is not in the student's basis. {told} {why}"


def _some(size: int, most: int) -> Tensor:
    """Return up to `most` row numbers, evenly spread."""
    return torch.arange(0, size, max(1, -(-size // most)))


@dataclass(frozen=True)
class Seen(Model):
    """The student as earlier steps left it, in the place of a model that others are aligned to."""

    view: Weights | None = None

    @property
    def weights(self) -> Weights:
        """The view."""
        assert self.view is not None
        return self.view


def aligned(
    name: str,
    model: Model,
    view: Weights,
    student: Model,
    base: Weights,
    out: StepOutput,
    progress: Progress,
) -> Weights:
    """Return the ingredient in the student's basis: rotation, heads, neurons and gauges from weights alone, folded exactly.

    Raises:
        RecipeError: they are as far apart afterwards.
    """
    target = Seen(student.ref, student.folder, base.config, base.adapter, base)
    pair = Pair(target, replace(model, config=view.config))
    maps = WeightMatching().align(view, Maps(), pair, out, progress)
    tied = maps.tied()
    assert tied is not None
    inner = {space: found for space, found in maps.items() if not space.startswith("residual.")}
    made = view.fold({"residual": tied, **inner})
    apart = mismatch(made, fused(base))
    if far(apart):
        shown = ", ".join(f"{role} {value:.2f}" for role, value in apart.items())
        raise RecipeError(
            f"soups: {name} could not be aligned: relative distances of its weights are still {shown} (0: equal, 1.41: unrelated). "
            "It was trained apart from the student, or too far from it; leave it out."
        )
    return made


def is_fused(view: Weights) -> bool:
    """Say whether the norm gains were absorbed by their readers already."""
    gains = [view.gain(name) for name in view.adapter.gains(view.config)[0]]
    return all(float((g - g[0]).abs().max()) <= 1e-6 * float(g[0].abs()) for g in gains)


def fused(view: Weights) -> Weights:
    """Return the view with its norm gains absorbed and its head untied; logits do not change."""
    return (
        view
        if is_fused(view)
        else view.fold({"residual": Rotation(torch.eye(view.width, dtype=torch.float64))})
    )


def on_disk(view: Weights, name: str, out: StepOutput, dtype: torch.dtype) -> Weights:
    """Return the view with what would be computed at every read committed to a file instead."""
    from rotdistill_core.store.files import tensor_blocks

    made = {n: (e.shape, dtype, e.read) for n, e in view.entries.items() if e.stored is None}
    if not made:
        return view
    file = f"weights/{out.step}/{name}.safetensors"
    path = out.find(file) or out.write(file, tensor_blocks(made))
    return replace(view.edit(open_tensors(path)), undo=view.undo)
