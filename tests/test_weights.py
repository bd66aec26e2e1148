"""Folding and taking back, cutting, untying, storing and saving: views of pico checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rotdistill_core.checkpoint import weights as weights_module
from rotdistill_core.checkpoint.headers import folder_headers
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights, open_folder, restore_weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.errors import SetupError
from rotdistill_core.linalg.maps import Map, Permutation, Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    final_states,
    logits,
    pico_folder,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
    reopen,
    save_folder,
    scramble,
)

GAIN = "model.layers.0.input_layernorm.weight"
NORM = "model.norm.weight"
kinds = pytest.mark.parametrize("model_type", ["llama", "qwen2"])
ties = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def layout() -> PackedTexts:
    return pico_samples(texts=8).layout


@pytest.fixture
def llama(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "llama")


def neuron_maps(depth: int, seed: int = 3) -> dict[str, Map]:
    maker = torch.Generator().manual_seed(seed)
    return {f"neurons.{i}": Permutation(torch.randperm(48, generator=maker)) for i in range(depth)}


def largest_change(one: Weights, two: Weights) -> float:
    assert set(one.entries) == set(two.entries)
    return max(float((one[n].double() - two[n].double()).abs().max()) for n in one.entries)


@torch.no_grad()
def plain_logits(
    folder: Path, layout: PackedTexts, saved: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return the logits of plain transformers in float32: products in bfloat16 crash on some processors."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == saved
    return [model.eval().float()(torch.tensor([text.tokens])).logits[0] for text in layout.texts]


def assert_saves_equal(one: Path, two: Path, layout: PackedTexts, tolerance: float) -> None:
    for a, b in zip(plain_logits(one, layout), plain_logits(two, layout), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@kinds
@ties
def test_a_fold_with_a_random_rotation_leaves_the_logits_equal(
    tmp_path: Path, layout: PackedTexts, model_type: str, tied: bool
) -> None:
    weights = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied).weights
    Q = random_rotation(32, 5)
    folded = weights.fold({"residual": Rotation(Q)})
    torch.testing.assert_close(logits(folded, layout), logits(weights, layout), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        final_states(folded, layout), final_states(weights, layout) @ Q, rtol=0, atol=1e-9
    )
    assert not folded.tied
    assert folded.config["tie_word_embeddings"] is False
    assert folded.undo is not None
    assert set(folded.undo.gains) == {
        n for n, p in weights.adapter.expand(weights.config).items() if p.is_gain
    }
    assert all(
        torch.equal(folded[name], torch.ones(32, dtype=torch.float64)) for name in folded.undo.gains
    )
    assert folded.lineage.basis is not None
    assert torch.equal(folded.lineage.basis, Q)


@kinds
@ties
def test_a_fold_of_permuted_neurons_leaves_the_logits_equal(
    tmp_path: Path, layout: PackedTexts, model_type: str, tied: bool
) -> None:
    weights = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied).weights
    maps = neuron_maps(2)
    folded = weights.fold(maps)
    torch.testing.assert_close(logits(folded, layout), logits(weights, layout), rtol=0, atol=1e-9)
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(folded[down], maps["neurons.1"].apply(weights[down].double(), 1))
    assert not torch.equal(folded[down], weights[down].double())
    assert folded.tied is tied
    assert folded.lineage.basis is None
    assert largest_change(folded.unfold(folded.undo), weights) == 0.0  # type: ignore[arg-type]


@ties
def test_a_permutation_of_the_stream_moves_the_gains_along(
    tmp_path: Path, layout: PackedTexts, tied: bool
) -> None:
    weights = pico_model(tmp_path / "model", tie_word_embeddings=tied).weights
    P = Permutation(torch.randperm(32, generator=torch.Generator().manual_seed(4)))
    folded = weights.fold({"residual": P})
    torch.testing.assert_close(logits(folded, layout), logits(weights, layout), rtol=0, atol=1e-9)
    assert torch.equal(folded[GAIN], weights[GAIN].double()[P.index])
    assert folded.tied is tied
    assert folded.undo is not None
    assert not folded.undo.gains
    assert folded.lineage.basis is not None
    moved = final_states(weights, layout) @ folded.lineage.basis
    torch.testing.assert_close(final_states(folded, layout), moved, rtol=0, atol=1e-9)
    assert largest_change(folded.unfold(folded.undo), weights) == 0.0


def test_two_folds_after_each_other_are_the_fold_of_their_product(
    llama: Model, layout: PackedTexts
) -> None:
    P, Q = random_rotation(32, 1), random_rotation(32, 2)
    twice = llama.weights.fold({"residual": Rotation(P)}).fold(
        {"residual": Rotation(Q), **neuron_maps(2)}
    )
    once = llama.weights.fold({"residual": Rotation(P @ Q), **neuron_maps(2)})
    assert largest_change(twice, once) < 1e-12
    assert twice.lineage.basis is not None
    torch.testing.assert_close(twice.lineage.basis, P @ Q)
    torch.testing.assert_close(
        logits(twice, layout), logits(llama.weights, layout), rtol=0, atol=1e-9
    )


@kinds
@ties
@pytest.mark.parametrize("gains", ["as they are", "zero", "tiny", "mixed"])
def test_unfold_gives_the_weights_back(
    tmp_path: Path, layout: PackedTexts, model_type: str, tied: bool, gains: str
) -> None:
    weights = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied).weights
    planted = {"zero": (0.0, 0.0), "tiny": (1e-6, -1e-6), "mixed": (0.0, 1e-6)}.get(gains)
    if planted:
        names = [n for n, p in weights.adapter.expand(weights.config).items() if p.is_gain]
        edited = {n: weights[n].clone() for n in names}
        for k, gain in enumerate(edited.values()):
            gain[[k, 31]] = torch.tensor(planted)
        weights = weights.edit(edited)
    folded = weights.fold({"residual": Rotation(random_rotation(32, 7)), **neuron_maps(2)})
    assert folded.undo is not None
    back = folded.unfold(folded.undo)
    assert largest_change(back, weights) <= 1e-12
    assert back.tied is tied
    assert dict(back.config) == {**weights.config, "tie_word_embeddings": tied}
    assert back.lineage.basis is not None
    torch.testing.assert_close(back.lineage.basis, torch.eye(32, dtype=torch.float64))
    torch.testing.assert_close(logits(folded, layout), logits(weights, layout), rtol=0, atol=1e-9)


def test_an_edit_after_a_fold_forgets_the_way_back(llama: Model) -> None:
    folded = llama.weights.fold({"residual": Rotation(random_rotation(32))})
    assert folded.undo is not None
    assert folded.edit({NORM: folded[NORM]}).undo is None
    assert folded.cut([0]).undo is None
    assert llama.weights.undo is None


def test_cut_keeps_the_named_layers_and_remembers_where_they_came_from(
    tmp_path: Path, layout: PackedTexts
) -> None:
    weights = pico_model(tmp_path / "model", "qwen2", num_hidden_layers=6).weights
    short = weights.cut([0, 1, 4, 5])
    assert (short.depth, short.config["num_hidden_layers"]) == (4, 4)
    assert short.lineage.depths == (0, 1, 4, 5, 6)
    assert len(short.config["layer_types"]) == 4
    for new, old in enumerate([0, 1, 4, 5]):
        for name in (n for n in weights.entries if n.startswith(f"model.layers.{old}.")):
            assert torch.equal(short[name.replace(f".{old}.", f".{new}.")], weights[name])
    assert sum(n.startswith("model.layers.") for n in short.entries) == 4 * 12
    assert weights.parameters - short.parameters == sum(
        weights[n].numel()
        for n in weights.entries
        if n.startswith(("model.layers.2.", "model.layers.3."))
    )
    assert short.cut([0, 2, 3]).lineage.depths == (0, 4, 5, 6)
    assert bool(torch.isfinite(logits(short, layout)).all())
    assert weights.depth == 6


def test_a_cut_that_keeps_all_layers_changes_nothing(llama: Model, layout: PackedTexts) -> None:
    assert torch.equal(logits(llama.weights.cut([0, 1]), layout), logits(llama.weights, layout))


def test_untie_gives_the_head_a_tensor_of_its_own(llama: Model, layout: PackedTexts) -> None:
    loose = llama.weights.untie()
    assert (llama.weights.tied, loose.tied) == (True, False)
    assert loose.config["tie_word_embeddings"] is False
    assert loose.parameters == llama.weights.parameters + 64 * 32
    assert torch.equal(loose["lm_head.weight"], llama.weights["model.embed_tokens.weight"])
    assert torch.equal(logits(loose, layout), logits(llama.weights, layout))
    assert loose.untie() is loose


EDITS: dict[str, Callable[[Weights], Weights]] = {
    "nothing": lambda w: w,
    "fold": lambda w: w.fold({"residual": Rotation(random_rotation(32))}),
    "cut": lambda w: w.cut([1]),
    "cut and edit": lambda w: w.cut([1]).edit({NORM: 2.0 * w[NORM].double()}),
    "untie": lambda w: w.untie(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_what_was_stored_is_restored(
    llama: Model, tmp_path: Path, edit: Callable[[Weights], Weights]
) -> None:
    edited = edit(llama.weights)
    out = pico_output(tmp_path / "runs")
    info = json.loads(json.dumps(edited.store(out, torch.float64)))
    again = restore_weights(
        info, open_folder(llama.folder, llama.config, llama.adapter), tmp_path / "runs"
    )
    assert largest_change(again, edited) == 0.0
    assert (again.config, again.lineage.depths, again.tied) == (
        dict(edited.config),
        edited.lineage.depths,
        edited.tied,
    )
    assert (again.lineage.basis is None) == (edited.lineage.basis is None)
    if edited.lineage.basis is not None:
        assert torch.equal(again.lineage.basis, edited.lineage.basis)  # type: ignore[arg-type]
    files = [name for name in out.used if name.endswith("changed.safetensors")]
    changed = {name for name, entry in edited.entries.items() if entry.stored is None}
    assert set(load_file(tmp_path / "runs" / files[0])) == changed


@kinds
@ties
@pytest.mark.parametrize(
    "room", [None, 20_000, 1], ids=["one shard", "several shards", "a shard per tensor"]
)
def test_a_saved_folder_is_the_same_model_to_plain_transformers(
    tmp_path: Path,
    layout: PackedTexts,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    tied: bool,
    room: int | None,
) -> None:
    if room:
        monkeypatch.setattr(weights_module, "SHARD_BYTES", room)
    model = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied)
    saved = tmp_path / "saved"
    save_folder(model.weights, model.folder, saved)
    shards = sorted(p.name for p in saved.glob("*.safetensors"))
    index = saved / "model.safetensors.index.json"
    assert index.is_file() is bool(room)
    if room:
        where = json.loads(index.read_text(encoding="utf-8"))
        assert len(shards) > 2
        assert len(shards) == len(model.weights.entries) or room > 1
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        assert {n: h.file.name for n, h in folder_headers(saved).items()} == where["weight_map"]
        assert where["metadata"]["total_size"] == 4 * model.weights.parameters
    assert_saves_equal(saved, model.folder, layout, 0.0)
    assert largest_change(open_model(ModelRef(model=str(saved))).weights, model.weights) == 0.0


@kinds
@ties
def test_a_saved_fold_has_the_logits_of_the_original(
    tmp_path: Path, layout: PackedTexts, model_type: str, tied: bool
) -> None:
    model = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied)
    folded = model.weights.fold({"residual": Rotation(random_rotation(32)), **neuron_maps(2)})
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
    rounded = llama.weights.edit(
        {n: llama.weights[n].bfloat16().float() for n in llama.weights.entries}
    )
    save_folder(rounded, llama.folder, tmp_path / "rounded")
    made, expected = (
        plain_logits(tmp_path / "saved", layout, torch.bfloat16),
        plain_logits(tmp_path / "rounded", layout),
    )
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)


def test_the_adapter_names_every_difference_of_a_checkpoint(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.gate_prj.weight"] = tensors.pop(
        "model.layers.0.mlp.gate_proj.weight"
    )
    tensors[GAIN] = torch.ones(31)
    del tensors[NORM]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SetupError) as told:
        open_model(ModelRef(model=str(folder)))
    message = str(told.value)
    assert str(folder) in message
    assert "model.layers.0.mlp.gate_proj.weight is missing (expected [48, 32])" in message
    assert f"{NORM} is missing (expected [32])" in message
    assert f"{GAIN} has shape [31], expected [32]" in message
    assert (
        'gate_prj.weight is not in the table. Did you mean "model.layers.0.mlp.gate_proj.weight"?'
        in message
    )


def test_a_checkpoint_with_many_differences_tells_how_many_more_there_are(llama: Model) -> None:
    with pytest.raises(SetupError, match=r"here: .*; and \d+ more"):
        llama.adapter.check(llama.config, {}, "here")


def test_an_untied_config_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8"
    )
    with pytest.raises(SetupError, match=r"lm_head.weight is missing \(expected \[64, 32\]\)"):
        open_model(ModelRef(model=str(folder)))


def test_a_second_copy_of_a_tied_head_is_ignored(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": torch.zeros(64, 32)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    weights = open_model(ModelRef(model=str(folder))).weights
    assert weights.tied
    assert torch.equal(weights.head(), tensors["model.embed_tokens.weight"])


SHAPES = {
    "grouped": {},
    "one group": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 12},
}


@kinds
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("invertible", [False, True], ids=["orthogonal", "any invertible"])
def test_a_scrambled_model_is_the_same_model(
    tmp_path: Path, layout: PackedTexts, model_type: str, shape: dict[str, int], invertible: bool
) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    weights = pico_model(tmp_path / "model", model_type, **shape, **biases).weights
    scrambled, planted = scramble(weights, 5, invertible)
    assert set(planted) == {"residual"} | {
        f"{s}.{i}" for s in ("q", "kv", "neurons", "value", "key", "up") for i in range(2)
    }
    torch.testing.assert_close(
        logits(scrambled, layout), logits(weights, layout), rtol=0, atol=1e-9
    )
    assert all(float((scrambled[n] - weights[n]).abs().max()) > 0.01 for n in weights.entries)
    assert scrambled.undo is not None
    assert largest_change(scrambled.unfold(scrambled.undo), weights) <= 1e-12
