"""Logits are those of plain transformers on the same folder, for every mix of settings.

Each model type is tried with every type of rotary tables; windows, a tied head, biases, the number
of key/value heads and their width change from one to the next. With the environment variable
`EVERY_SETTING`, every one is tried with every other: about ten minutes on one core.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    EXACT,
    logits,
    max_difference,
    pico_folder,
    pico_samples,
    plain_transformers,
    scramble,
)

SAME = 1e-5
"""Largest difference of a logit, relative to the largest logit, in float32."""
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.25,
}
SWITCHES: Mapping[str, tuple[dict[str, Any], ...]] = {
    "llama": ({}, {"attention_bias": True}, {"mlp_bias": True, "hidden_act": "gelu"}),
    "qwen2": ({}, {**WINDOW, "max_window_layers": 1}, {**WINDOW, "layer_types": [SLIDING, FULL]}),
    "qwen3": ({}, {"attention_bias": True}, {**WINDOW, "max_window_layers": 1}),
    "phi3": ({}, {"sliding_window": 5}, {"hidden_act": "gelu_pytorch_tanh"}),
    "olmo2": ({}, {"attention_bias": True}, {"rms_norm_eps": 0.1}),
    "granite": ({}, MULTIPLIERS, {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
    "smollm3": (
        {"no_rope_layers": [1, 0]},
        {**WINDOW, "no_rope_layers": [0, 1], "attention_bias": True},
        {"no_rope_layer_interval": 1, "mlp_bias": True},
    ),
    "gemma3_text": (
        {"sliding_window": 5},
        {"sliding_window": 5, "layer_types": [SLIDING, FULL], "attention_bias": True},
        {"final_logit_softcapping": 3.0, "layer_types": [FULL, FULL], "query_pre_attn_scalar": 7},
    ),
}
"""Model type -> what its config class can switch."""
WIDTHS = (8, 12, 6)
GROUPS = (2, 1, 4)
BORDER = 16


def rope(kind: str, width: int) -> dict[str, Any]:
    """Return `rope_parameters` of a kind, whose tables change at `BORDER` if they do at all."""
    original = {"factor": 4.0, "original_max_position_embeddings": BORDER}
    short = [1.0 + 0.1 * k for k in range(width // 2)]
    more: dict[str, dict[str, Any]] = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": original,
        "longrope": {**original, "short_factor": short, "long_factor": [3.0 * f for f in short]},
        "llama3": {**original, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "proportional": {"partial_rotary_factor": 0.5},
    }
    return {"rope_type": kind, "rope_theta": 500.0, **more.get(kind, {})}


def settings_of(
    model_type: str, kind: str, width: int, groups: int, tied: bool, switches: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the changes of the pico config of one model."""
    tables: dict[str, Any] = rope(kind, width)
    if model_type == "gemma3_text":
        tables = {FULL: tables, SLIDING: rope("default", width)}
    return {
        "head_dim": width,
        "num_key_value_heads": groups,
        "tie_word_embeddings": tied,
        "max_position_embeddings": BORDER,
        "rope_parameters": tables,
        **({"original_max_position_embeddings": BORDER} if model_type == "phi3" else {}),
        **switches,
    }


KINDS = ("default", *sorted(ROPE_INIT_FUNCTIONS))


def kinds_of(model_type: str) -> tuple[str, ...]:
    """Return the types of rotary tables that a model's config class takes."""
    return ("default", "longrope") if model_type == "phi3" else KINDS


def widths_of(model_type: str) -> tuple[int, ...]:
    """Return widths of a head; phi3 takes factors for hidden_size / num_attention_heads only."""
    return (8,) if model_type == "phi3" else WIDTHS


def a_mix() -> Iterator[Any]:
    """Yield models that have every setting of their type at least once."""
    for model_type, switches in SWITCHES.items():
        for number, kind in enumerate(("default", *KINDS)):
            if kind not in kinds_of(model_type):
                continue
            widths = widths_of(model_type)
            changes = settings_of(
                model_type,
                kind,
                widths[number % len(widths)],
                GROUPS[number % len(GROUPS)],
                number % 2 == 0,
                switches[number % len(switches)],
            )
            marks = [] if number == 1 else [pytest.mark.slow]
            yield pytest.param(model_type, changes, id=f"{model_type} {kind}", marks=marks)


def every_setting() -> Iterator[Any]:
    """Yield every setting of a model type with every other."""
    for model_type, switches in SWITCHES.items():
        free = (widths_of(model_type), GROUPS, (True, False), range(len(switches)))
        for kind, width, groups, tied, switch in product(kinds_of(model_type), *free):
            changes = settings_of(model_type, kind, width, groups, tied, switches[switch])
            name = f"{model_type} {kind} {width} {groups} {'tied' if tied else 'apart'} {switch}"
            yield pytest.param(model_type, changes, id=name)


MODELS = list(every_setting() if os.environ.get("EVERY_SETTING") else a_mix())


def texts_on_both_sides() -> PackedTexts:
    """Return texts that share a prefix, and a plain one, on both sides of `BORDER`."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, 64, (6, 30), generator=generator).tolist()
    shared = tokens[0][:5]
    texts = [
        Text(f"t{k}", "en", "fit", (*shared, *tokens[k][5:length]), 6)
        for k, length in enumerate((10, 16, 17, 23, 30))
    ]
    return PackedTexts((*texts, Text("plain", "en", "fit", tuple(tokens[5][:20]), 1, True)), 5)


@pytest.mark.parametrize(("model_type", "changes"), MODELS)
def test_logits_are_those_of_plain_transformers(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    folder = pico_folder(tmp_path / "model", model_type, **changes)
    model = open_model(ModelRef(model=str(folder)))
    layout = texts_on_both_sides()
    # Rows of the shared prefix have the tables of the first text, and are compared with it.
    expected = plain_transformers(model.adapter, folder, layout, torch.float32)[1]
    found = logits(model.weights, layout, torch.float32)
    assert max_difference(found, expected) <= SAME * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "granite", "smollm3", "qwen2"])
def test_everything_that_a_table_leaves_free_is_free_under_every_rotary_table(
    tmp_path: Path, model_type: str, kind: str
) -> None:
    folder = pico_folder(tmp_path / "model", model_type, rope_parameters=rope(kind, 8))
    weights = open_model(ModelRef(model=str(folder))).weights
    layout = pico_samples(texts=3).layout
    folded = scramble(weights, invertible=True)[0]
    assert max_difference(logits(folded, layout), logits(weights, layout)) <= 10 * EXACT
