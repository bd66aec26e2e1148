"""Changes of basis, folded into the tensors of a checkpoint, and taken back.

Activations are rows: a map acts as `X' = X Q`. A reader `W [out, in]` of the space becomes `W Q`, a
writer `Qᵀ W`, the embedding `E Q`. `RMSNorm(x Q) = RMSNorm(x) Q` holds only for a gain of 1. So
before a rotation of the residual stream each reader absorbs the gain of the norm before it,
`W diag(g)`, and the gain becomes 1. The head absorbs the last gain, so a tied head is untied.

The functions know tables, configs and tensors. `Weights.fold` and `Weights.unfold` apply them to
a whole model. (Ashkboos et al., SliceGPT, arXiv:2401.15024: computational invariance.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rotdistill_core.architecture.table import Adapter, Config, Param
from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import (
    Map,
    Permutation,
    Rotation,
    map_of,
    tensor_of,
    transform_param,
)

NEAR_ZERO_GAIN = 3e-3
"""Share of the largest gain below which dividing by a gain would magnify rounding beyond 1e-12."""


@dataclass(frozen=True, kw_only=True)
class Undo:
    """What takes a fold back."""

    maps: Mapping[str, Map]
    """Space -> the map that was folded."""
    gains: Mapping[str, Tensor]
    """Norm weight `[d]` that its readers absorbed, float64."""
    config: Config
    """The config before the fold."""
    offset: float
    """Number that a norm adds to its weight (1 for Gemma)."""
    columns: Mapping[str, Tensor]
    """Reader -> its columns `[out, k]` at near-zero gains, where absorbing the gain erases them."""

    def tensors(self) -> dict[str, Tensor]:
        """Return everything but the config, to be stored; see `from_tensors`."""
        tensors = {f"map.{space}": tensor_of(found) for space, found in self.maps.items()}
        tensors |= {f"gain.{name}": gain for name, gain in self.gains.items()}
        return tensors | {f"columns.{name}": columns for name, columns in self.columns.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Config, offset: float) -> Undo:
        """Return the record that `tensors` described; config and offset are the model's."""
        parts: dict[str, dict[str, Tensor]] = {"map": {}, "gain": {}, "columns": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            parts[kind][name] = tensor
        maps = {space: map_of(tensor) for space, tensor in parts["map"].items()}
        return cls(
            maps=maps,
            gains=parts["gain"],
            config=config,
            offset=offset,
            columns=parts["columns"],
        )

    def factor(self, gain: str) -> Tensor:
        """Return the factor `[d]` by which a norm multiplied before the fold, float64."""
        return self.gains[gain] + self.offset

    def near_zero_gain(self, gain: str) -> Tensor:
        """Return the channels whose factor is at most `NEAR_ZERO_GAIN` of the largest `[k]`."""
        g = self.factor(gain).abs()
        return (g <= NEAR_ZERO_GAIN * g.max()).nonzero().flatten()


@dataclass(frozen=True)
class FoldedTensors:
    """A checkpoint after a fold, in float64."""

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    undo: Undo


def fold_tensors(
    adapter: Adapter,
    config: Config,
    tensors: Mapping[str, LazyTensor],
    maps: Mapping[str, Map],
) -> FoldedTensors:
    """Express a checkpoint in new bases; its logits do not change.

    A rectangular rotation `[d, e]` widens the stream. The mean square over e channels is d/e of
    that over d, so gains become `sqrt(d/e)` and eps becomes `eps d/e`.

    Args:
        adapter: the table of the architecture.
        config: the model's config.json.
        tensors: parameter -> its tensor; a tied head is absent.
        maps: space -> map. `residual` stands for all layer boundaries.

    Raises:
        RecipeError: norms act on the stream that no reader follows, so it cannot be rotated; or
            norms outside the stream share its eps, so it cannot be widened.
    """
    gains = _gains_to_absorb(adapter, config, maps)
    undo = _undo(adapter, config, tensors, maps, gains)
    folded_config = dict(config)
    untied = dict(tensors)
    if gains and adapter.head not in tensors:
        untied[adapter.head] = tensors[adapter.embedding]
        folded_config["tie_word_embeddings"] = False
    widened = _config_of_wider_stream(adapter, config, maps)
    folded_config |= widened

    width = widened.get(adapter.width_key, adapter.sizes(config)["residual"])
    folded: dict[str, LazyTensor] = {}
    for name, param in adapter.expand(config).items():
        if name in untied:
            shape = _shape_at_width(untied[name].shape, param, width)
            read = partial(_read_folded, name, untied[name], param, undo)
            folded[name] = LazyTensor(shape, torch.float64, read)
    return FoldedTensors(folded_config, {**untied, **folded}, undo)


def unfold_tensors(
    adapter: Adapter, tensors: Mapping[str, LazyTensor], undo: Undo
) -> dict[str, LazyTensor]:
    """Return the tensors before the fold that `undo` belongs to, in float64.

    They are those of `undo.config`: a head that the fold untied is left out.
    """
    inverse = {space: found.invert() for space, found in undo.maps.items()}
    tied = undo.config.get("tie_word_embeddings")
    width = adapter.sizes(undo.config)["residual"]
    unfolded: dict[str, LazyTensor] = {}
    for name, param in adapter.expand(undo.config).items():
        if name in tensors and not (tied and name == adapter.head):
            shape = _shape_at_width(tensors[name].shape, param, width)
            read = partial(_read_unfolded, name, tensors[name], param, inverse, undo)
            unfolded[name] = LazyTensor(shape, torch.float64, read)
    return unfolded


def _gains_to_absorb(adapter: Adapter, config: Config, maps: Mapping[str, Map]) -> list[str]:
    """Return the gains that readers absorb before the fold: all of them before a rotation.

    A permutation of the stream commutes with gains, so it carries them along instead.
    """
    if "residual" not in maps or isinstance(maps["residual"], Permutation):
        return []
    adapter.require_rotations(config)
    return adapter.gains(config).absorbed


def _config_of_wider_stream(
    adapter: Adapter, config: Config, maps: Mapping[str, Map]
) -> dict[str, Any]:
    """Return the config keys that a rotation into a wider space changes; else nothing."""
    R = maps.get("residual")
    if not isinstance(R, Rotation) or R.square:
        return {}
    inner_norms = [
        name
        for name, param in adapter.expand(config).items()
        if param.is_gain and "residual" not in param.axes
    ]
    if inner_norms:
        raise RecipeError(
            f"a {config['model_type']} model cannot be widened: {inner_norms[0]} shares its eps "
            "with norms that change."
        )
    d, e = R.matrix.shape
    return {
        adapter.width_key: e,
        adapter.eps_key: float(config[adapter.eps_key]) * d / e,
        "head_dim": adapter.heads(config).width,
    }


def _undo(
    adapter: Adapter,
    config: Config,
    tensors: Mapping[str, LazyTensor],
    maps: Mapping[str, Map],
    gains: Sequence[str],
) -> Undo:
    """Return what takes the fold back: the maps, and everything that absorbing gains would lose."""
    absorbed = {name: tensors[name].read().double() for name in gains}
    undo = Undo(maps=maps, gains=absorbed, config=config, offset=adapter.gain_offset, columns={})
    columns: dict[str, Tensor] = {}
    for name, param in adapter.expand(config).items():
        if name in tensors and param.gain and param.gain in absorbed:
            lost = undo.near_zero_gain(param.gain)
            if len(lost):
                columns[name] = tensors[name].read()[:, lost].clone()
    return replace(undo, columns=columns)


def _shape_at_width(shape: Sequence[int], param: Param, width: int) -> tuple[int, ...]:
    """Return a parameter's shape where the residual stream has `width` channels."""
    axes = zip(param.axes, shape, strict=True)
    return tuple(width if space == "residual" else size for space, size in axes)


def _read_folded(name: str, tensor: LazyTensor, param: Param, undo: Undo) -> Tensor:
    """Compute one parameter in the new bases, float64."""
    if name in undo.gains:
        # An absorbed gain becomes 1; in a wider stream it makes up for the smaller mean square.
        stream = undo.maps["residual"]
        assert isinstance(stream, Rotation), (
            "only a rotation of the stream makes readers absorb gains"
        )
        d, e = stream.matrix.shape
        return torch.full((e,), (d / e) ** 0.5 - undo.offset, dtype=torch.float64)
    W = tensor.read().double()
    if param.gain and param.gain in undo.gains:
        W = W * undo.factor(param.gain)
    return transform_param(W, param.axes, undo.maps, param.gauge)


def _read_unfolded(
    name: str, tensor: LazyTensor, param: Param, inverse: Mapping[str, Map], undo: Undo
) -> Tensor:
    """Compute one parameter in the bases before the fold, float64."""
    if name in undo.gains:
        return undo.gains[name]
    W = transform_param(tensor.read().double(), param.axes, inverse, param.gauge, back=True)
    if not param.gain or param.gain not in undo.gains:
        return W
    # Divide the gain out again. Where it is nearly 0 the columns were erased, and were kept aside.
    near_zero = undo.near_zero_gain(param.gain)
    W = W / undo.factor(param.gain).index_fill(0, near_zero, 1.0)
    if name not in undo.columns:
        return W
    return W.index_copy(1, near_zero, undo.columns[name].double())
