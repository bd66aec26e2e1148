"""Parity with transformers: what holds, what does not, and which cause is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights, open_folder
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.errors import SetupError
from rotdistill_core.forward.head import final_norm
from rotdistill_core.forward.parity import (
    branch_fault,
    compare_with_transformers,
    logits_of_folder,
    logits_of_view,
    parity_fault,
    parity_texts,
    unnamed_settings,
)
from rotdistill_core.forward.whole import empty_model
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.results import Parity
from rotdistill_core.testing import pico_folder, pico_model, pico_samples, save_folder

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "phi3": {"sliding_window": 9},
    "olmo2": {},
    "gemma3_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
        "final_logit_softcapping": 5.0,
    },
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "long_factor": [9.0, 9.0, 20.0, 30.0],
    "short_factor": [1.0] * 4,
}


def with_keys(folder: Path, **keys: Any) -> Path:
    """Write keys into the config of a folder; return the folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def texts(**changes: Any) -> PackedTexts:
    return parity_texts(pico_samples(texts=12, **changes).layout, without_prefix=True)


def of_folder(weights: Weights, folder: Path, layout: PackedTexts | None = None) -> Parity:
    return compare_with_transformers(weights, logits_of_folder(folder, CPU), layout or texts(), CPU)


def of_view(weights: Weights) -> Parity:
    return compare_with_transformers(weights, logits_of_view(weights, CPU), texts(), CPU)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", MODELS)
def test_models_are_computed_as_transformers_computes_them(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    changes = {"tie_word_embeddings": tied, **MODELS[model_type]}
    model = pico_model(tmp_path / "model", model_type, **changes)
    for parity in (of_folder(model.weights, model.folder), of_view(model.weights)):
        assert parity.difference < 1e-6
        assert parity.holds
        assert parity_fault(parity, model.weights) == ""


@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda n: f"{n} key/value heads")
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"head_dim": 16}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 4, "attention_bias": True}),
        ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 7}),
    ],
)
def test_heads_and_biases_of_any_shape_hold(
    tmp_path: Path, model_type: str, changes: dict[str, Any], groups: int
) -> None:
    model = pico_model(tmp_path / "model", model_type, num_key_value_heads=groups, **changes)
    assert of_folder(model.weights, model.folder).difference < 1e-6


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "paged|eager"},
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.Y", "AutoConfig": "configuration_x.C"}},
        {"quantization_config": None},
        {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None, "dtype": "float16", "use_cache": False},
    ],
    ids=str,
)
def test_how_somebody_called_a_model_is_no_difference(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = with_keys(pico_folder(tmp_path / "model"), **keys)
    model = open_model(ModelRef(model=str(folder)))
    assert of_folder(model.weights, folder).difference < 1e-6


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_of_its_own_under_a_tied_config_is_read_alike(tmp_path: Path, equal: bool) -> None:
    folder = pico_folder(tmp_path / "model", tie_word_embeddings=False)
    path = folder / "model.safetensors"
    if equal:
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path, {"format": "pt"})
    model = open_model(ModelRef(model=str(with_keys(folder, tie_word_embeddings=True))))
    assert of_folder(model.weights, folder).difference < 1e-6


@pytest.mark.parametrize("rope", [LONGROPE, {"rope_type": "dynamic", "factor": 6.0}])
def test_texts_on_both_sides_of_the_original_length_hold(
    tmp_path: Path, rope: dict[str, Any]
) -> None:
    parameters = {"rope_theta": 100.0, **rope}
    model = pico_model(tmp_path / "model", max_position_embeddings=20, rope_parameters=parameters)
    assert of_folder(model.weights, model.folder).difference < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_compared_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    model = pico_model(tmp_path / "model", tie_word_embeddings=False)
    save_folder(model.weights, model.folder, tmp_path / "rounded", dtype)
    config = json.loads((tmp_path / "rounded/config.json").read_text())
    rounded = open_folder(tmp_path / "rounded", config, model.adapter)
    assert rounded.dtype == dtype
    assert of_folder(rounded, tmp_path / "rounded").difference < 1e-6
    assert not of_folder(model.weights, tmp_path / "rounded").holds


