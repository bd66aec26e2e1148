"""Views are edited without being written: cut, untied, edited; and opened from a checked folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import SetupError
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import logits, pico_folder, pico_model, random_rotation

NORM = "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_an_edit_after_a_fold_forgets_the_way_back(llama: Model) -> None:
    folded = llama.weights.fold({"residual": Rotation(random_rotation(32))})
    assert folded.undo is not None
    assert folded.edit({NORM: folded[NORM]}).undo is None
    assert folded.cut([0]).undo is None
    assert llama.weights.undo is None


def test_an_edit_leaves_the_view_before_it(llama: Model) -> None:
    edited = llama.weights.edit({NORM: torch.zeros(32)}, rms_norm_eps=0.5)
    assert float(edited[NORM].abs().max()) == 0.0
    assert edited.config["rms_norm_eps"] == 0.5
    assert float(llama.weights[NORM].abs().max()) > 0
    assert llama.weights.config["rms_norm_eps"] != 0.5


def test_a_cut_keeps_the_named_layers_renumbered(tmp_path: Path, layout: PackedTexts) -> None:
    weights = pico_model(tmp_path / "model", "qwen2", num_hidden_layers=6).weights
    short = weights.cut([0, 1, 4, 5])
    assert (short.depth, short.config["num_hidden_layers"]) == (4, 4)
    assert len(short.config["layer_types"]) == 4
    for new, old in enumerate([0, 1, 4, 5]):
        for name in (n for n in weights.entries if n.startswith(f"model.layers.{old}.")):
            assert torch.equal(short[name.replace(f".{old}.", f".{new}.")], weights[name])
    assert sum(n.startswith("model.layers.") for n in short.entries) == 4 * 12
    cut_away = [n for n in weights.entries if n.startswith(("model.layers.2.", "model.layers.3."))]
    lost = weights.parameters - short.parameters
    assert lost == sum(weights[n].numel() for n in cut_away)
    assert bool(torch.isfinite(logits(short, layout)).all())
    assert weights.depth == 6


def test_a_cut_remembers_the_original_depths(tmp_path: Path) -> None:
    weights = pico_model(tmp_path / "model", num_hidden_layers=6).weights
    short = weights.cut([0, 1, 4, 5])
    assert short.lineage.depths == (0, 1, 4, 5, 6)
    assert short.cut([0, 2, 3]).lineage.depths == (0, 4, 5, 6)


def test_a_cut_that_keeps_all_layers_changes_nothing(llama: Model, layout: PackedTexts) -> None:
    assert torch.equal(logits(llama.weights.cut([0, 1]), layout), logits(llama.weights, layout))


def test_untie_gives_the_head_a_tensor_of_its_own(llama: Model, layout: PackedTexts) -> None:
    untied = llama.weights.untie()
    assert (llama.weights.tied, untied.tied) == (True, False)
    assert untied.config["tie_word_embeddings"] is False
    assert untied.parameters == llama.weights.parameters + 64 * 32
    assert torch.equal(untied[HEAD], llama.weights[EMBEDDING])
    assert torch.equal(logits(untied, layout), logits(llama.weights, layout))
    assert untied.untie() is untied


def test_every_difference_from_the_table_is_reported(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    gate, gain = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.input_layernorm.weight"
    tensors["model.layers.0.mlp.gate_prj.weight"] = tensors.pop(gate)
    tensors[gain] = torch.ones(31)
    del tensors[NORM]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SetupError) as caught:
        open_model(ModelRef(model=str(folder)))
    message = str(caught.value)
    assert str(folder) in message
    assert f"{gate} is missing (expected [48, 32])" in message
    assert f"{NORM} is missing (expected [32])" in message
    assert f"{gain} has shape [31], expected [32]" in message
    assert f'gate_prj.weight is not in the table. Did you mean "{gate}"?' in message


def test_an_untied_config_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    untied = json.dumps({**config, "tie_word_embeddings": False})
    (folder / "config.json").write_text(untied, encoding="utf-8")
    with pytest.raises(SetupError, match=r"lm_head.weight is missing \(expected \[64, 32\]\)"):
        open_model(ModelRef(model=str(folder)))


def test_a_second_copy_of_a_tied_head_is_ignored(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    twice = {**tensors, HEAD: tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, folder / "model.safetensors", {"format": "pt"})
    weights = open_model(ModelRef(model=str(folder))).weights
    assert weights.tied
    assert torch.equal(weights.head(), tensors[EMBEDDING])


def test_parts_of_fused_tensors_come_in_the_order_of_the_table(tmp_path: Path) -> None:
    weights = pico_model(tmp_path / "model", "phi3").weights
    names = [name for names in weights.adapter.parts(weights.config).values() for name in names]
    parts = set(names)
    assert [name for name in weights.entries if name in parts] == names
    assert set(weights.files) == set(load_file(tmp_path / "model" / "model.safetensors"))
