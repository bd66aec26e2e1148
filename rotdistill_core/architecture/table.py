"""An architecture is a table: the space that each axis of each parameter lives in.

Everything else is generic: folding a rotation, permuting neurons, checking a checkpoint, running it
layer by layer. No forward pass is subclassed, so transformers may change beneath a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rotdistill_core.errors import SHOWN_PROBLEMS, RecipeError, SetupError, listed, suggest

Config = Mapping[str, Any]
"""A model's config.json."""

LAYER = "{i}"
"""Placeholder of the layer's number in names of parameters and spaces."""
WHOLE_HEADS = ("default", "proportional")
"""Types of rotary tables that turn whole heads, whatever share a config names; the others would
make a table too narrow for attention that turns whole heads, and transformers fails."""
PER_LAYER_KEY = "per_layer_config"
"""Config key under which transformers overrides any other key for single layers."""


@dataclass(frozen=True)
class Param:
    """One parameter: the space of each axis, and how it takes part in changes of basis."""

    axes: tuple[str, ...]
    gain: str | None = None
    """Name of the norm weight that this reader of the residual stream absorbs."""
    tied: str | None = None
    """Name of the parameter whose values this one shares when the config ties them."""
    is_gain: bool = False
    """It is a norm gain. A rotation needs readers that absorb it; without any it is refused."""
    optional: bool = False
    """It may be absent (biases that a config switches)."""
    gauge: str = ""
    """Gauge in which its axis outside the stream is free; a `*` at the end marks a consumer."""

    def at(self, layer: int) -> Param:
        """Return this record with `{i}` filled in."""
        number = str(layer)
        return replace(
            self,
            axes=tuple(axis.replace(LAYER, number) for axis in self.axes),
            gain=self.gain and self.gain.replace(LAYER, number),
            gauge=self.gauge.replace(LAYER, number),
        )


class HeadLayout(NamedTuple):
    """How `q.{i}` and `kv.{i}` divide into heads.

    Query heads `g query / groups ...` belong to key/value head g.
    """

    query: int
    """Number of query heads."""
    groups: int
    """Number of key/value heads."""
    width: int
    """Coordinates of a head."""


class Gains(NamedTuple):
    """Names of the norm gains on the residual stream."""

    absorbed: list[str]
    """Readers name them, and absorb them before a rotation."""
    stuck: list[str]
    """No reader names them: they act on what attention or the MLP writes, and forbid rotations."""


@dataclass(frozen=True)
class Site:
    """Where activations of a space are observed: a module in a layer, at `input` or `output`."""

    module: str
    side: str


def no_defaults(_: Config) -> Config:
    """Return nothing: a config.json of this architecture leaves out no key that the table needs."""
    return {}


