"""Configs under which the same weights mean something else are told apart from harmless ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rotdistill_core.checkpoint.config_differences import config_differences, listed
from rotdistill_core.errors import SetupError
from rotdistill_core.testing import PICO

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONGROPE = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}


def differing(model_type: str, one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    configs = [{**PICO, "model_type": model_type, **changes} for changes in (one, two)]
    before = copy.deepcopy(configs)
    found = config_differences(*configs, "the ingredient")
    assert configs == before
    return [difference.key for difference in found]


@pytest.mark.parametrize(
    ("model_type", "changes", "keys"),
    [
        ("llama", {"rope_theta": 1e6}, ["rope_parameters.rope_theta"]),
        ("llama", {"rms_norm_eps": 0.1}, ["rms_norm_eps"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act"]),
        ("llama", {"attention_bias": True}, ["attention_bias"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias"]),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            ["rope_parameters.factor", "rope_parameters.rope_type"],
        ),
        ("llama", {"partial_rotary_factor": 0.5}, ["rope_parameters.partial_rotary_factor"]),
        ("llama", {"a_key_of_tomorrow": 3}, ["a_key_of_tomorrow"]),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ("phi3", {"sliding_window": 16}, ["sliding_window"]),
        ("gemma3_text", {"query_pre_attn_scalar": 8}, ["query_pre_attn_scalar"]),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
        ("gemma3_text", {"sliding_window": 16}, ["sliding_window"]),
        (
            "gemma3_text",
            {"rope_local_base_freq": 5e3},
            ["rope_parameters.sliding_attention.rope_theta"],
        ),
    ],
)
def test_a_key_that_changes_logits_is_named(
    model_type: str, changes: dict[str, Any], keys: list[str]
) -> None:
    assert differing(model_type, changes, {}) == keys
    assert differing(model_type, {}, changes) == keys


@pytest.mark.parametrize(
    ("model_type", "one", "two", "keys"),
    [
        # These types look at the length that a model was trained for; the others do not.
        ("llama", DYNAMIC, {**DYNAMIC, "max_position_embeddings": 64}, ["max_position_embeddings"]),
        (
            "phi3",
            {**LONGROPE, "original_max_position_embeddings": 64},
            LONGROPE,
            [
                "original_max_position_embeddings",
                "rope_parameters.original_max_position_embeddings",
            ],
        ),
    ],
)
def test_a_length_counts_where_the_rope_looks_at_it(
    model_type: str, one: dict[str, Any], two: dict[str, Any], keys: list[str]
) -> None:
    assert differing(model_type, one, two) == keys


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 10000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000, "factor": 1.0}},
        {"rms_norm_eps": 9.999999974752427e-07},  # as float32 has it
        {"max_position_embeddings": 4096},
        {"attention_dropout": 0.1, "use_cache": False, "initializer_range": 0.1},
        {"eos_token_id": [2, 3], "pad_token_id": None},
        {"dtype": "float16", "torch_dtype": "bfloat16", "transformers_version": "4.1"},
        {"architectures": ["LlamaForCausalLM"], "_name_or_path": "elsewhere"},
        {"partial_rotary_factor": 1.0},
        {"tie_word_embeddings": True},
        {"rope_scaling": None, "a_key_of_tomorrow": None},
    ],
)
def test_harmless_keys_and_written_defaults_are_no_difference(changes: dict[str, Any]) -> None:
    assert differing("llama", changes, {}) == []


def test_window_keys_without_a_sliding_layer_are_harmless() -> None:
    assert differing("qwen2", {"sliding_window": 16, "max_window_layers": 1}, {}) == []


def test_differences_are_listed_with_both_values() -> None:
    one, two = ({**PICO, "model_type": "llama", "rms_norm_eps": eps} for eps in (0.1, 1e-6))
    text = listed(config_differences(one, two, "x"), "the student")
    assert text == "rms_norm_eps is 0.1, and 1e-06 in the student"


def test_a_config_that_its_class_refuses_names_its_owner() -> None:
    broken = {**PICO, "model_type": "llama", "hidden_size": "wide"}
    with pytest.raises(SetupError, match="the ingredient: transformers does not take its config"):
        config_differences(broken, broken, "the ingredient")
