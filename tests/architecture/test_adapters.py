"""Every shipped table passes the conformance kit, on each variant of its architecture's config."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.plugin.registry import SHIPPED_MODEL_TYPES, adapter_for
from rotdistill_core.testing import pico_folder
from rotdistill_core.testing.adapter_checks import TABLE_CHECKS

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
MIXED_LAYERS = ["sliding_attention", "full_attention"]

VARIANTS: Mapping[str, list[dict[str, Any]]] = {
    "llama": [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "attention_bias": True},
        {"mlp_bias": True, "head_dim": 12, "num_key_value_heads": 1},
    ],
    "qwen2": [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
        {
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ],
    "qwen3": [
        {"head_dim": 12, "intermediate_size": 56},
        {
            "head_dim": 6,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "num_key_value_heads": 1,
        },
        {
            "head_dim": 12,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ],
    "phi3": [
        {"head_dim": 12, "intermediate_size": 56, "tie_word_embeddings": False},
        {"intermediate_size": 40, "num_key_value_heads": 4},
    ],
    "olmo2": [
        {"head_dim": 12, "intermediate_size": 56},
        {"intermediate_size": 40, "attention_bias": True, "tie_word_embeddings": False},
    ],
    "granite": [
        {"intermediate_size": 56, "num_key_value_heads": 1},
        {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
        },
    ],
    "smollm3": [
        {"no_rope_layers": [1, 0], "attention_bias": True, "mlp_bias": True},
        {
            "tie_word_embeddings": False,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ],
    "gemma3_text": [
        {"head_dim": 12, "intermediate_size": 56, "sliding_window": 5},
        {
            "head_dim": 6,
            "layer_types": MIXED_LAYERS,
            "sliding_window": 5,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
        {
            "head_dim": 12,
            "layer_types": MIXED_LAYERS,
            "sliding_window": 5,
            "num_key_value_heads": 1,
            "final_logit_softcapping": 3.0,
        },
    ],
}
"""Model type -> changes of the pico config, one model each."""

CASES = [
    pytest.param(model_type, changes, id=f"{model_type} {' '.join(changes)}")
    for model_type, variants in VARIANTS.items()
    for changes in variants
]


def shipped_model_types() -> set[str]:
    """Return the model types that the plugins of this repository offer tables for."""
    projects = [tomllib.loads(path.read_text()) for path in PLUGINS.glob("*/pyproject.toml")]
    points = [project["project"].get("entry-points", {}) for project in projects]
    return {name for point in points for name in point.get("rotdistill.adapters", {})}


def test_every_shipped_adapter_is_checked_here() -> None:
    assert shipped_model_types() == set(VARIANTS)
    assert shipped_model_types() == set(SHIPPED_MODEL_TYPES)


@pytest.mark.parametrize("model_type", VARIANTS)
def test_an_adapter_is_found_under_its_model_types(model_type: str) -> None:
    assert model_type in adapter_for(model_type).model_types


# The tests of each adapter run the other checks of the kit: those of other settings, and of cuts.
@pytest.mark.parametrize("check", TABLE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_the_table_holds(
    tmp_path: Path,
    check: Callable[[Adapter, Path], None],
    model_type: str,
    changes: dict[str, Any],
) -> None:
    check(adapter_for(model_type), pico_folder(tmp_path / "model", model_type, **changes))
