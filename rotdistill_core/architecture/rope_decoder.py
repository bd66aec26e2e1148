"""The table of Llama-shaped decoders, of which most architectures are variations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rotdistill_core.architecture.spaces import VOCAB
from rotdistill_core.architecture.table import Adapter, Config, HeadLayout, Param, Site

LAYER = "model.layers.{i}."
ATTENTION = f"{LAYER}self_attn."
MLP = f"{LAYER}mlp."
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"

GAUGES = {
    "q": "key.{i}*",
    "k": "key.{i}",
    "v": "value.{i}",
    "o": "value.{i}*",
    "up": "up.{i}",
    "down": "up.{i}*",
}
"""Projection -> the gauge that is free in it, exactly; a `*` marks the consumer.

`value`: any invertible matrix for each key/value head. `key`: one complex factor for each key/value
head and rotary pair (j, j + width / 2). `up`: one factor for each neuron.
"""


class _Projection(NamedTuple):
    """A linear layer: its module, the spaces of its weight, and the norm whose gain it absorbs."""

    module: str
    axes: tuple[str, str]
    gain: str | None


def rope_decoder(  # noqa: PLR0913  a difference each
    model_types: tuple[str, ...],
    biases: tuple[str, ...] = (),
    optional_biases: tuple[str, ...] = (),
    attention_norm: str = "input_layernorm",
    mlp_norm: str = "post_attention_layernorm",
    head_norms: tuple[str, ...] = (),
    all_heads_norms: tuple[str, ...] = (),
    output_norms: tuple[str, ...] = (),
    key_gauge: bool = True,
    **fields: Any,
) -> Adapter:
    """Return the table of a Llama-shaped decoder: RMSNorm, rotary grouped attention, SwiGLU.

    Args:
        model_types: values of `model_type` in config.json.
        biases: projections (`q`, `k`, `v`, `o`, `gate`, `up`, `down`) that always have a bias.
        optional_biases: projections whose bias the config switches.
        attention_norm: the norm before attention; empty where attention reads the stream itself.
        mlp_norm: the norm before the MLP; empty where the MLP reads the stream itself.
        head_norms: norms inside attention, of queries and keys; all heads share one gain.
        all_heads_norms: norms inside attention, of all queries and of all keys, in this order.
        output_norms: norms on what attention and the MLP write, in this order.
        key_gauge: whether the gauge between query and key is free: coordinates j and j + width / 2
            of every head are turned as a pair. Norms on queries and keys take it away.
        fields: further fields of `Adapter`.
    """
    attention_gain, mlp_gain = (
        f"{LAYER}{norm}.weight" if norm else None for norm in (attention_norm, mlp_norm)
    )
    projections = _projections(attention_gain, mlp_gain)
    # A norm on queries and keys takes their complex factors out again, so that gauge is gone.
    has_key_gauge = key_gauge and not (head_norms or all_heads_norms)
    gauges = {
        key: gauge for key, gauge in GAUGES.items() if has_key_gauge or not gauge.startswith("key")
    }
    params = {EMBEDDING: Param((VOCAB, "residual"))}
    for key, projection in projections.items():
        params[f"{projection.module}.weight"] = Param(
            projection.axes, projection.gain, gauge=gauges.get(key, "")
        )
    for key in (*biases, *optional_biases):
        params[f"{projections[key].module}.bias"] = Param(
            projections[key].axes[:1], optional=key in optional_biases, gauge=gauges.get(key, "")
        )
    outputs = [f"{LAYER}{norm}.weight" for norm in output_norms]
    for name in (attention_gain, mlp_gain, *outputs, FINAL_NORM):
        if name:
            params[name] = Param(("residual",), is_gain=True)
    for norm in head_norms:
        params[f"{ATTENTION}{norm}.weight"] = Param(("head_dim.{i}",), is_gain=True)
    # One RMS over all heads does not depend on their order, so these gains move with the heads.
    for norm, space in zip(all_heads_norms, ("q.{i}", "kv.{i}"), strict=False):
        params[f"{ATTENTION}{norm}.weight"] = Param((space,), is_gain=True)
    params["lm_head.weight"] = Param((VOCAB, "residual"), FINAL_NORM, tied=EMBEDDING)
    # After a norm the stream is no linear function of neurons and heads: nothing can be refitted.
    writers = {
        "neurons": f"{projections['down'].module}.weight",
        "heads": f"{projections['o'].module}.weight",
    }
    return Adapter(
        model_types=model_types,
        params=params,
        dims=_sizes,
        sites=_sites(mlp_norm, output_norms),
        writers={} if output_norms else writers,
        heads=rope_heads,
        **fields,
    )


def rope_heads(config: Config) -> HeadLayout:
    """Return the heads of a Llama-shaped config."""
    query = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // query)
    return HeadLayout(query, int(config.get("num_key_value_heads") or query), width)


def _projections(attention_gain: str | None, mlp_gain: str | None) -> dict[str, _Projection]:
    return {
        "q": _Projection(f"{ATTENTION}q_proj", ("q.{i}", "residual"), attention_gain),
        "k": _Projection(f"{ATTENTION}k_proj", ("kv.{i}", "residual"), attention_gain),
        "v": _Projection(f"{ATTENTION}v_proj", ("kv.{i}", "residual"), attention_gain),
        "o": _Projection(f"{ATTENTION}o_proj", ("residual", "q.{i}"), None),
        "gate": _Projection(f"{MLP}gate_proj", ("neurons.{i}", "residual"), mlp_gain),
        "up": _Projection(f"{MLP}up_proj", ("neurons.{i}", "residual"), mlp_gain),
        "down": _Projection(f"{MLP}down_proj", ("residual", "neurons.{i}"), None),
    }


def _sites(mlp_norm: str, output_norms: Sequence[str]) -> dict[str, Site]:
    """Return where the mid-block stream, the MLP's output, neurons and heads are observed."""
    return {
        "mid": Site(mlp_norm or "mlp", "input"),
        "mlp": Site(output_norms[-1] if output_norms else "mlp.down_proj", "output"),
        "neurons": Site("mlp.down_proj", "input"),
        "heads": Site("self_attn.o_proj", "input"),
    }


def _sizes(config: Config) -> Mapping[str, int]:
    """Return the size of each space."""
    heads = rope_heads(config)
    return {
        "residual": int(config["hidden_size"]),
        VOCAB: int(config["vocab_size"]),
        "neurons.{i}": int(config["intermediate_size"]),
        "q.{i}": heads.query * heads.width,
        "kv.{i}": heads.groups * heads.width,
        "head_dim.{i}": heads.width,
    }
