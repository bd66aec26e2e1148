"""Llama, SmolLM2 and other checkpoints of model type `llama`."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter

LLAMA = rope_decoder(
    ("llama",),
    # `attention_bias` and `mlp_bias` of the config switch them.
    optional_biases=("q", "k", "v", "o", "gate", "up", "down"),
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [LLAMA]