def test_a_checkpoint_of_several_files_is_read_whole(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    plain: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    plain.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 2
    opened = open_folder(tmp_path / "shards", model.config, model.adapter)
    assert of_folder(opened, tmp_path / "shards").difference < 1e-6


# Which texts.


def test_shortest_and_longest_text_are_compared_with_and_without_the_prefix() -> None:
    layout = pico_samples(texts=12, guard=3).layout
    chats = {len(text.tokens) for text in layout.texts if not text.plain}
    chosen = parity_texts(layout, without_prefix=True)
    assert chosen.prefix == layout.prefix
    lengths = [(len(text.tokens), text.plain) for text in chosen.texts]
    assert lengths == [
        (min(chats), False),
        (max(chats), False),
        (min(chats), True),
        (max(chats), True),
    ]
    assert {len(t.tokens) for t in parity_texts(layout, False).texts} == {min(chats), max(chats)}


def test_a_plain_text_that_is_longer_than_all_is_compared_too() -> None:
    layout = pico_samples(texts=3, guard=60).layout
    longest = max(layout.texts, key=lambda text: len(text.tokens))
    assert longest.plain
    assert longest in parity_texts(layout, without_prefix=True).texts


@pytest.mark.parametrize("texts_of", [{"texts": 1}, {"texts": 0, "guard": 3}, {"prefix": 0}])
def test_any_texts_can_be_compared(tmp_path: Path, texts_of: dict[str, int]) -> None:
    model = pico_model(tmp_path / "model")
    layout = parity_texts(pico_samples(**{"texts": 5, **texts_of}).layout, without_prefix=True)
    assert layout.texts
    assert of_folder(model.weights, model.folder, layout).difference < 1e-6


# What does not hold.

UNNAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding_multiplier": ("granite", {"embedding_multiplier": 12.0}),
    "logits_scaling": ("granite", {"logits_scaling": 8.0}),
    "final_logit_softcapping": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 5.0}),
}
"""Setting -> a model that has it and nothing else."""


def bare_table(model: Model) -> Adapter:
    """Return the table of a model without the keys of its multipliers and caps."""
    if model.config["model_type"] == "granite":
        return rope_decoder(("granite",))
    return replace(model.adapter, softcap_key="")


def model_with_bare_table(folder: Path, model_type: str, **changes: Any) -> Weights:
    pico_folder(folder, model_type, **changes)
    config = json.loads((folder / "config.json").read_text())
    if model_type == "granite":
        return open_folder(folder, config, rope_decoder(("granite",)))
    gemma = pico_model(folder.with_name("gemma"), "gemma3_text", head_dim=8).adapter
    return open_folder(folder, config, replace(gemma, softcap_key=""))


@pytest.mark.parametrize("setting", UNNAMED)
def test_a_setting_that_the_table_does_not_name_is_found_and_named(
    tmp_path: Path, setting: str
) -> None:
    model_type, changes = UNNAMED[setting]
    weights = model_with_bare_table(tmp_path / "model", model_type, **changes)
    for parity in (of_folder(weights, tmp_path / "model"), of_view(weights)):
        assert not parity.holds
        fault = parity_fault(parity, weights)
        assert f"{setting} = {changes[setting]}" in fault
        assert "token_id" not in fault
        assert f"text {parity.text}" in fault


@pytest.mark.parametrize(
    "changes",
    [{}, {"residual_multiplier": 0.22}, {"attention_multiplier": 0.25}, {"rope_theta": 77.0}],
    ids=str,
)
def test_what_the_layers_compute_themselves_holds(tmp_path: Path, changes: dict[str, Any]) -> None:
    weights = model_with_bare_table(tmp_path / "model", "granite", **changes)
    assert of_folder(weights, tmp_path / "model").holds


@pytest.mark.parametrize("model_type", [*MODELS, "granite"])
def test_what_a_layer_adds_is_what_its_writers_write(tmp_path: Path, model_type: str) -> None:
    multipliers = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}
    changes = multipliers if model_type == "granite" else MODELS[model_type]
    weights = pico_model(tmp_path / "model", model_type, **changes).weights
    assert branch_fault(weights, texts(), CPU) == ""


def test_a_residual_multiplier_that_the_table_does_not_name_is_refused(tmp_path: Path) -> None:
    weights = model_with_bare_table(
        tmp_path / "model", "granite", residual_multiplier=0.22, attention_multiplier=0.25
    )
    fault = branch_fault(weights, texts(), CPU)
    assert "what attention and the MLP write by 0.22 before it adds" in fault
    assert "In its config.json is residual_multiplier = 0.22. Name the key in the table" in fault


