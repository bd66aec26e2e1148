"""Similarity of heads and neurons by what they do on texts: attention maps and activations.

Both models go over the same texts layer by layer. Activations of a layer are kept only while a
later layer of its stage may still be compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rotdistill_core.alignment.assignment import Similarities, unit_rows
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.evaluation.divergence import shared_vocabulary
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.row_rms import massive_activation_mask

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model, Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples


class LayerActivations(NamedTuple):
    """The activations of one layer on some texts."""

    attention: Tensor
    """`[H, pairs]`: the attention maps of all texts, without those onto position 0."""
    neurons: Tensor
    """`[rows, f]`: the input of `down_proj`."""
    sample_map: Tensor
    """`[H, tokens, tokens]`: the attention among the tokens of the shortest text, for a plot."""


class ActivationComparison:
    """Compares layers of student and teacher by their activations on the same fit texts."""

    def __init__(
        self,
        weights: Weights,
        pair: Pair,
        samples: Samples,
        max_texts: int,
        within_stage: int,
    ) -> None:
        shared_vocabulary(pair)  # attention maps are compared token by token
        layout = samples.layout.select(Split.FIT, limit=max_texts)
        self.sample_maps: dict[tuple[Side, int], Tensor] = {}
        """Side and layer -> attention map of one text."""
        self._student = _LayerWindow(
            partial(walk_layers, weights, pair.student, layout),
            length=2 * within_stage,
        )
        self._teacher = _LayerWindow(
            partial(walk_layers, pair.teacher.weights, pair.teacher, layout),
            length=within_stage * (1 + pair.teacher.depth // weights.depth),
        )

    def compare(self, student_layer: int, teacher_layer: int) -> Similarities:
        """Return the similarities of two layers.

        Heads: cosine of attention maps. Neurons: absolute correlation, without massive-activation
        rows and position 0. A gauge may flip a neuron's sign, so the sign does not count.
        """
        student = self._student.layer(student_layer)
        teacher = self._teacher.layer(teacher_layer)
        self.sample_maps[Side.STUDENT, student_layer] = student.sample_map
        self.sample_maps[Side.TEACHER, teacher_layer] = teacher.sample_map
        heads = unit_rows(student.attention) @ unit_rows(teacher.attention).T
        X, Y = student.neurons, teacher.neurons
        taken = ~massive_activation_mask(X) & ~massive_activation_mask(Y)
        taken[0] = False
        # Centred rows of unit length: their products are correlations.
        X = unit_rows((X[taken] - X[taken].mean(0)).T)
        Y = unit_rows((Y[taken] - Y[taken].mean(0)).T)
        return Similarities(heads, (X @ Y.T).abs_())


class _LayerWindow:
    """The last layers of a model that goes over its texts layer by layer.

    Args:
        walk: begins to go over them.
        length: number of layers that are kept.
    """

    def __init__(self, walk: Callable[[], Iterator[LayerActivations]], length: int) -> None:
        self._walk = walk
        self._length = length
        self._layers = enumerate(walk())
        self._reached = -1
        self._kept: dict[int, LayerActivations] = {}

    def layer(self, number: int) -> LayerActivations:
        """Return a layer, walking on to it; earlier layers than the window are dropped.

        One that was dropped takes another walk: layers of a stage that spans a cut lie far apart.
        """
        if number not in self._kept and number <= self._reached:
            self._layers, self._kept = enumerate(self._walk()), {}
        while number not in self._kept:
            self._reached, activations = next(self._layers)
            self._kept[self._reached] = activations
            self._kept.pop(self._reached - self._length, None)
        return self._kept[number]


def walk_layers(weights: Weights, model: Model, layout: PackedTexts) -> Iterator[LayerActivations]:
    """Yield the activations of one layer after the other."""
    # Only this attention returns its maps. One text at a time, so that nothing is padded.
    eager = replace(weights, config={**weights.config, "attn_implementation": "eager"})
    walk = LayerwiseForward(eager, layout, model.device, model.dtype, budget=1)
    attention_module = weights.adapter.sites["heads"].module.rpartition(".")[0]
    for _ in walk:
        yield _record_layer(walk, attention_module)


def _record_layer(walk: LayerwiseForward, attention_module: str) -> LayerActivations:
    """Send all rows through the open layer and return its activations."""
    maps: list[Tensor] = []
    neurons: list[Tensor] = []

    def keep_attention(_module: object, _arguments: object, result: Any) -> None:
        maps.append(result[1][0].float().cpu())

    def keep_neurons(_rows: Tensor, X: Tensor) -> None:
        neurons.append(X.float().cpu())

    hook = walk.layer.get_submodule(attention_module).register_forward_hook(keep_attention)
    walk.run({"neurons": keep_neurons})
    hook.remove()
    # Position 0 is a sink onto which all heads attend alike.
    attention = torch.cat([each[:, :, 1:].flatten(1) for each in maps], 1)
    shortest = maps[-1]  # texts go from long to short
    own_tokens = shortest.shape[1]  # without the shared prefix, whose keys come first
    sample_map = shortest[:, :, -own_tokens:].clone()
    return LayerActivations(attention, torch.cat(neurons), sample_map)
