"""OLMo 2: its norms are on what attention and MLP write, and on all queries and all keys."""

from __future__ import annotations

from dataclasses import replace

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import ATTENTION, rope_decoder
from rotdistill_core.architecture.table import Adapter, Config, Param, Site


def defaults(config: Config) -> Config:
    """Return what Olmo2Config takes for missing keys."""
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def table() -> Adapter:
    """Return the Llama table with the norms of OLMo 2."""
    llama_shaped = rope_decoder(
        ("olmo2",),
        optional_biases=("q", "k", "v", "o"),  # `attention_bias` switches them
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        defaults=defaults,
    )
    params: dict[str, Param] = {}
    for name, param in llama_shaped.params.items():
        if "input_layernorm" in name:
            continue
        # Attention and MLP read the stream as it is; only the head reads it after a norm. The
        # norms on queries and keys take the complex factors of the key gauge out again.
        gain = param.gain if name == llama_shaped.head else None
        gauge = "" if param.gauge.startswith("key") else param.gauge
        params[name] = replace(param, gain=gain, gauge=gauge)
    # One RMS over all heads does not depend on their order, so these gains move with the heads.
    params[f"{ATTENTION}q_norm.weight"] = Param(("q.{i}",), is_gain=True)
    params[f"{ATTENTION}k_norm.weight"] = Param(("kv.{i}",), is_gain=True)
    sites = {**llama_shaped.sites, "mid": Site("mlp", "input")}
    return replace(llama_shaped, params=params, sites=sites)


OLMO2 = table()


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [OLMO2]
