"""OLMo 2: no norm in front of attention and MLP, but on what they write; one norm over all queries of a layer, one over all keys."""

from __future__ import annotations

from dataclasses import replace

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter, Config, Param, Site

ATTENTION = "model.layers.{i}.self_attn."


def defaults(config: Config) -> Config:
    """Return what Olmo2Config takes for missing keys."""
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


LLAMA = rope_decoder(
    ("olmo2",),
    optional_biases=("q", "k", "v", "o"),  # attention_bias switches them
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    defaults=defaults,
)


def table() -> Adapter:
    """Return the Llama table without the norms in front, whose readers see the stream as it is, and with the norms of queries and keys."""
    params = {
        name: replace(
            p,
            gain=p.gain if name == LLAMA.head else None,
            gauge="" if p.gauge.startswith("key") else p.gauge,
        )
        for name, p in LLAMA.params.items()
        if "input_layernorm" not in name
    }
    params |= {
        f"{ATTENTION}{norm}.weight": Param((space,), is_gain=True)
        for norm, space in (("q_norm", "q.{i}"), ("k_norm", "kv.{i}"))
    }
    return replace(LLAMA, params=params, sites={**LLAMA.sites, "mid": Site("mlp", "input")})


OLMO2 = table()


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [OLMO2]
