"""The size of a model, and how many parameters it has at that size."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from transformers import AutoConfig

from rotdistill_core.architecture.spaces import VOCAB
from rotdistill_core.checkpoint.layer_lists import DTYPE_KEYS, layer_lists
from rotdistill_core.checkpoint.weights import Weights


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    inner: int
    """In layers and norms."""
    vocabulary: int
    """In embedding and head."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.inner + self.vocabulary


class Size(NamedTuple):
    """The size of a model."""

    layers: int
    """Number of decoder layers."""
    neurons: int
    """Number of neurons in each MLP."""
    kv_heads: int
    """Number of key/value heads in each attention."""
    width: int
    """Width of the residual stream."""

    @staticmethod
    def of(weights: Weights) -> Size:
        """Return the size of a model."""
        sizes = weights.adapter.sizes(weights.config)
        return Size(
            layers=weights.depth,
            neurons=sizes["neurons.0"],
            kv_heads=weights.adapter.heads(weights.config).groups,
            width=weights.width,
        )

    def describe(self) -> str:
        """Return the size in words."""
        return (
            f"{self.layers} layers, {self.neurons} neurons, {self.kv_heads} kv heads, "
            f"stream {self.width}"
        )

    def config(self, weights: Weights) -> dict[str, Any]:
        """Return the config of a model cut to this size."""
        adapter = weights.adapter
        heads = adapter.heads(weights.config)
        return {
            **weights.config,
            adapter.depth_key: self.layers,
            adapter.neurons_key: self.neurons,
            adapter.groups_key: self.kv_heads,
            adapter.query_key: self.kv_heads * (heads.query // heads.groups),
            adapter.width_key: self.width,
            "head_dim": heads.width,
        }

    def rejection(self, weights: Weights) -> str:
        """Return why transformers would not load a model cut to this size; empty if it would."""
        # Which layers stay is not known yet; that their lists are as long as the cut is deep is.
        whole = layer_lists(weights.config, weights.adapter.depth_key)
        lists = {key: values[: self.layers] for key, values in whole.items()}
        settings = {
            key: value
            for key, value in {**self.config(weights), **lists}.items()
            if key not in DTYPE_KEYS
        }
        try:
            AutoConfig.for_model(**settings)
        except Exception as error:
            # A config class may raise anything; the last line of the cause is its reason.
            return str(error.__cause__ or error).strip().rpartition("\n")[2].strip()
        return ""

    def parameters(self, weights: Weights) -> ParameterCount:
        """Return the numbers of parameters of a model cut to this size.

        A narrower stream unties the head, which then counts in addition to the embedding.
        """
        adapter, config = weights.adapter, self.config(weights)
        sizes = adapter.sizes(config)
        unties = self.width < weights.width
        inner = 0
        vocabulary = 0
        for name, param in adapter.expand(config).items():
            if name not in weights.entries and not (name == adapter.head and unties):
                continue
            count = math.prod(sizes[axis] for axis in param.axes)
            if VOCAB in param.axes:
                vocabulary += count
            else:
                inner += count
        return ParameterCount(inner, vocabulary)
