"""OLMo 2: its norms are on what attention and MLP write, and on all queries and all keys."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter, Config


def defaults(config: Config) -> Config:
    """Return what Olmo2Config takes for missing keys."""
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


OLMO2 = rope_decoder(
    ("olmo2",),
    optional_biases=("q", "k", "v", "o"),  # `attention_bias` switches them
    # Attention and MLP read the stream as it is; only the head reads it after a norm.
    attention_norm="",
    mlp_norm="",
    all_heads_norms=("q_norm", "k_norm"),
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    defaults=defaults,
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [OLMO2]
