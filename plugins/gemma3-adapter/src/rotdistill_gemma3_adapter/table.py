"""The text decoder of Gemma 3: gains `1 + w`, and norms on heads and on what layers write."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter, Config


def defaults(config: Config) -> Config:
    """Return what Gemma3TextConfig takes for missing keys.

    Layer types are written out, so that each follows its layer in a cut.
    """
    period = config.get("sliding_window_pattern") or 6
    types = [
        "full_attention" if i % period == 0 else "sliding_attention"
        for i in range(1, int(config["num_hidden_layers"]) + 1)
    ]
    return {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "layer_types": types,
    }


GEMMA3 = rope_decoder(
    ("gemma3_text",),
    optional_biases=("q", "k", "v", "o"),  # `attention_bias` switches them
    mlp_norm="pre_feedforward_layernorm",
    head_norms=("q_norm", "k_norm"),
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    gain_offset=1.0,
    softcap_key="final_logit_softcapping",
    defaults=defaults,
    # An encoder; the layer-wise forward lets no row see a later one.
    refuses={"use_bidirectional_attention": (True,)},
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [GEMMA3]