def _rotary_shares(config: Config) -> Iterator[tuple[str, float]]:
    """Yield the type of each rotary table that a config names, and which share of a head it turns.

    Configs of older transformers say it in `rope_scaling`, and in keys of their own.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, Mapping):
        return
    by_layer_type = [values for values in rope.values() if isinstance(values, Mapping)]
    for values in by_layer_type or [rope]:
        kind = values.get("rope_type") or values.get("type") or "default"
        share = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        yield str(kind), 1.0 if share is None else share


def _factor(config: Config, key: str) -> float:
    """Return the factor that a config key holds; 1 without a key or a value."""
    value = config.get(key) if key else None
    return 1.0 if value is None else float(value)


@dataclass(frozen=True)
class Adapter:
    """The table of one architecture.

    Names are parameter names of the Hugging Face checkpoint; `{i}` is the layer.
    """

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
    logits_scaling_key: str = ""
    """Config key of s where the final logits are `logits / s` (Granite)."""
    embedding_multiplier_key: str = ""
    """Config key of the factor by which the model's body multiplies embeddings (Granite)."""
    residual_multiplier_key: str = ""
    """Config key of m where a layer adds `m f` to the stream, f being what a branch writes."""
    partial_rotary: bool = False
    """Attention may turn only some coordinates of a head, as `partial_rotary_factor` says."""
    defaults: Callable[[Config], Config] = no_defaults
    """What the model's config class takes for keys that a config.json leaves out."""
    refuses: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config key -> values under which the table does not hold."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Config key -> the only value under which the table holds, or a tuple of such values. A config
    that leaves the key out, or has null there, holds too."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensor of a checkpoint -> parameters of the table that it holds, one below the other."""

    def depth(self, config: Config) -> int:
        """Return the number of decoder layers."""
        return int(config[self.depth_key])

    def embedding_multiplier(self, config: Config) -> float:
        """Return the factor by which the model's body multiplies embeddings."""
        return _factor(config, self.embedding_multiplier_key)

    def residual_multiplier(self, config: Config) -> float:
        """Return the factor by which a layer multiplies what its branches write."""
        return _factor(config, self.residual_multiplier_key)

    def completed(self, config: Config) -> dict[str, Any]:
        """Return a config with the defaults of its class for the keys that it leaves out."""
        missing = {
            key: value for key, value in self.defaults(config).items() if config.get(key) is None
        }
        return {**config, **missing}

    def expand(self, config: Config) -> dict[str, Param]:
        """Return every parameter name with its record."""
        return {
            name.replace(LAYER, str(i)): param.at(i)
            for name, param in self.params.items()
            for i in self._layers(name, config)
        }

    def sizes(self, config: Config) -> dict[str, int]:
        """Return every space with its size."""
        return {
            space.replace(LAYER, str(i)): size
            for space, size in self.dims(config).items()
            for i in self._layers(space, config)
        }

    def _layers(self, name: str, config: Config) -> Sequence[int]:
        return range(self.depth(config)) if LAYER in name else (0,)

    def gains(self, config: Config) -> Gains:
        """Return the norm gains that act on the residual stream."""
        table = self.expand(config)
        absorbed = list(dict.fromkeys(param.gain for param in table.values() if param.gain))
        stuck = [
            name
            for name, param in table.items()
            if param.is_gain and "residual" in param.axes and name not in absorbed
        ]
        return Gains(absorbed, stuck)

    def require_rotations(self, config: Config) -> None:
        """Refuse a model whose residual stream cannot be rotated.

        Raises:
            RecipeError: norm gains act on what attention and MLP write.
        """
        stuck = self.gains(config).stuck
        if stuck:
            raise RecipeError(
                f"the residual stream of models of type {config['model_type']} cannot be rotated: "
                f"{len(stuck)} norm gains, the first is {stuck[0]}, act on what attention and MLP "
                "write. No reader follows them that could absorb them, and only permutations "
                "commute with them. Leave out the step that rotates; neurons, heads and channels "
                "can be permuted."
            )

    def parts(self, config: Config) -> dict[str, list[str]]:
        """Return each fused tensor of a checkpoint with the parameters that it holds."""
        return {
            whole.replace(LAYER, str(i)): [part.replace(LAYER, str(i)) for part in parts]
            for whole, parts in self.fused.items()
            for i in self._layers(whole, config)
        }

    def unfused(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a checkpoint by parameter of the table.

        A fused tensor whose rows do not add up stays as it is, for `check` to report.
        """
        table = self.expand(config)
        sizes = self.sizes(config)
        by_parameter = dict(shapes)
        for whole, names in self.parts(config).items():
            rows = {name: sizes[table[name].axes[0]] for name in names}
            if whole in shapes and sum(rows.values()) == shapes[whole][0]:
                rest = by_parameter.pop(whole)[1:]
                by_parameter |= {name: (n, *rest) for name, n in rows.items()}
        return by_parameter

    def check(self, config: Config, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Compare a checkpoint's headers with the table: every tensor claimed once, every shape.

        Raises:
            SetupError: listing the differences. No weight has been read by then.
        """
        problems = list(self._differences(config, self.unfused(config, shapes)))
        if problems:
            raise SetupError(
                f"{where}: the checkpoint does not fit the adapter for "
                f"{'/'.join(self.model_types)}: {listed(problems)}."
            )

    def uncovered(self, config: Config) -> Iterator[str]:
        """Yield the settings of a config under which the table does not hold, each by its key."""
        for key, values in self.refuses.items():
            if config.get(key) in values:
                yield f"{key} = {config[key]!r} is not covered by this table"
        for key, allowed in self.requires.items():
            values = allowed if isinstance(allowed, tuple) else (allowed,)
            found = config.get(key)
            if found is not None and found not in values:
                only = " or ".join(map(repr, values))
                yield f"{key} = {found!r} is not covered by this table, which holds for {only}"
        for kind, share in _rotary_shares(config):
            if share != 1.0 and kind not in WHOLE_HEADS and not self.partial_rotary:
                yield (
                    f"partial_rotary_factor = {share!r} with rotary tables of type {kind} is not "
                    "covered: attention of this model turns whole heads"
                )
        if config.get(PER_LAYER_KEY):
            yield (
                f"{PER_LAYER_KEY} gives single layers settings of their own; a table has the same "
                "settings in every layer"
            )

    def _differences(self, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        table = self.expand(config)
        sizes = self.sizes(config)
        tied = bool(config.get("tie_word_embeddings", False))
        yield from self.uncovered(config)
        for name, param in table.items():
            expected = tuple(sizes[axis] for axis in param.axes)
            may_be_absent = param.optional or (param.tied and tied)
            if name not in shapes:
                if not may_be_absent:
                    yield f"{name} is missing (expected {list(expected)})"
            elif tuple(shapes[name]) != expected:
                yield f"{name} has shape {list(shapes[name])}, expected {list(expected)}"
        unknown: dict[str, list[str]] = {}
        for name in shapes:
            if name not in table:
                unknown.setdefault(_LAYER_NUMBER.sub(LAYER, name), []).append(name)
        for number, (template, names) in enumerate(unknown.items()):
            of_one = len(names) == 1
            name, known = (names[0], table) if of_one else (template, self.params)
            # Looking for the nearest name takes long, and only the first problems are shown.
            near = suggest(name, known) if number < SHOWN_PROBLEMS else ""
            yield f"{name} is not in the table{bias_hint(name, known) or f'.{near}'}"


_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def bias_hint(name: str, params: Collection[str]) -> str:
    """Return where to name a bias whose weight a table has, as the end of a sentence; else
    nothing."""
    weight = f"{name.removesuffix('bias')}weight"
    if not name.endswith(".bias") or weight not in params:
        return ""
    return (
        "; a projection with a bias belongs in `biases`, or in `optional_biases` where the config "
        "switches it"
    )
