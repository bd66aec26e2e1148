"""Phi-3 and the dense Phi-4: as Llama, with q, k, v in one tensor, and gate and up in another."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import ATTENTION, MLP, rope_decoder
from rotdistill_core.architecture.table import Adapter, Config


def defaults(config: Config) -> Config:
    """Return what Phi3Config takes for missing keys."""
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


PHI3 = rope_decoder(
    ("phi3",),
    # With a partial rotary factor (Phi-4-mini) only some coordinates of a head turn, and they pair
    # up differently. So the complex factors of the key gauge would not be exact.
    partial_rotary=True,
    key_gauge=False,
    defaults=defaults,
    fused={
        f"{ATTENTION}qkv_proj.weight": tuple(f"{ATTENTION}{x}_proj.weight" for x in "qkv"),
        f"{MLP}gate_up_proj.weight": (f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight"),
    },
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [PHI3]
