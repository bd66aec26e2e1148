"""Granite: as Llama, with multipliers of embeddings, attention, branches and logits."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter, Config


def defaults(config: Config) -> Config:
    """Return what GraniteConfig takes for missing keys."""
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


GRANITE = rope_decoder(
    ("granite",),
    # `attention_bias` and `mlp_bias` of the config switch them.
    optional_biases=("q", "k", "v", "o", "gate", "up", "down"),
    defaults=defaults,
    # `attention_multiplier` acts inside attention, which transformers computes.
    embedding_multiplier_key="embedding_multiplier",
    residual_multiplier_key="residual_multiplier",
    logits_scaling_key="logits_scaling",
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [GRANITE]
