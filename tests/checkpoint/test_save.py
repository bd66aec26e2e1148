"""Saved folders are plain Hugging Face checkpoints, and stored changes are read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rotdistill_core.checkpoint import save
from rotdistill_core.checkpoint.headers import SHARD_INDEX, folder_headers
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights, restore_weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.linalg.maps import Permutation, Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    pico_model,
    pico_output,
    random_rotation,
    reopen,
    save_folder,
)

NORM = "model.norm.weight"
kinds = pytest.mark.parametrize("model_type", ["llama", "qwen2"])
ties = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def largest_change(one: Weights, two: Weights) -> float:
    assert set(one.entries) == set(two.entries)
    return max(float((one[n].double() - two[n].double()).abs().max()) for n in one.entries)


@torch.no_grad()
def plain_logits(
    folder: Path, layout: PackedTexts, saved: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return the logits of plain transformers in float32.

    Products in bfloat16 crash on some processors.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == saved
    model = model.eval().float()
    return [model(torch.tensor([text.tokens])).logits[0] for text in layout.texts]


def assert_saves_equal(one: Path, two: Path, layout: PackedTexts, tolerance: float) -> None:
    for a, b in zip(plain_logits(one, layout), plain_logits(two, layout), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@kinds
@ties
@pytest.mark.parametrize(
    "shard_bytes", [None, 20_000, 1], ids=["one shard", "several shards", "a shard per tensor"]
)
def test_a_saved_folder_is_the_same_model_to_plain_transformers(
    tmp_path: Path,
    layout: PackedTexts,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    tied: bool,
    shard_bytes: int | None,
) -> None:
    if shard_bytes:
        monkeypatch.setattr(save, "SHARD_BYTES", shard_bytes)
    model = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied)
    saved = tmp_path / "saved"
    save_folder(model.weights, model.folder, saved)
    assert (saved / SHARD_INDEX).is_file() is bool(shard_bytes)
    if shard_bytes:
        assert_index_fits(saved, model.weights, one_each=shard_bytes == 1)
    assert_saves_equal(saved, model.folder, layout, 0.0)
    assert largest_change(open_model(ModelRef(model=str(saved))).weights, model.weights) == 0.0


def assert_index_fits(folder: Path, weights: Weights, one_each: bool) -> None:
    index = json.loads((folder / SHARD_INDEX).read_text(encoding="utf-8"))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) == len(weights.entries) if one_each else len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    headers = folder_headers(folder)
    assert {name: header.file.name for name, header in headers.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == 4 * weights.parameters


@kinds
@ties
def test_a_saved_fold_has_the_logits_of_the_original(
    tmp_path: Path, layout: PackedTexts, model_type: str, tied: bool
) -> None:
    model = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied)
    neurons = Permutation(torch.arange(48).flip(0))
    folded = model.weights.fold({"residual": Rotation(random_rotation(32)), "neurons.1": neurons})
    save_folder(folded, model.folder, tmp_path / "saved")
    assert_saves_equal(tmp_path / "saved", model.folder, layout, 1e-4)
    assert largest_change(reopen(tmp_path / "saved", folded), folded) < 1e-6


def test_a_folder_saved_in_bfloat16_is_the_rounded_model(
    llama: Model, tmp_path: Path, layout: PackedTexts
) -> None:
    save_folder(llama.weights, llama.folder, tmp_path / "saved", torch.bfloat16)
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    assert {h.dtype for h in folder_headers(tmp_path / "saved").values()} == {"bfloat16"}
    again = reopen(tmp_path / "saved", llama.weights)
    assert all(torch.equal(again[n], llama.weights[n].bfloat16()) for n in llama.weights.entries)

    rounded = {n: llama.weights[n].bfloat16().float() for n in llama.weights.entries}
    save_folder(llama.weights.edit(rounded), llama.folder, tmp_path / "rounded")
    narrow = plain_logits(tmp_path / "saved", layout, torch.bfloat16)
    expected = plain_logits(tmp_path / "rounded", layout)
    torch.testing.assert_close(narrow, expected, rtol=1e-6, atol=1e-6)


EDITS: dict[str, Callable[[Weights], Weights]] = {
    "nothing": lambda w: w,
    "fold": lambda w: w.fold({"residual": Rotation(random_rotation(32))}),
    "cut": lambda w: w.cut([1]),
    "cut and edit": lambda w: w.cut([1]).edit({NORM: 2.0 * w[NORM].double()}),
    "untie": lambda w: w.untie(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_stored_weights_are_restored(
    llama: Model, tmp_path: Path, edit: Callable[[Weights], Weights]
) -> None:
    edited = edit(llama.weights)
    out = pico_output(tmp_path / "runs")
    info = json.loads(json.dumps(edited.store(out, torch.float64)))
    student = open_model(ModelRef(model=str(llama.folder))).weights
    again = restore_weights(info, student, tmp_path / "runs")
    assert largest_change(again, edited) == 0.0
    assert (again.config, again.tied) == (dict(edited.config), edited.tied)
    assert again.lineage.depths == edited.lineage.depths
    one, two = edited.lineage.basis, again.lineage.basis
    assert (one is None) == (two is None)
    assert one is None or two is None or torch.equal(one, two)


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_only_changed_tensors_are_stored(
    llama: Model, tmp_path: Path, edit: Callable[[Weights], Weights]
) -> None:
    edited = edit(llama.weights)
    out = pico_output(tmp_path / "runs")
    edited.store(out, torch.float64)
    [file] = [name for name in out.used if name.endswith("changed.safetensors")]
    changed = {name for name, entry in edited.entries.items() if entry.stored is None}
    assert set(load_file(tmp_path / "runs" / file)) == changed
