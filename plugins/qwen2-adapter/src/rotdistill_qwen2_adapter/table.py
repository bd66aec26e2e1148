"""Qwen2 and Qwen2.5: as Llama, with biases on q, k and v."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter, Config


def defaults(_: Config) -> Config:
    """Return what Qwen2Config takes for missing keys."""
    return {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}


QWEN2 = rope_decoder(("qwen2",), biases=("q", "k", "v"), defaults=defaults)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [QWEN2]
