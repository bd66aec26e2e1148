"""An architecture is a table: which space each axis of each parameter lives in.

Everything else (folding a rotation, permuting neurons, checking a checkpoint, walking it layer by layer) is generic. No
forward pass is subclassed, so transformers may change beneath a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rotdistill_core.errors import SetupError, suggest

Config = Mapping[str, Any]
"""A model's config.json."""

LAYER = "{i}"


@dataclass(frozen=True)
class Param:
    """One parameter: the space of each axis, and the norm gain that it absorbs as a reader of the residual stream."""

    axes: tuple[str, ...]
    gain: str | None = None
    """Name of the norm weight in front of this reader."""
    tied: str | None = None
    """Name of the parameter whose values this one shares when the config ties them."""
    is_gain: bool = False
    """It is a norm gain. Those that readers name are absorbed by them before a rotation, the others stay where they are."""
    optional: bool = False
    """It may be absent (biases that a config switches)."""
    gauge: str = ""
    """The gauge that its axis outside the residual stream is free in; a `*` at the end marks what consumes the space."""

    def at(self, layer: int) -> Param:
        """Return this record with `{i}` filled in."""
        axes = tuple(axis.replace(LAYER, str(layer)) for axis in self.axes)
        gain, gauge = (
            self.gain and self.gain.replace(LAYER, str(layer)),
            self.gauge.replace(LAYER, str(layer)),
        )
        return replace(self, axes=axes, gain=gain, gauge=gauge)


class HeadLayout(NamedTuple):
    """How `q.{i}` and `kv.{i}` divide into heads; query heads `g query / groups ...` belong to key/value head g."""

    query: int
    groups: int
    width: int


@dataclass(frozen=True)
class Site:
    """Where activations of a space are seen: a module inside a decoder layer, at its input or output."""

    module: str
    side: str


@dataclass(frozen=True)
class Adapter:
    """The table of one architecture. Names are parameter names of the Hugging Face checkpoint; `{i}` is the layer."""

    model_types: tuple[str, ...]
    params: Mapping[str, Param]
    dims: Callable[[Config], Mapping[str, int]]
    """Size of each space, from the config."""
    sites: Mapping[str, Site]
    writers: Mapping[str, str]
    """Site -> the parameter that carries it into the residual stream."""
    heads: Callable[[Config], HeadLayout]
    """How attention divides into heads, from the config."""
    body: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    depth_key: str = "num_hidden_layers"
    width_key: str = "hidden_size"
    eps_key: str = "rms_norm_eps"
    neurons_key: str = "intermediate_size"
    groups_key: str = "num_key_value_heads"
    query_key: str = "num_attention_heads"
    gain_offset: float = 0.0
    """The norm multiplies by `gain_offset + weight` (1 for Gemma)."""
    softcap_key: str = ""
    """Config key of c where the final logits are `c tanh(logits / c)`."""
    defaults: Callable[[Config], Config] = lambda _: {}
    """What the model's config class takes for keys that a config.json leaves out."""
    refuses: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config key -> values under which the table does not hold."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensor of a checkpoint -> the parameters of the table that it holds, one below the other."""

    def depth(self, config: Config) -> int:
        """Return the number of decoder layers."""
        return int(config[self.depth_key])

    def completed(self, config: Config) -> dict[str, Any]:
        """Return a config with what its class takes for the keys that it leaves out."""
        return {
            **config,
            **{
                key: value
                for key, value in self.defaults(config).items()
                if config.get(key) is None
            },
        }

    def expand(self, config: Config) -> dict[str, Param]:
        """Return every parameter name with its record."""
        return {
            n.replace(LAYER, str(i)): param.at(i)
            for n, param in self.params.items()
            for i in self._layers(n, config)
        }

    def sizes(self, config: Config) -> dict[str, int]:
        """Return every space with its size."""
        return {
            s.replace(LAYER, str(i)): size
            for s, size in self.dims(config).items()
            for i in self._layers(s, config)
        }

    def _layers(self, name: str, config: Config) -> Sequence[int]:
        return range(self.depth(config)) if LAYER in name else (0,)

    def gains(self, config: Config) -> tuple[list[str], list[str]]:
        """Return the norm gains that readers absorb, and those that act on the stream with no reader behind them."""
        table = self.expand(config)
        absorbed = list(dict.fromkeys(param.gain for param in table.values() if param.gain))
        return absorbed, [
            n for n, p in table.items() if p.is_gain and "residual" in p.axes and n not in absorbed
        ]

    def parts(self, config: Config) -> dict[str, list[str]]:
        """Return each fused tensor of a checkpoint with the parameters that it holds."""
        return {
            whole.replace(LAYER, str(i)): [part.replace(LAYER, str(i)) for part in parts]
            for whole, parts in self.fused.items() for i in self._layers(whole, config)
        }  # fmt: skip

    def unfused(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the table's parameters in a checkpoint; a fused tensor whose rows do not add up stays as it is."""
        found, table, sizes = dict(shapes), self.expand(config), self.sizes(config)
        for whole, parts in self.parts(config).items():
            rows = {name: sizes[table[name].axes[0]] for name in parts}
            if whole in found and sum(rows.values()) == found[whole][0]:
                shape = found.pop(whole)
                found |= {name: (n, *shape[1:]) for name, n in rows.items()}
        return found

    def check(self, config: Config, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Compare a checkpoint's headers with the table: every tensor claimed once, every shape as declared.

        Raises:
            SetupError: listing all differences. No weight has been read by then.
        """
        table, sizes, shapes = self.expand(config), self.sizes(config), self.unfused(config, shapes)
        tied = bool(config.get("tie_word_embeddings", False))
        problems = [
            f"{key} = {config[key]!r} is not covered by this table"
            for key, values in self.refuses.items()
            if config.get(key) in values
        ]
        for name, param in table.items():
            expected = tuple(sizes[axis] for axis in param.axes)
            if name not in shapes:
                if not param.optional and not (param.tied and tied):
                    problems.append(f"{name} is missing (expected {list(expected)})")
            elif tuple(shapes[name]) != expected:
                problems.append(f"{name} has shape {list(shapes[name])}, expected {list(expected)}")
        problems += [
            f"{name} is not in the table.{suggest(name, table)}"
            for name in shapes
            if name not in table
        ]
        if problems:
            shown = "; ".join(problems[:8]) + (
                f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            )
            raise SetupError(
                f"{where}: the checkpoint does not fit the adapter for {'/'.join(self.model_types)}: {shown}."
            )
