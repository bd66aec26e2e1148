"""Changes of parameters through the maps: `τ_B = T_out τ_A T_inᵀ`.

A change is kept as factors `B A`. T_out acts on B and T_in on A, so a LoRA stays one of its rank.
(Transporting task vectors between widths: arXiv:2602.12952; a LoRA between bases: arXiv:2508.05232;
task vectors: Ilharco et al., arXiv:2212.04089.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.architecture.spaces import KEY_VALUE, QUERY, RESIDUAL, kind_of
from rotdistill_core.architecture.table import LAYER, Param
from rotdistill_core.checkpoint.lora import Factors
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import transform_param

if TYPE_CHECKING:
    from rotdistill_transport._source import Source
    from rotdistill_transport._spaces import Spaces


class Place(NamedTuple):
    """A parameter of the student, and where its change comes from."""

    name: str
    """In the student."""
    source: str
    """In the fine-tuned model."""
    param: Param
    """The student's record."""
    layer: int | None
    """Of the student; None outside of layers."""
    share: float
    """Below 1 where several layers of the student come from one."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A fine-tune in the spaces of the student."""

    weights: Weights
    """The student; its head is a tensor of its own where the fine-tune changes embedding or
    head."""
    changes: Mapping[str, Callable[[], Factors]]
    """Matrix of the student -> its change."""
    vectors: Mapping[str, Callable[[], Tensor]]
    """Bias, or gain that no reader absorbs -> its change `[n]`."""
    left_out: Mapping[str, str]
    """Kind of parameter -> why it is not carried."""


def carry_changes(source: Source, weights: Weights, spaces: Spaces) -> Carried:
    """Return a fine-tune in the spaces of the student; factors are computed when asked for.

    Raises:
        RecipeError: the fine-tune changes matrices that the student does not have.
    """
    ends = {weights.adapter.embedding, weights.adapter.head}
    if ends & {*source.changes}:
        weights = weights.untie()
    _require_counterparts(source, weights)
    changes: dict[str, Callable[[], Factors]] = {}
    vectors: dict[str, Callable[[], Tensor]] = {}
    left_out: dict[str, str] = {}
    for place in _places(source, weights, spaces):
        reason = _obstacle(place, source, weights, spaces)
        if reason:
            left_out[_template(place.name, place.layer)] = reason
        elif place.source in source.changes:
            factors = source.changes[place.source]
            changes[place.name] = partial(_factors, factors, place, weights, spaces)
        else:
            vector = source.vectors[place.source]
            vectors[place.name] = partial(_vector, vector, place, spaces)
    lost = {*range(source.base.depth)} - {*spaces.layers}
    if lost:
        left_out[f"layers {sorted(lost)}"] = "no layer of the student stands for them"
    return Carried(weights=weights, changes=changes, vectors=vectors, left_out=left_out)


def _template(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace(f".{layer}.", ".*.", 1)


def _places(source: Source, weights: Weights, spaces: Spaces) -> Iterator[Place]:
    """Yield the student's parameters that the fine-tune changes."""
    changed = {*source.changes, *source.vectors}
    copies = Counter(spaces.layers)
    for template, param in weights.adapter.params.items():
        if LAYER not in template:
            if template in changed:
                yield Place(template, template, param, None, 1.0)
            continue
        for i, j in enumerate(spaces.layers):
            name = template.replace(LAYER, str(j))
            if name in changed:
                own = template.replace(LAYER, str(i))
                yield Place(own, name, param.at(i), i, 1 / copies[j])


def _require_counterparts(source: Source, weights: Weights) -> None:
    """Refuse a change of a kind of matrix that the student's architecture does not have."""
    theirs = {
        name.replace(LAYER, str(i)): name
        for name in source.base.adapter.params
        for i in range(source.base.depth)
    }
    table = weights.adapter.params
    missing = sorted(
        {
            theirs[name]
            for name in source.changes
            if theirs[name] not in table
            or tuple(map(kind_of, table[theirs[name]].axes))
            != tuple(map(kind_of, source.base.adapter.params[theirs[name]].axes))
        }
    )
    if missing:
        one, two = (view.config["model_type"] for view in (source.weights, weights))
        raise RecipeError(
            f"transport: {source.name} changes {missing[0]} of a {one} model, and the student, a "
            f"{two} model, has no such matrix ({len(missing)} kinds in all). Train the LoRA on "
            "modules that both have, or leave the step out."
        )


def _obstacle(place: Place, source: Source, weights: Weights, spaces: Spaces) -> str:
    """Return why a parameter cannot be carried; empty for most."""
    one, two = (v.adapter.heads(v.config) for v in (source.base.weights, weights))
    kinds = {kind_of(axis) for axis in place.param.axes}
    if kinds & {QUERY, KEY_VALUE} and one.width != two.width:
        return f"heads of {one.width} and {two.width} coordinates have no map between them"
    if place.name not in weights.entries:
        return "the student has no such parameter"
    if place.param.is_gain:
        stream = spaces.streams[0]
        same = place.param.axes != (RESIDUAL,) or (stream.Q is None and stream.write == 1.0)
        if (
            not same
            or source.weights.entries[place.source].shape != weights.entries[place.name].shape
        ):
            return "a gain on single channels means nothing in another basis"
    return ""


def _factors(
    factors: Callable[[], Factors], place: Place, weights: Weights, spaces: Spaces
) -> Factors:
    """Return the change of a matrix of the student."""
    B, A = factors()
    out, inner = place.param.axes
    if out == RESIDUAL:
        B = _written(B.T, place, spaces).T
    else:
        B = transform_param(B, (out,), spaces.inner, place.param.gauge)
    if inner == RESIDUAL:
        A = _read(A, place, weights, spaces)
    else:
        A = transform_param(A.T, (inner,), spaces.inner, place.param.gauge).T
    rows = weights.entries[place.name].shape[0]
    if len(B) != rows:  # of the vocabulary; the tokens are the same, and some sizes are padded
        B = torch.nn.functional.pad(B[:rows], (0, 0, 0, max(0, rows - len(B))))
    return Factors(place.share * B, A)


def _written(rows: Tensor, place: Place, spaces: Spaces) -> Tensor:
    """Return what is written into the stream `[r, d_A]` in the basis of the student `[r, d_B]`."""
    stream = spaces.streams[0 if place.layer is None else place.layer + 1]
    return stream.write * stream.turned(rows)


def _read(A: Tensor, place: Place, weights: Weights, spaces: Spaces) -> Tensor:
    """Return a reader's `A [r, d_A]` for the student's stream `[r, d_B]`.

    The student's norm multiplies by a gain of its own, which A has to divide out. Channels that it
    multiplies by 0 cannot be read.
    """
    if place.name == weights.adapter.embedding:
        return _written(A, place, spaces)
    stream = spaces.streams[-1 if place.layer is None else place.layer]
    if not place.param.gain:
        return stream.turned(A) / stream.write
    gain = weights.gain(place.param.gain)
    A = stream.read * stream.turned(A)
    return torch.where(gain != 0, A / torch.where(gain != 0, gain, 1.0), 0.0)


def _vector(vector: Callable[[], Tensor], place: Place, spaces: Spaces) -> Tensor:
    """Return the change of a bias or of a gain."""
    v = vector()
    if place.param.axes == (RESIDUAL,) and not place.param.is_gain:
        v = _written(v[None], place, spaces)[0]
    elif not place.param.is_gain:
        v = transform_param(v, place.param.axes, spaces.inner, place.param.gauge)
    return place.share * v
