"""Change the basis of the residual stream, of heads and of neurons, and gauges inside them.

A map `X' = X Q` makes a reader `W Q` and a writer `Qᵀ W`. A gauge makes the weights that produce
its space `Gᵀ W`, and those that consume it `W G^-T`. All of it is exact and can be undone, only
`block` is not. (Ashkboos et al., SliceGPT, arXiv:2401.15024.)
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_basis_fold._cost import FOLDED_TWICE, FRAME_ROWS
from rotdistill_core.architecture.spaces import is_residual
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.row_rms import massive_activation_mask, rms_normalise
from rotdistill_core.linalg.maps import Map, Maps, Rotation, transform_param
from rotdistill_core.linalg.precision import float64_device
from rotdistill_core.linalg.solvers import eigh, polar
from rotdistill_core.store.output import StepOutput

if TYPE_CHECKING:
    from rotdistill_basis_fold.step import BasisFold

ORTHOGONALITY = 1e-8
"""Largest deviation from `R Rᵀ = I` that is folded."""


def fold_maps(
    step: BasisFold,
    weights: Weights,
    maps: Maps,
    activations: ActivationStore,
    pair: Pair,
    out: StepOutput,
) -> Weights:
    """Return the student in the bases of `maps`.

    Raises:
        RecipeError: there is nothing to fold, the student was folded before, or the rotation does
            not suit the mode.
        CheckFailed: the rotation is not orthogonal.
    """
    if any(earlier.use == step.use for earlier in out.earlier_steps()):
        raise RecipeError(FOLDED_TWICE)
    inner = _maps_inside_layers(maps)
    if inner:
        out.notes["folded"] = dict(Counter(space.partition(".")[0] for space in inner))
    if step.mode == "block":
        return _fold_blockwise(weights, maps, activations)
    R = maps.tied()
    if R is not None:
        stream = Rotation(_stream_basis(step, R, activations, pair, out))
        stream.verify(ORTHOGONALITY, "basis-fold")
        return weights.fold({"residual": stream, **inner})
    untied_stream = any(is_residual(space) for space in maps)
    if untied_stream or not inner:
        raise RecipeError(
            "basis-fold: needs an aligner before it that found one rotation for all layers "
            '(tie = "all"), or maps of heads or neurons.'
        )
    return weights.fold(inner)


def _maps_inside_layers(maps: Maps) -> dict[str, Map]:
    """Return the maps of heads, neurons and gauges that map a space onto itself.

    An assignment between spaces of different sizes serves blending alone.
    """
    return {space: found for space, found in maps.inside_layers().items() if found.square}


def _stream_basis(
    step: BasisFold, R: Rotation, activations: ActivationStore, pair: Pair, out: StepOutput
) -> Tensor:
    """Return the basis of the mode: `Q [d_s, d_s]`, or `[d_s, d_t]` for `widen`."""
    if step.mode == "canonical":
        frame = _principal_frame(activations, pair, R.matrix.shape[0])
        out.notes["teacher variance in the frame"] = frame.variance_share
        M = R.matrix.double() @ frame.directions
        return polar(M, "basis-fold: canonical frame", pair.student.device)[0]
    if R.square is not (step.mode == "tied"):
        d, e = R.matrix.shape
        needed = (
            'models of one width; use "canonical" or "widen"'
            if step.mode == "tied"
            else 'a wider teacher; use "tied"'
        )
        raise RecipeError(
            f'basis-fold: the rotation is {d} x {e}, and mode "{step.mode}" needs {needed}.'
        )
    return R.matrix.double()


def _fold_blockwise(weights: Weights, maps: Maps, activations: ActivationStore) -> Weights:
    """Return a view whose layer l reads `W R_l` and writes `R_lᵀ W`, biases too.

    `R_l [d, d]` is the rotation at the boundary before the layer. Norm gains and the skip
    connection stay, so the result is not exact.

    Raises:
        RecipeError: a layer without a square rotation.
    """
    table = weights.adapter.expand(weights.config)
    edited: dict[str, Tensor] = {}
    for layer in range(weights.depth):
        R = _rotation_before(layer, weights, maps, activations)
        prefix = f"{weights.adapter.layers}.{layer}."
        for name in weights.entries:
            param = table[name]
            if name.startswith(prefix) and "residual" in param.axes and not param.is_gain:
                W = weights[name].double()
                edited[name] = transform_param(W, param.axes, {"residual": R})
    return weights.edit(edited)


def _rotation_before(
    layer: int, weights: Weights, maps: Maps, activations: ActivationStore
) -> Rotation:
    depth = weights.lineage.depths[layer]
    R = maps.rotation(activations.depths.index(depth)) if depth in activations.depths else None
    if R is None or not R.square:
        raise RecipeError(
            'basis-fold: mode "block" needs a square rotation before every layer; '
            f"layer {layer} has none."
        )
    return R


class PrincipalFrame(NamedTuple):
    """The leading principal directions of the teacher's residual stream."""

    directions: Tensor
    """Orthonormal columns `[d_t, k]`, the strongest first."""
    variance_share: float
    """Share of the stream's second moment that they span."""


def _principal_frame(activations: ActivationStore, pair: Pair, k: int) -> PrincipalFrame:
    """Return the k leading eigenvectors of the teacher's uncentred second moment.

    Rows are those of the sample that every capture keeps. They have unit RMS, and rows of massive
    activations are left out; all boundaries count alike.
    """
    layout = activations.layouts[Side.TEACHER]
    sample = layout.sample()
    fit_rows = sample.row_indices_in(layout)[sample.split(Split.FIT)]
    rows = fit_rows[:: max(1, len(fit_rows) // FRAME_ROWS)]
    device = pair.student.device
    place = float64_device(device)
    width = pair.teacher.width
    moment = torch.zeros(width, width, dtype=torch.float64, device=place)
    for boundary in range(pair.teacher.depth + 1):
        X = activations.rows(Side.TEACHER, boundary)[rows]
        X = rms_normalise(X[~massive_activation_mask(X)].to(place))
        moment += X.T @ X
    values, vectors = eigh(moment.cpu(), "basis-fold: teacher's principal directions", device)
    E = vectors[:, -k:].flip(-1)
    # LAPACK is free in the sign of an eigenvector. Making the largest entry positive gives every
    # machine, and so every student, the same frame.
    E = E * E.gather(0, E.abs().argmax(0, keepdim=True)).sign()
    return PrincipalFrame(E, float(values[-k:].sum() / values.sum()))
