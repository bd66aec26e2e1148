"""The model that is built from our own config and weights is the one that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.errors import SetupError
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.whole import whole_model
from rotdistill_core.testing import logits, pico_folder, pico_samples, save_folder

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 9, 17, 25, 33, 41, 50, 58, 7, 12, 20, 30]])
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "phi3": {"sliding_window": 5, "tie_word_embeddings": False},
    "olmo2": {"tie_word_embeddings": False},
}


@torch.no_grad()
def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the logits of the model that transformers loads by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=None)
    return model.eval()(IDS).logits


@torch.no_grad()
def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    found: Tensor = whole_model(open_checkpoint(folder).weights, CPU, dtype)(IDS).logits
    return found


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, **tensors: Tensor | None) -> None:
    """Replace or add tensors by the name with `__` for dots; None removes one."""
    path = folder / "model.safetensors"
    held = load_file(path)
    for key, value in tensors.items():
        name = key.replace("__", ".")
        held.pop(name, None)
        if value is not None:
            held[name] = value
    save_file(held, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MODELS)
def test_logits_are_those_of_transformers_to_the_bit(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    folder = pico_folder(tmp_path / "model", model_type, **MODELS[model_type])
    assert torch.equal(ours(folder, dtype), theirs(folder, dtype))


def test_ways_to_call_a_model_are_not_taken_from_its_config(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    expected = theirs(folder)
    edit(
        folder, output_attentions=True, return_dict=False, _attn_implementation="flash_attention_2"
    )
    assert torch.equal(ours(folder), expected)
    weights = open_checkpoint(folder).weights
    for _ in (walk := LayerwiseForward(weights, pico_samples().layout, CPU, torch.float32)):
        walk.run()


HEADS = {
    "another": lambda embedding: embedding + 0.3,
    "one row of it is another": lambda embedding: torch.cat([embedding[:-1], embedding[:1]]),
    "equal": lambda embedding: embedding.clone(),
    "none": lambda _: None,
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_its_own_is_kept_where_it_differs(tmp_path: Path, head: str) -> None:
    folder = pico_folder(tmp_path / "model")
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    change_tensors(folder, lm_head__weight=HEADS[head](embedding))
    model = open_checkpoint(folder)
    is_tied = head in ("equal", "none")
    assert model.weights.tied == is_tied
    assert model.config["tie_word_embeddings"] == is_tied
    assert torch.equal(ours(folder), theirs(folder))
    layout = pico_samples().layout
    save_folder(model.weights, folder, tmp_path / "saved")
    assert torch.equal(theirs(tmp_path / "saved"), theirs(folder))
    again = open_checkpoint(tmp_path / "saved")
    assert again.weights.tied == is_tied
    assert torch.equal(logits(again.weights, layout), logits(model.weights, layout))


def test_a_head_of_another_dtype_is_a_head_of_its_own(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    change_tensors(folder, lm_head__weight=embedding.to(torch.bfloat16))
    assert not open_checkpoint(folder).weights.tied
    assert torch.equal(ours(folder), theirs(folder))


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    expected = theirs(folder)
    buffer = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, **{buffer.format(i).replace(".", "__"): torch.zeros(4) for i in (0, 1)})
    assert torch.equal(ours(folder), expected)
    save_folder(open_checkpoint(folder).weights, folder, tmp_path / "saved")
    assert not [name for name in load_file(tmp_path / "saved/model.safetensors") if "rot" in name]


BIASES = {
    "switched on and missing": ({"attention_bias": True}, {}),
    "there and switched off": (
        {},
        {f"model__layers__{i}__self_attn__q_proj__bias": torch.ones(32) for i in (0, 1)},
    ),
    "of the MLP, missing": ({"mlp_bias": True}, {}),
}


@pytest.mark.parametrize("case", BIASES)
def test_biases_that_disagree_with_the_config_are_refused(tmp_path: Path, case: str) -> None:
    folder = pico_folder(tmp_path / "model")
    changes, tensors = BIASES[case]
    edit(folder, **changes)
    change_tensors(folder, **tensors)
    with pytest.raises(SetupError, match=r"layers\.0\..*_proj\.bias"):
        ours(folder)
    with pytest.raises(SetupError, match=r"layers\.0\..*_proj\.bias"):
        LayerwiseForward(open_checkpoint(folder).weights, pico_samples().layout, CPU, torch.float32)


WRONG = {
    "an activation that there is not": {"hidden_act": "nonsense"},
    "an activation that is a number": {"hidden_act": 3},
    "a rope type that there is not": {"rope_parameters": {"rope_type": "nonsense"}},
    "a rope type that is a list": {"rope_parameters": {"rope_type": [1], "rope_theta": 1e4}},
    "a size as text": {"hidden_size": "wide"},
    "a size as a list": {"hidden_size": [32]},
    "heads that are none": {"num_attention_heads": 0},
    "an eps as text": {"rms_norm_eps": "small"},
    "end tokens as text": {"eos_token_id": "end"},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=list(WRONG))
def test_a_config_of_wrong_kinds_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = pico_folder(tmp_path / "model")
    edit(folder, **changes)
    (folder / "generation_config.json").unlink()
    with pytest.raises(SetupError) as caught:
        ours(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
