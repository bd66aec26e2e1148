"""The kit names the setting that a table gets wrong, and lets what is computed or refused pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.architecture.rope_decoder import ATTENTION, rope_decoder
from rotdistill_core.architecture.table import Adapter, Config
from rotdistill_core.checkpoint import weights as weights_module
from rotdistill_core.checkpoint.headers import read_config
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import (
    ADAPTER_CHECKS,
    a_cut_computes_what_transformers_computes_without_the_layers,
    every_setting_of_the_config_is_computed_or_refused,
    pico_folder,
)
from rotdistill_core.testing.config_checks import other_settings

GRANITE, GEMMA3, PHI3 = (adapter_for(name) for name in ("granite", "gemma3_text", "phi3"))
ALL_BIASES = ("q", "k", "v", "o", "gate", "up", "down")
BARE_GRANITE = rope_decoder(("granite",))
# Other values than those that a published model has are wrong as well.
WITH_BIASES = rope_decoder(
    ("granite",), optional_biases=ALL_BIASES, refuses={"logits_scaling": (8.0,)}
)
MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
WITH_KEY_GAUGE = replace(
    PHI3,
    params={
        name: replace(param, gauge={"q": "key.{i}*", "k": "key.{i}"}[name[len(ATTENTION)]])
        if name in (f"{ATTENTION}q_proj.weight", f"{ATTENTION}k_proj.weight")
        else param
        for name, param in PHI3.params.items()
    },
)


def slow(values: tuple[Adapter, Sequence[str]]) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def folder_of(root: Path, table: Adapter) -> Path:
    sizes = {"head_dim": 8, "sliding_window": 5} if table.model_types == ("gemma3_text",) else {}
    return pico_folder(root / "model", table.model_types[0], **sizes)


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        (BARE_GRANITE, MULTIPLIERS),
        *map(
            slow,
            [
                (WITH_BIASES, MULTIPLIERS),
                (
                    replace(
                        GRANITE,
                        residual_multiplier_key="",
                        embedding_multiplier_key="logits_scaling",
                    ),
                    ["residual_multiplier", "embedding_multiplier"],
                ),
                (replace(GEMMA3, softcap_key=""), ["final_logit_softcapping"]),
                (replace(GEMMA3, refuses={}), ["use_bidirectional_attention"]),
                (WITH_KEY_GAUGE, ["rope_parameters"]),
            ],
        ),
    ],
    ids=lambda value: value.model_types[0] if isinstance(value, Adapter) else str(value),
)
def test_a_setting_that_is_computed_wrongly_is_named(
    tmp_path: Path, table: Adapter, keys: Sequence[str]
) -> None:
    with pytest.raises(AssertionError) as caught:
        every_setting_of_the_config_is_computed_or_refused(table, folder_of(tmp_path, table))
    named = [line.split('"')[1] for line in str(caught.value).splitlines() if "config key" in line]
    assert set(keys) <= set(named)
    for key in set(keys) & {*MULTIPLIERS}:
        assert f'; name it in the table (`{key}_key="{key}"`), or state in' in str(caught.value)
    assert "attention_multiplier" not in named
    assert not {"attention_bias", "mlp_bias", "hidden_act", "rms_norm_eps"} & set(named)


@pytest.mark.parametrize(
    "table",
    [
        replace(BARE_GRANITE, requires=dict.fromkeys(MULTIPLIERS, 1.0)),
        replace(GRANITE, embedding_multiplier_key="", requires={"embedding_multiplier": 1.0}),
        replace(GEMMA3, softcap_key="", requires={"final_logit_softcapping": None}),
        replace(GEMMA3, refuses={}, requires={"use_bidirectional_attention": False}),
    ],
    ids=lambda table: " ".join(table.requires),
)
def test_a_setting_that_is_refused_by_name_is_right(tmp_path: Path, table: Adapter) -> None:
    every_setting_of_the_config_is_computed_or_refused(table, folder_of(tmp_path, table))


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("granite", {*MULTIPLIERS, "attention_multiplier", "attention_bias", "mlp_bias"}),
        ("smollm3", {"use_sliding_window", "sliding_window", "attention_bias"}),
        ("qwen2", {"use_sliding_window", "max_window_layers", "tie_word_embeddings"}),
        ("olmo", {"clip_qkv", "attention_bias"}),
        ("cohere", {"logit_scale", "use_qk_norm"}),
        ("stablelm", {"use_parallel_residual", "qk_layernorm", "use_qkv_bias"}),
    ],
)
def test_neutral_settings_are_found_in_the_config_class(
    tmp_path: Path, model_type: str, expected: set[str]
) -> None:
    settings = read_config(pico_folder(tmp_path / "model", model_type))
    changes = other_settings(settings)
    assert expected <= set(changes)
    assert not {"hidden_size", "vocab_size", "eos_token_id", "return_dict"} & set(changes)
    assert all(changes[key] != settings.get(key) for key in changes)


def only_the_depth(config: Config, depth_key: str, keep: Sequence[int]) -> Mapping[str, Any]:
    return {**config, depth_key: len(keep)}


def only_layer_types(config: Config, depth_key: str, keep: Sequence[int]) -> Mapping[str, Any]:
    types = config.get("layer_types")
    cut = {"layer_types": [types[i] for i in keep]} if types else {}
    return {**config, **cut, depth_key: len(keep)}


@pytest.mark.parametrize(
    ("model_type", "cut"),
    [("qwen2", only_layer_types), ("smollm3", only_layer_types), ("llama", None)],
)
def test_a_cut_that_moves_what_belongs_to_a_layer_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, cut: Any
) -> None:
    table = adapter_for(model_type)
    folder = pico_folder(tmp_path / "model", model_type)
    a_cut_computes_what_transformers_computes_without_the_layers(table, folder)
    if cut is None:
        # Nothing in a llama config belongs to a layer, so the plain cut is right.
        monkeypatch.setattr(weights_module, "cut_config", only_the_depth)
        a_cut_computes_what_transformers_computes_without_the_layers(table, folder)
        return
    monkeypatch.setattr(weights_module, "cut_config", cut)
    with pytest.raises(AssertionError, match=r"of 7 layers \[0, 2, 3, 6\] were kept, .* differ by"):
        a_cut_computes_what_transformers_computes_without_the_layers(table, folder)


def test_the_kit_has_both_checks() -> None:
    assert every_setting_of_the_config_is_computed_or_refused in ADAPTER_CHECKS
    assert a_cut_computes_what_transformers_computes_without_the_layers in ADAPTER_CHECKS
