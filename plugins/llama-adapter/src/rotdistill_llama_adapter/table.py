"""Llama, SmolLM2 and other checkpoints of model type `llama`."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter

LLAMA = rope_decoder(
    ("llama",),
    optional_biases=(
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    ),  # attention_bias and mlp_bias switch them
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [LLAMA]