def test_writers_that_write_something_else_are_refused(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    writers = {**model.adapter.writers, "heads": "model.layers.{i}.self_attn.q_proj.weight"}
    wrong = replace(model.weights, adapter=replace(model.adapter, writers=writers))
    assert "than what model.layers.0.self_attn.q_proj.weight makes" in branch_fault(
        wrong, texts(), CPU
    )


def test_what_acts_inside_layers_alone_is_no_cause(tmp_path: Path) -> None:
    changes = {"embedding_multiplier": 12.0, "attention_multiplier": 0.25}
    weights = model_with_bare_table(
        tmp_path / "model", "granite", **changes, residual_multiplier=0.22
    )
    fault = parity_fault(of_folder(weights, tmp_path / "model"), weights)
    assert "not at their defaults: embedding_multiplier = 12.0 (default 1.0). Install" in fault


def test_all_multipliers_that_act_outside_layers_are_named(tmp_path: Path) -> None:
    changes = {"embedding_multiplier": 12.0, "logits_scaling": 8.0}
    inside = {"residual_multiplier": 0.22, "attention_multiplier": 0.25}
    weights = model_with_bare_table(tmp_path / "model", "granite", **changes, **inside)
    named = unnamed_settings(weights.config, weights.adapter)
    assert named == [f"{key} = {value} (default 1.0)" for key, value in changes.items()]
    table = replace(weights.adapter, requires={"logits_scaling": 8.0}, softcap_key="none")
    assert not any("logits_scaling" in name for name in unnamed_settings(weights.config, table))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma3_text", {"gain_offset": 0.0}),
        ("gemma3_text", {"softcap_key": "sliding_window"}),
        ("llama", {"gain_offset": 1.0}),
        ("llama", {"eps_key": "rope_scale"}),
        ("llama", {"softcap_key": "num_attention_heads"}),
    ],
)
def test_a_wrong_table_does_not_hold(
    tmp_path: Path, model_type: str, fields: dict[str, Any]
) -> None:
    model = pico_model(tmp_path / "model", model_type, **MODELS[model_type])
    config = {**model.config, "rope_scale": 1.0}
    wrong = replace(model.weights, adapter=replace(model.adapter, **fields), config=config)
    parity = of_folder(wrong, model.folder)
    assert not parity.holds
    fault = parity_fault(parity, wrong)
    assert ("No setting of config.json stands out" in fault) == (model_type == "llama")


@pytest.mark.parametrize(
    "changes",
    [{"rms_norm_eps": 0.5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}],
)
def test_another_config_in_the_folder_does_not_hold(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = pico_model(tmp_path / "model")
    weights = model.weights
    with_keys(model.folder, **changes)
    assert not of_folder(weights, model.folder).holds


def test_other_tensors_in_the_folder_do_not_hold(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    edited = model.weights.edit({name: 1.01 * model.weights[name]})
    assert not of_folder(edited, model.folder).holds
    assert of_view(edited).holds


def test_a_nan_does_not_hold(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    logits = logits_of_folder(model.folder, CPU)

    def broken(text: Text, positions: torch.Tensor) -> torch.Tensor:
        found = logits(text, positions)
        found[0, 0] = torch.nan
        return found

    parity = compare_with_transformers(model.weights, broken, texts(), CPU)
    assert not parity.holds
    assert "differ by nan" in parity_fault(parity, model.weights)


def test_lost_tensors_are_named(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    path = model.folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SetupError, match=r"missing keys.*model\.layers\.1\.mlp\.up_proj\.weight"):
        logits_of_folder(model.folder, CPU)


def test_a_folder_that_transformers_cannot_open_is_named(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    (model.folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SetupError, match=r"model: the model, as transformers opens it, cannot be"):
        logits_of_folder(model.folder, CPU)


def test_one_module_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=4, tie_word_embeddings=False)
    whole: Any = empty_model(model.weights, torch.float32)
    monkeypatch.setattr("rotdistill_core.forward.parity.empty_model", lambda *_: whole)
    loaded: list[int] = []

    def counted(entry: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            loaded.append(sum(p.numel() for p in whole.parameters() if p.device.type != "meta"))
            return entry.read()

        return replace(entry, read=read)

    entries = {name: counted(entry) for name, entry in model.weights.entries.items()}
    logits = logits_of_view(replace(model.weights, entries=entries), CPU)
    assert loaded == []
    text = texts().texts[0]
    assert torch.isfinite(logits(text, torch.tensor([0]))).all()
    assert len(loaded) == len(entries)
    assert max(loaded) == 0  # whatever a module held was given back before the next one read


def test_final_norm_of_the_check_is_not_the_one_that_is_checked(tmp_path: Path) -> None:
    """Transformers' side has its own norm: a wrong one on our side is seen."""
    model = pico_model(tmp_path / "model")
    states = torch.randn(3, 32)
    plain: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    with torch.no_grad():
        expected = plain.model.norm(states)
    torch.testing.assert_close(final_norm(model.weights, states), expected)
