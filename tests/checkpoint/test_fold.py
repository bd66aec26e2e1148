"""A fold keeps the logits and can be taken back, whatever the gains, ties and maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rotdistill_core.checkpoint.fold import Undo
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.linalg.maps import Map, Permutation, Rotation
from rotdistill_core.testing import final_states, logits, pico_model, random_rotation, scramble

GAIN = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
kinds = pytest.mark.parametrize("model_type", ["llama", "qwen2"])
ties = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def neuron_maps(seed: int = 3) -> dict[str, Map]:
    generator = torch.Generator().manual_seed(seed)
    return {f"neurons.{i}": Permutation(torch.randperm(48, generator=generator)) for i in range(2)}


def largest_change(one: Weights, two: Weights) -> float:
    assert set(one.entries) == set(two.entries)
    return max(float((one[n].double() - two[n].double()).abs().max()) for n in one.entries)


def taken_back(folded: Weights) -> Weights:
    assert folded.undo is not None
    return folded.unfold(folded.undo)


def assert_same_logits(one: Weights, two: Weights, layout: PackedTexts) -> None:
    torch.testing.assert_close(logits(one, layout), logits(two, layout), rtol=0, atol=1e-9)


@kinds
@ties
def test_a_random_rotation_of_the_stream_leaves_the_logits_equal(
    tmp_path: Path, layout: PackedTexts, model_type: str, tied: bool
) -> None:
    weights = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied).weights
    Q = random_rotation(32, 5)
    folded = weights.fold({"residual": Rotation(Q)})
    assert_same_logits(folded, weights, layout)
    states = final_states(weights, layout) @ Q
    torch.testing.assert_close(final_states(folded, layout), states, rtol=0, atol=1e-9)
    assert folded.lineage.basis is not None
    assert torch.equal(folded.lineage.basis, Q)


@kinds
@ties
def test_a_rotation_makes_readers_absorb_all_gains_and_unties_the_head(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    weights = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied).weights
    folded = weights.fold({"residual": Rotation(random_rotation(32, 5))})
    assert not folded.tied
    assert folded.config["tie_word_embeddings"] is False
    assert folded.undo is not None
    table = weights.adapter.expand(weights.config)
    assert set(folded.undo.gains) == {name for name, param in table.items() if param.is_gain}
    ones = torch.ones(32, dtype=torch.float64)
    assert all(torch.equal(folded[name], ones) for name in folded.undo.gains)


@kinds
@ties
def test_permuted_neurons_leave_the_logits_equal(
    tmp_path: Path, layout: PackedTexts, model_type: str, tied: bool
) -> None:
    weights = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied).weights
    maps = neuron_maps()
    folded = weights.fold(maps)
    assert_same_logits(folded, weights, layout)
    assert torch.equal(folded[DOWN], maps["neurons.1"].apply(weights[DOWN].double(), 1))
    assert not torch.equal(folded[DOWN], weights[DOWN].double())
    assert folded.tied is tied
    assert folded.lineage.basis is None
    assert largest_change(taken_back(folded), weights) == 0.0


@ties
def test_a_permutation_of_the_stream_carries_the_gains_along(
    tmp_path: Path, layout: PackedTexts, tied: bool
) -> None:
    weights = pico_model(tmp_path / "model", tie_word_embeddings=tied).weights
    P = Permutation(torch.randperm(32, generator=torch.Generator().manual_seed(4)))
    folded = weights.fold({"residual": P})
    assert_same_logits(folded, weights, layout)
    assert torch.equal(folded[GAIN], weights[GAIN].double()[P.index])
    assert folded.tied is tied
    assert folded.undo is not None
    assert not folded.undo.gains
    assert folded.lineage.basis is not None
    states = final_states(weights, layout) @ folded.lineage.basis
    torch.testing.assert_close(final_states(folded, layout), states, rtol=0, atol=1e-9)
    assert largest_change(taken_back(folded), weights) == 0.0


def test_two_folds_one_after_the_other_are_the_fold_of_their_product(
    llama: Model, layout: PackedTexts
) -> None:
    P, Q = random_rotation(32, 1), random_rotation(32, 2)
    first = llama.weights.fold({"residual": Rotation(P)})
    twice = first.fold({"residual": Rotation(Q), **neuron_maps()})
    once = llama.weights.fold({"residual": Rotation(P @ Q), **neuron_maps()})
    assert largest_change(twice, once) < 1e-12
    assert twice.lineage.basis is not None
    torch.testing.assert_close(twice.lineage.basis, P @ Q)
    assert_same_logits(twice, llama.weights, layout)


PLANTED_GAINS = {
    "as they are": None,
    "zero": (0.0, 0.0),
    "tiny": (1e-6, -1e-6),
    "mixed": (0.0, 1e-6),
}


def with_gains(weights: Weights, values: tuple[float, float]) -> Weights:
    """Return the view with two gains of every norm replaced."""
    edited = {}
    table = weights.adapter.expand(weights.config)
    for k, name in enumerate(name for name, param in table.items() if param.is_gain):
        edited[name] = weights[name].clone()
        edited[name][[k, 31]] = torch.tensor(values)
    return weights.edit(edited)


@kinds
@ties
@pytest.mark.parametrize("values", PLANTED_GAINS.values(), ids=list(PLANTED_GAINS))
def test_unfold_gives_the_weights_back_even_where_gains_are_zero(
    tmp_path: Path,
    layout: PackedTexts,
    model_type: str,
    tied: bool,
    values: tuple[float, float] | None,
) -> None:
    weights = pico_model(tmp_path / "model", model_type, tie_word_embeddings=tied).weights
    if values is not None:
        weights = with_gains(weights, values)
    folded = weights.fold({"residual": Rotation(random_rotation(32, 7)), **neuron_maps()})
    back = taken_back(folded)
    assert largest_change(back, weights) <= 1e-12
    assert back.tied is tied
    assert dict(back.config) == {**weights.config, "tie_word_embeddings": tied}
    assert back.lineage.basis is not None
    torch.testing.assert_close(back.lineage.basis, torch.eye(32, dtype=torch.float64))
    assert_same_logits(folded, weights, layout)


def test_a_record_of_a_fold_survives_as_tensors(llama: Model) -> None:
    weights = with_gains(llama.weights, (0.0, 1e-6))
    undo = weights.fold({"residual": Rotation(random_rotation(32, 7)), **neuron_maps()}).undo
    assert undo is not None
    again = Undo.from_tensors(undo.tensors(), undo.config, undo.offset)
    assert again.maps.keys() == undo.maps.keys()
    assert again.columns.keys() == undo.columns.keys() != set()
    stored, restored = undo.tensors(), again.tensors()
    assert stored.keys() == restored.keys()
    assert all(torch.equal(stored[name], restored[name]) for name in stored)


SHAPES: dict[str, dict[str, int]] = {
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
    inner = {f"{s}.{i}" for s in ("q", "kv", "neurons", "value", "key", "up") for i in range(2)}
    assert set(planted) == {"residual"} | inner
    assert_same_logits(scrambled, weights, layout)
    assert all(float((scrambled[n] - weights[n]).abs().max()) > 0.01 for n in weights.entries)
    assert largest_change(taken_back(scrambled), weights) <= 1e-12
