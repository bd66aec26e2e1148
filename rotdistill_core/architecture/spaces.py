"""Names of spaces: what an axis of a parameter counts, and what a map acts on.

A space that exists once has a plain name (`residual`, `vocab`). A space of every layer carries the
layer's number: `q.3` (query heads), `kv.3` (key/value heads), `neurons.3`. In an architecture table
that number is still open: `q.{i}`. A map of the stream belongs to a layer boundary: `residual.3`.

A gauge is a freedom inside a space, named the same way: `value.3`, `key.3`, `up.3`. A `*` after its
name marks the parameter that consumes the space and therefore takes the dual map.

These strings are written to ledgers, so they never change.
"""

from __future__ import annotations

RESIDUAL = "residual"
"""The residual stream."""
VOCAB = "vocab"
"""Tokens: rows of embedding and head."""
QUERY = "q"
KEY_VALUE = "kv"
NEURONS = "neurons"

VALUE_GAUGE = "value"
"""Any invertible matrix per key/value head, between v and o."""
KEY_GAUGE = "key"
"""One complex factor per key/value head and rotary pair, between q and k."""
UP_GAUGE = "up"
"""One factor per neuron, between up and down."""

_DUAL = "*"


def in_layer(kind: str, layer: int) -> str:
    """Return the name of a layer's space or gauge: `in_layer(NEURONS, 3)` is `neurons.3`."""
    return f"{kind}.{layer}"


def kind_of(name: str) -> str:
    """Return a name without its number: `neurons` of `neurons.3` and of `neurons.{i}`."""
    return name.partition(".")[0]


def layer_of(name: str) -> int:
    """Return the number of a layer's space, gauge or boundary: 3 of `neurons.3`."""
    return int(name.rpartition(".")[2])


def residual(boundary: int) -> str:
    """Return the name of the residual stream at a layer boundary; boundary 0 is the embeddings."""
    return in_layer(RESIDUAL, boundary)


def is_residual(name: str) -> bool:
    """Return whether a map of this name acts on the residual stream at a layer boundary."""
    return name.startswith(f"{RESIDUAL}.")


def is_dual(gauge: str) -> bool:
    """Return whether the parameter that names this gauge takes the dual map."""
    return gauge.endswith(_DUAL)


def primal(gauge: str) -> str:
    """Return the name under which a gauge is stored: without the mark of the dual."""
    return gauge.removesuffix(_DUAL)
