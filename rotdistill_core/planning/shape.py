"""Sizes of a model, from its config and its adapter's table alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rotdistill_core.architecture.spaces import VOCAB
from rotdistill_core.architecture.table import Adapter

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Dtype name -> bytes of a number."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model."""

    adapter: Adapter
    config: Mapping[str, Any]
    stored: str
    """Name of the dtype of its weight files."""
    keep: float = 1.0
    """Share of the parameters inside layers that earlier cuts leave."""

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.adapter.depth(self.config)

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.adapter.sizes(self.config)["residual"]

    @property
    def neurons(self) -> int:
        """Neurons of an MLP."""
        return self.adapter.sizes(self.config)["neurons.0"]

    @property
    def query_width(self) -> int:
        """Coordinates of all query heads of a layer together."""
        return self.adapter.sizes(self.config)["q.0"]

    @property
    def kv_width(self) -> int:
        """Coordinates of all key heads of a layer together; its value heads have as many."""
        return self.adapter.sizes(self.config)["kv.0"]

    @property
    def vocab(self) -> int:
        """Rows of the embedding and of the head."""
        return self.adapter.sizes(self.config)[VOCAB]

    def parameters(self, inside: bool | None = None) -> int:
        """Return the number of parameters. A tied head counts once, an optional bias not at all.

        Args:
            inside: True counts parameters inside layers, False those outside, None all.
        """
        return self._parameters[inside]

    @cached_property
    def _parameters(self) -> dict[bool | None, int]:
        """Number of parameters inside layers, outside, and of all; see `parameters`."""
        sizes = self.adapter.sizes(self.config)
        tied = bool(self.config.get("tie_word_embeddings"))
        totals: dict[bool | None, float] = {True: 0.0, False: 0.0, None: 0.0}
        for name, param in self.adapter.expand(self.config).items():
            if param.optional or (param.tied and tied):
                continue
            inside = name.startswith(f"{self.adapter.layers}.")
            share = self.keep if inside else 1
            count = math.prod(sizes[axis] for axis in param.axes) * share
            totals[inside] += count
            totals[None] += count
        return {part: round(total) for part, total in totals.items()}

    @property
    def layer_parameters(self) -> float:
        """Parameters of one layer."""
        return self.parameters(inside=True) / self.depth

    @property
    def bytes(self) -> int:
        """Size of its weight files."""
        return self.parameters() * DTYPE_BYTES[self.stored]

    def changed(self, keep: float = 1.0, **config: Any) -> ModelShape:
        """Return the shape after a step that cuts, widens or unties the model.

        Args:
            keep: share of the parameters inside layers that the step leaves.
            config: keys of the config with their new values.
        """
        return replace(self, config={**self.config, **config}, keep=self.keep * keep)
