"""A scrambled model is brought back from its weights alone, and its average is the model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rotdistill_weight_matching
import torch
from rotdistill_weight_matching._method import vocabulary_moments
from rotdistill_weight_matching.step import WeightMatching, steps

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Maps, Permutation, Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    STEP_CHECKS,
    PicoWorkspace,
    a_planted_rotation_is_found,
    logits,
    parametrize_with_checks,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
    reopen,
    save_folder,
    scramble,
)

EYE = torch.eye(32, dtype=torch.float64)
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one group": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 12},
    "untied": {"tie_word_embeddings": False},
    "few tokens": {"vocab_size": 24},
}
LAYOUT = pico_samples(texts=6, vocabulary=24).layout


@parametrize_with_checks(
    WeightMatching,
    {},
    {"max_rounds": 2, "value_gauge": "invertible"},
    checks=(*STEP_CHECKS, a_planted_rotation_is_found),
)
def test_weight_matching_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def quiet(*_: object) -> None:
    """Ignore progress."""


def folded(weights: Weights, maps: Maps) -> Weights:
    return weights.fold({"residual": maps.tied() or Rotation(EYE), **maps.inside_layers()})


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


def logit_change(one: Weights, two: Weights) -> float:
    return float((logits(one, LAYOUT) - logits(two, LAYOUT)).abs().max())


def divergence(one: Weights, two: Weights) -> float:
    p, q = (logits(weights, LAYOUT).log_softmax(-1) for weights in (two, one))
    return float((p.exp() * (p - q)).sum(-1).mean())


def assert_permutations_undone(maps: Maps, planted: dict[str, Any]) -> None:
    for space, found in planted.items():
        if isinstance(found, Permutation):
            assert torch.equal(maps[space].index, found.invert().index), space


def test_the_plugin_offers_the_step() -> None:
    assert steps() == [WeightMatching]


def test_the_package_offers_its_public_names_and_loads_torch_only_when_asked() -> None:
    assert rotdistill_weight_matching.WeightMatching is WeightMatching
    assert rotdistill_weight_matching.vocabulary_moments is vocabulary_moments
    code = (
        "import sys, rotdistill_weight_matching as package\n"
        "assert package.WeightMatching\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    assert_permutations_undone(maps, planted)
    original = folded(model.weights, Maps())
    assert farthest(back, original) < 1e-5
    assert notes["settled"]
    for layer in range(model.depth):
        figures = maps.diagnostics[layer].extra
        assert figures["distance"] < 1e-5 < 0.1 < figures["distance_stream_alone"]
    assert logit_change(average(back, original), model.weights) < 1e-4
    assert logit_change(average(student.weights, original), model.weights) > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_any_invertible_value_gauge_is_recovered(tmp_path: Path, seed: int) -> None:
    model = pico_model(tmp_path / "model", "qwen2", seed=seed)
    weights, _ = scramble(model.weights, seed, invertible=True)
    pair = Pair(model, model)
    back, _, notes = restored(weights, pair, tmp_path / "runs", value_gauge="invertible")
    assert farthest(back, folded(model.weights, Maps())) < 1e-10
    assert notes["rounds"] == 1


@pytest.mark.parametrize("shape", [{}, {"vocab_size": 24}], ids=["many tokens", "few tokens"])
def test_a_model_under_noise_is_brought_back(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = pico_model(tmp_path / "model", **shape)
    weights, planted = scramble(model.weights, 5)
    generator = torch.Generator().manual_seed(0)
    noisy = weights.edit(
        {
            n: weights[n] * (1 + 1e-2 * torch.randn(weights[n].shape, generator=generator))
            for n in weights.entries
        }
    )
    back, maps, notes = restored(noisy, Pair(model, model), tmp_path / "runs")
    assert_permutations_undone(maps, planted)
    original = folded(model.weights, Maps())
    assert farthest(back, original) < 5e-2
    assert notes["settled"]
    barrier_before = divergence(average(noisy, original), model.weights)
    assert divergence(average(back, original), model.weights) < 0.02 * barrier_before


def test_unlike_models_come_closer_and_keep_their_logits(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9)
    pair = Pair(teacher, pico_model(tmp_path / "student", "qwen2", seed=1))
    student = pair.student.weights
    back, maps, notes = restored(student, pair, tmp_path / "runs", max_rounds=2)
    assert logit_change(back, student) < 1e-9
    assert notes["rounds"] <= 2
    for layer in range(student.depth):
        figures = maps.diagnostics[layer].extra
        assert figures["distance"] < figures["distance_stream_alone"]


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
    teacher = pico_model(tmp_path / "teacher", **other)
    pair = Pair(teacher, pico_model(tmp_path / "student"))
    with pytest.raises(RecipeError, match="needs models of one shape"):
        restored(pair.student.weights, pair, tmp_path / "runs")


def test_a_student_in_another_basis_is_refused(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    turned = model.weights.fold({"residual": Rotation(random_rotation(32))})
    with pytest.raises(RecipeError, match="put it before basis-fold"):
        restored(turned, Pair(model, model), tmp_path / "runs")


STEPS = """
student.save_dtype = "float32"
[[step]]
use = "residuals"
{aligners}
[[step]]
use = "basis-fold"
"""
ALIGNERS = {
    "weights": ["weight-matching"],
    "activations": ["procrustes", "hungarian-permute", "head-gauge"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIGNERS)
def test_a_whole_run_brings_a_scrambled_checkpoint_back_and_certifies_it(
    tmp_path: Path, name: str
) -> None:
    model = pico_model(tmp_path / "model", attention_bias=True, tie_word_embeddings=False)
    save_folder(scramble(model.weights, 3)[0], model.folder, tmp_path / "scrambled")
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    aligners = "\n".join(f'[[step]]\nuse = "{use}"' for use in ALIGNERS[name])
    recipe = workspace.recipe(STEPS.format(aligners=aligners), student="scrambled")
    for again in (False, True):
        outcome = workspace.run(recipe)
        done = outcome.steps["full", "basis-fold"]
        assert done.reused is again
        certificate = done.report.certificate
        assert certificate is not None
        assert certificate.logits_float64 <= 1e-9
        assert certificate.unfold <= 1e-12
    back = reopen(outcome.checkpoints["full"], model.weights)
    tolerance = 1e-5 if name == "weights" else 1e-3
    assert farthest(back, folded(model.weights, Maps())) < tolerance
