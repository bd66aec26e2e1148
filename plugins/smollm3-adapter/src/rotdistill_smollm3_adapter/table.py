"""SmolLM3: as Llama, with layers that do not turn queries and keys by position."""

from __future__ import annotations

from rotdistill_core import hookimpl
from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter, Config

FULL, SLIDING = "full_attention", "sliding_attention"


def defaults(config: Config) -> Config:
    """Return what SmolLM3Config takes for missing keys.

    Per-layer lists are written out, so that each entry follows its layer in a cut.
    """
    interval = int(config.get("no_rope_layer_interval") or 4)
    depth = int(config["num_hidden_layers"])
    turns = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(depth)]
    has_window = config.get("use_sliding_window") and config.get("sliding_window") is not None
    return {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "no_rope_layers": turns,
        "layer_types": [SLIDING if has_window and not turn else FULL for turn in turns[:depth]],
    }


SMOLLM3 = rope_decoder(
    ("smollm3",),
    # `attention_bias` and `mlp_bias` of the config switch them.
    optional_biases=("q", "k", "v", "o", "gate", "up", "down"),
    defaults=defaults,
)


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [SMOLLM3]
