"""Qwen3: as Llama, with a norm on every query and key head."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter, Config


def defaults(config: Config) -> Config:
    """Return what Qwen3Config takes for missing keys.

    Layer types are written out, so that each follows its layer in a cut.
    """
    depth = config["num_hidden_layers"]
    first_sliding = depth
    if config.get("use_sliding_window"):
        first_sliding = int(config.get("max_window_layers", 28))
    types = ["sliding_attention" if i >= first_sliding else "full_attention" for i in range(depth)]
    return {
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "layer_types": types,
    }


QWEN3 = rope_decoder(
    ("qwen3",),
    optional_biases=("q", "k", "v", "o"),  # `attention_bias` switches them
    head_norms=("q_norm", "k_norm"),
    defaults=defaults,
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [QWEN3]
