"""Phi-3 and what shares its model type: as Llama, with q, k and v in one tensor, gate and up in another."""

from __future__ import annotations

from dataclasses import replace

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter, Config

LAYER = "model.layers.{i}."


def defaults(config: Config) -> Config:
    """Return what Phi3Config takes for missing keys."""
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


LLAMA = rope_decoder(
    ("phi3",),
    defaults=defaults,
    fused={
        f"{LAYER}self_attn.qkv_proj.weight": tuple(
            f"{LAYER}self_attn.{name}_proj.weight" for name in "qkv"
        ),
        f"{LAYER}mlp.gate_up_proj.weight": (
            f"{LAYER}mlp.gate_proj.weight",
            f"{LAYER}mlp.up_proj.weight",
        ),
    },
)
# With a partial rotary factor only some coordinates of a head turn, and the pairs of the key gauge are others: it is left out.
PHI3 = replace(
    LLAMA,
    params={
        name: replace(p, gauge="" if p.gauge.startswith("key") else p.gauge)
        for name, p in LLAMA.params.items()
    },
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [PHI3]
