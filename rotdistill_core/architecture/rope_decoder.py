"""The table of Llama-shaped decoders, of which most architectures are variations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rotdistill_core.architecture.table import Adapter, Config, HeadLayout, Param, Site

GAUGES = {
    "q": "key.{i}*",
    "k": "key.{i}",
    "v": "value.{i}",
    "o": "value.{i}*",
    "up": "up.{i}",
    "down": "up.{i}*",
}
"""What is free inside a Llama-shaped layer, exactly: `value` any invertible matrix per key/value head, `key` one complex factor per
key/value head and rotary pair (j, j + width / 2), `up` one factor per neuron."""


def rope_decoder(
    model_types: tuple[str, ...],
    biases: tuple[str, ...] = (),
    optional_biases: tuple[str, ...] = (),
    mlp_norm: str = "post_attention_layernorm",
    head_norms: tuple[str, ...] = (),
    output_norms: tuple[str, ...] = (),
    **fields: Any,
) -> Adapter:
    """Return the table of a Llama-shaped decoder: RMSNorm, rotary attention with key/value groups, SwiGLU.

    `biases` and `optional_biases` name the projections (`q`, `o`, `down`, ...) that carry a bias, always or by config.
    `mlp_norm` is the norm in front of the MLP, `head_norms` are norms inside attention whose one gain all heads share,
    `output_norms` those on what attention and MLP write, in this order. `fields` are further fields of `Adapter`.
    """
    layer, attn, mlp = "model.layers.{i}.", "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    before, between = f"{layer}input_layernorm.weight", f"{layer}{mlp_norm}.weight"
    weights = {
        "q": (attn + "q_proj", ("q.{i}", "residual"), before), "k": (attn + "k_proj", ("kv.{i}", "residual"), before),
        "v": (attn + "v_proj", ("kv.{i}", "residual"), before), "o": (attn + "o_proj", ("residual", "q.{i}"), None),
        "gate": (mlp + "gate_proj", ("neurons.{i}", "residual"), between),
        "up": (mlp + "up_proj", ("neurons.{i}", "residual"), between),
        "down": (mlp + "down_proj", ("residual", "neurons.{i}"), None),
    }  # fmt: skip
    gauges = {
        key: gauge for key, gauge in GAUGES.items() if not (head_norms and gauge.startswith("key"))
    }
    params = {"model.embed_tokens.weight": Param(("vocab", "residual"))}
    params |= {
        f"{name}.weight": Param(axes, gain, gauge=gauges.get(key, ""))
        for key, (name, axes, gain) in weights.items()
    }
    for key in (*biases, *optional_biases):
        name, axes, _ = weights[key]
        params[f"{name}.bias"] = Param(
            axes[:1], optional=key in optional_biases, gauge=gauges.get(key, "")
        )
    norms = (
        before,
        between,
        *(f"{layer}{norm}.weight" for norm in output_norms),
        "model.norm.weight",
    )
    params |= {name: Param(("residual",), is_gain=True) for name in norms}
    params |= {
        f"{attn}{norm}.weight": Param(("head_dim.{i}",), is_gain=True) for norm in head_norms
    }
    params["lm_head.weight"] = Param(
        ("vocab", "residual"), "model.norm.weight", tied="model.embed_tokens.weight"
    )
    sites = {
        "mid": Site(mlp_norm, "input"), "mlp": Site(output_norms[-1] if output_norms else "mlp.down_proj", "output"),
        "neurons": Site("mlp.down_proj", "input"), "heads": Site("self_attn.o_proj", "input"),
    }  # fmt: skip
    # Behind a norm the stream is no linear function of neurons and heads, so nothing can be refitted to it.
    writers = (
        {}
        if output_norms
        else {"neurons": mlp + "down_proj.weight", "heads": attn + "o_proj.weight"}
    )
    return Adapter(model_types, params, _dims, sites, writers, rope_heads, **fields)


def rope_heads(config: Config) -> HeadLayout:
    """Return the heads of a Llama-shaped config."""
    query = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // query)
    return HeadLayout(query, int(config.get("num_key_value_heads") or query), width)


def _dims(config: Config) -> Mapping[str, int]:
    heads = rope_heads(config)
    return {
        "residual": int(config["hidden_size"]), "vocab": int(config["vocab_size"]),
        "neurons.{i}": int(config["intermediate_size"]), "q.{i}": heads.query * heads.width, "kv.{i}": heads.groups * heads.width,
        "head_dim.{i}": heads.width,
    }  # fmt: skip
