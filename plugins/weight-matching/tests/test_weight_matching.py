"""A scrambled model is brought back from its weights alone: assignments exactly, weights closely, and the average is the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_weight_matching.step import WeightMatching, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Maps, Permutation, Rotation
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    logits,
    pico_head,
    pico_model,
    pico_output,
    pico_samples,
    pico_texts,
    random_rotation,
    reopen,
    run_recipe,
    save_folder,
    scramble,
)

EYE = torch.eye(32, dtype=torch.float64)
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {}, "one group": {"num_key_value_heads": 1}, "no groups": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 12}, "untied": {"tie_word_embeddings": False}, "few tokens": {"vocab_size": 24},
}  # fmt: skip
LAYOUT = pico_samples(texts=6, vocabulary=24).layout


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def folded(weights: Weights, maps: Maps) -> Weights:
    inner = {space: found for space, found in maps.items() if not space.startswith("residual.")}
    return weights.fold({"residual": maps.tied() or Rotation(EYE), **inner})


def farthest(one: Weights, two: Weights) -> float:
    """Return the largest relative distance of a parameter."""
    return max(float((one[n] - two[n]).norm() / two[n].norm()) for n in two.entries)


def restored(
    weights: Weights, pair: Pair, root: Path, **options: Any
) -> tuple[Weights, Maps, dict[str, Any]]:
    out = pico_output(root)
    maps = WeightMatching(**options).align(weights, Maps(), pair, out, quiet)
    for space, found in maps.items():
        found.verify(1e-5, space)
    return folded(weights, maps), maps, out.notes


def average(one: Weights, two: Weights) -> Weights:
    return one.edit({name: (one[name] + two[name]) / 2 for name in one.entries})


def change(one: Weights, two: Weights) -> float:
    return float((logits(one, LAYOUT) - logits(two, LAYOUT)).abs().max())


def divergence(one: Weights, two: Weights) -> float:
    p, q = (logits(weights, LAYOUT).log_softmax(-1) for weights in (two, one))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_is_an_aligner() -> None:
    assert steps() == [WeightMatching]
    assert stage_of(WeightMatching) == "align"


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_scrambled_checkpoint_is_brought_back_from_its_weights(
    tmp_path: Path, model_type: str, shape: dict[str, Any]
) -> None:
    model = pico_model(tmp_path / "model", model_type, **shape)
    weights, planted = scramble(model.weights, 3)
    save_folder(weights, model.folder, tmp_path / "scrambled")
    student = open_model(ModelRef(model=str(tmp_path / "scrambled")))
    back, maps, notes = restored(student.weights, Pair(model, student), tmp_path / "runs")
    for space, found in planted.items():
        if isinstance(found, Permutation):
            assert torch.equal(maps[space].index, found.invert().index), space  # type: ignore[union-attr]
    original = folded(model.weights, Maps())
    assert farthest(back, original) < 1e-5
    assert notes["settled"]
    assert notes["distance"] < 1e-5 < 0.1 < notes["distance_stream_alone"]
    assert change(average(back, original), model.weights) < 1e-4
    assert change(average(student.weights, original), model.weights) > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_any_invertible_value_gauge_is_found(tmp_path: Path, seed: int) -> None:
    model = pico_model(tmp_path / "model", "qwen2", seed=seed)
    weights, _ = scramble(model.weights, seed, invertible=True)
    back, _, notes = restored(weights, Pair(model, model), tmp_path / "runs", value="invertible")
    assert farthest(back, folded(model.weights, Maps())) < 1e-10
    assert notes["rounds"] == 1


@pytest.mark.parametrize("shape", [{}, {"vocab_size": 24}], ids=["many tokens", "few tokens"])
def test_noise_on_all_weights_is_no_obstacle(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = pico_model(tmp_path / "model", **shape)
    weights, planted = scramble(model.weights, 5)
    maker = torch.Generator().manual_seed(0)
    noisy = weights.edit(
        {
            n: weights[n] * (1 + 1e-2 * torch.randn(weights[n].shape, generator=maker))
            for n in weights.entries
        }
    )
    back, maps, notes = restored(noisy, Pair(model, model), tmp_path / "runs")
    assert all(
        torch.equal(maps[s].index, m.invert().index)
        for s, m in planted.items()
        if isinstance(m, Permutation)
    )  # type: ignore[union-attr]
    original = folded(model.weights, Maps())
    assert farthest(back, original) < 5e-2
    assert notes["settled"]
    assert divergence(average(back, original), model.weights) < 0.02 * divergence(
        average(noisy, original), model.weights
    )


def test_unlike_models_keep_their_logits(tmp_path: Path) -> None:
    pair = Pair(pico_model(tmp_path / "t", seed=9), pico_model(tmp_path / "s", "qwen2", seed=1))
    back, _, notes = restored(pair.student.weights, pair, tmp_path / "runs", rounds=2)
    assert change(back, pair.student.weights) < 1e-9
    assert notes["distance"] < notes["distance_stream_alone"]
    assert notes["rounds"] <= 2


@pytest.mark.parametrize(
    "other",
    [
        {"hidden_size": 48},
        {"intermediate_size": 64},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
    ],
)
def test_models_of_two_shapes_are_refused(tmp_path: Path, other: dict[str, int]) -> None:
    pair = Pair(pico_model(tmp_path / "t", **other), pico_model(tmp_path / "s"))
    with pytest.raises(RecipeError, match="needs models of one shape"):
        restored(pair.student.weights, pair, tmp_path / "runs")


def test_a_student_in_another_basis_is_refused(tmp_path: Path) -> None:
    model: Model = pico_model(tmp_path / "model")
    turned = model.weights.fold({"residual": Rotation(random_rotation(32))})
    with pytest.raises(RecipeError, match="put it before basis-fold"):
        restored(turned, Pair(model, model), tmp_path / "runs")


RECIPE = (
    pico_head("{name}", "{root}/model", "{root}/scrambled")
    + """
student.save_dtype = "float32"
[[step]]
use = "residuals"
{align}
[[step]]
use = "basis-fold"
"""
)
ALIGNERS = {
    "weights": ["weight-matching"], "activations": ["procrustes", "hungarian-permute", "head-gauge"],
}  # fmt: skip


@pytest.mark.parametrize("name", ALIGNERS)
def test_a_whole_run_brings_a_scrambled_checkpoint_back_and_certifies_it(
    tmp_path: Path, name: str
) -> None:
    model = pico_model(tmp_path / "model", attention_bias=True, tie_word_embeddings=False)
    save_folder(scramble(model.weights, 3)[0], model.folder, tmp_path / "scrambled")
    pico_texts(tmp_path / "texts")
    align = "\n".join(f'[[step]]\nuse = "{use}"' for use in ALIGNERS[name])
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(name=name, root=tmp_path, align=align), encoding="utf-8")
    for again in (False, True):
        outcome = run_recipe(path)
        done = outcome.steps["full", "basis-fold"]
        assert done.reused is again
        assert done.notes["folded"] == {
            "q": 2,
            "kv": 2,
            "neurons": 2,
            "value": 2,
            "key": 2,
            "up": 2,
        }
        assert done.report.certificate.logits_float64 <= 1e-9
        assert done.report.certificate.unfold <= 1e-12
    back = reopen(outcome.checkpoints["full"], model.weights)
    assert farthest(back, folded(model.weights, Maps())) < (1e-5 if name == "weights" else 1e-3)
