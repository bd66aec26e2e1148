"""Llama, SmolLM2 and other checkpoints of model type `llama`."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter, Config


def defaults(_: Config) -> Config:
    """Return what LlamaConfig takes for missing keys."""
    return {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}


LLAMA = rope_decoder(
    ("llama",),
    defaults=defaults,
    # `attention_bias` and `mlp_bias` of the config switch them.
    optional_biases=("q", "k", "v", "o", "gate", "up", "down"),
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [LLAMA]
