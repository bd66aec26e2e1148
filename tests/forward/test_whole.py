"""The model that is built from our own config and weights is the one that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.checkpoint.weights import restore_weights
from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.whole import whole_model
from rotdistill_core.testing import logits, pico_folder, pico_output, pico_samples, save_folder

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


def test_the_head_reads_the_last_tokens_of_several_texts_in_one_piece(tmp_path: Path) -> None:
    model = whole_model(open_checkpoint(pico_folder(tmp_path)).weights, CPU, torch.bfloat16)
    read: list[Tensor] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, rows: read.append(rows[0]))
    found = model(IDS.reshape(3, 4), logits_to_keep=1).logits
    assert read[0].shape[:2] == (3, 1)
    assert read[0].stride() == (read[0].shape[-1], read[0].shape[-1], 1)
    assert torch.equal(found[:, 0], head(read[0])[:, 0])


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


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_a_checkpoint_of_the_class_without_head_is_opened(tmp_path: Path, model_type: str) -> None:
    changes = {**MODELS[model_type], "tie_word_embeddings": True}
    folder = pico_folder(tmp_path / "model", model_type, **changes)
    whole = theirs(folder)
    path = folder / "model.safetensors"
    inside = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    save_file(inside, path, {"format": "pt"})
    assert torch.equal(theirs(folder), whole)
    assert torch.equal(ours(folder), whole)
    weights = open_checkpoint(folder).weights
    out = pico_output(tmp_path / "runs")
    again = restore_weights(weights.store(out, torch.float32), weights, tmp_path / "runs")
    layout = pico_samples().layout
    assert torch.equal(logits(again, layout), logits(weights, layout))


def test_a_checkpoint_without_a_head_that_is_not_tied_is_refused(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model", tie_word_embeddings=False)
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    del tensors[HEAD]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SetupError, match=r"lm_head\.weight is missing"):
        open_checkpoint(folder)


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


KEYS = (
    "attention_bias",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "layer_types",
    "max_position_embeddings",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)
NULL = "null"


def without(folder: Path, key: str, kind: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop(key, None)
    path.write_text(json.dumps({**config, key: None} if kind == NULL else config))


@pytest.mark.parametrize("kind", ["missing", NULL])
@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_key_that_a_config_lacks_is_what_its_class_takes(
    tmp_path: Path, model_type: str, kind: str
) -> None:
    whole = pico_folder(tmp_path / "whole", model_type, **MODELS[model_type])
    compared = []
    for key in KEYS:
        folder = tmp_path / key
        shutil.copytree(whole, folder)
        without(folder, key, kind)
        try:
            expected = theirs(folder)
        except Exception:  # transformers refuses it, and so may we
            continue
        try:
            found = ours(folder)
        except SetupError:  # other sizes: transformers makes random tensors
            continue
        assert torch.equal(found, expected), key
        weights = open_checkpoint(folder).weights
        walked = logits(weights, one_text(), torch.float32)
        assert torch.allclose(walked, expected[0], atol=1e-4), key
        compared.append(key)
    assert len(compared) >= 4


def one_text() -> PackedTexts:
    return PackedTexts((Text("t", "en", Split.FIT, tuple(IDS[0].tolist()), 1),), 0)


@pytest.mark.parametrize(
    ("model_type", "key"), [("llama", "rms_norm_eps"), ("qwen2", "rms_norm_eps")]
)
def test_the_eps_of_the_class_is_taken_and_saved(tmp_path: Path, model_type: str, key: str) -> None:
    folder = pico_folder(tmp_path / "model", model_type)
    without(folder, key, "missing")
    model = open_checkpoint(folder)
    assert torch.equal(ours(folder), theirs(folder))
    save_folder(model.weights, folder, tmp_path / "saved")
    assert torch.equal(theirs(tmp_path / "saved"), theirs(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "model.norm.weight"),
        ("llama", EMBEDDING),
        ("qwen2", HEAD),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_tensor(
    tmp_path: Path, model_type: str, name: str, value: float
) -> None:
    folder = pico_folder(tmp_path / "model", model_type, **MODELS[model_type])
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[3] = value
    change_tensors(folder, **{name.replace(".", "__"): tensor})
    with pytest.raises((SetupError, CheckFailed), match=rf"{name}: 1 of its .* NaN or Inf"):
        ours(folder)


def test_weights_beyond_the_dtype_are_refused_by_tensor(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    change_tensors(folder, **{name.replace(".", "__"): tensor * 1e7})
    with pytest.raises(SetupError, match=r"up_proj.weight: \d+ of its 1536 numbers do not fit"):
        ours(folder, torch.float16)
    assert bool(ours(folder).isfinite().all())
    walk = LayerwiseForward(open_checkpoint(folder).weights, one_text(), CPU, torch.float16)
    with pytest.raises(SetupError, match=r"up_proj.weight: .* numbers do not fit float16"):
        for _ in walk:
            walk.run()


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
    "windows without a width": {"layer_types": ["sliding_attention"] * 2, "sliding_window": None},
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
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
