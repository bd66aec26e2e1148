"""Planted gauges are recovered, bring scrambled weights back, and are exact to fold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_weight_matching._head_gauge import reference_layer
from rotdistill_weight_matching.head_gauge import HeadGauge, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.linalg.diagnostics import GaugeDiagnostics, LayerDiagnostics
from rotdistill_core.linalg.maps import Gauge, Maps, Rotation
from rotdistill_core.testing import (
    logits,
    parametrize_with_checks,
    pico_model,
    pico_output,
    pico_samples,
    scramble,
)

SHAPES = {
    "grouped": {},
    "one group": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
}
EYE = torch.eye(32, dtype=torch.float64)


@parametrize_with_checks(HeadGauge, {}, {"gauges": ["value", "up"], "value_gauge": "invertible"})
def test_head_gauge_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def quiet(*_: object) -> None:
    """Ignore progress."""


def solved(
    weights: Weights, pair: Pair, root: Path, maps: Maps | None = None, **options: Any
) -> Maps:
    out = pico_output(root)
    return HeadGauge(**options).align(weights, maps or Maps(), pair, out, quiet)


def gauge_figures(maps: Maps) -> list[GaugeDiagnostics]:
    return [each for layer in maps.diagnostics.values() for each in layer.gauges.values()]


def folded(weights: Weights, maps: Maps) -> Weights:
    """Fold all maps, and the identity of a stream without one, so that gains are absorbed alike."""
    return weights.fold({"residual": maps.tied() or Rotation(EYE), **maps.inside_layers()})


def farthest(one: Weights, two: Weights) -> float:
    """Return the largest relative distance of a parameter."""
    return max(float((one[n] - two[n]).norm() / two[n].norm()) for n in two.entries)


def unscrambling(model: Model, seed: int, invertible: bool) -> tuple[Weights, Maps]:
    """Return the scrambled model, and the maps back of everything but the gauges."""
    weights, planted = scramble(model.weights, seed, invertible)
    back = {space: m.invert() for space, m in planted.items() if not isinstance(m, Gauge)}
    residual = back.pop("residual")
    return weights, Maps({**{f"residual.{b}": residual for b in range(3)}, **back})


def test_the_plugin_offers_the_step() -> None:
    assert steps() == [HeadGauge]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("value_gauge", ["orthogonal", "invertible"])
def test_planted_gauges_are_taken_back(
    tmp_path: Path, model_type: str, shape: dict[str, int], value_gauge: Any
) -> None:
    model = pico_model(tmp_path / "model", model_type, **shape)
    weights, known = unscrambling(model, 3, invertible=value_gauge == "invertible")
    pair = Pair(model, model)
    maps = solved(weights, pair, tmp_path / "runs", known, value_gauge=value_gauge)
    restored, original = folded(weights, maps), folded(model.weights, Maps())
    assert farthest(restored, original) < 1e-10
    layout = pico_samples(texts=5).layout
    before = logits(model.weights, layout)
    torch.testing.assert_close(logits(restored, layout), before, rtol=0, atol=1e-9)
    assert set(maps.diagnostics[0].gauges) == {"value", "key", "up"}
    for figures in gauge_figures(maps):
        assert figures.distance_after < 1e-10
        assert figures.distance_before > 0.1
        assert figures.distance_chance > 0.3


def test_only_the_gauges_asked_for_are_solved(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    maps = solved(model.weights, Pair(model, model), tmp_path / "runs", gauges=["up"])
    assert set(maps) == {"up.0", "up.1"}
    torch.testing.assert_close(maps["up.0"].blocks, torch.ones(48, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("value_gauge", ["orthogonal", "invertible"])
def test_noise_on_the_weights_moves_the_gauges_little(tmp_path: Path, value_gauge: Any) -> None:
    model = pico_model(tmp_path / "model")
    weights, known = unscrambling(model, 4, invertible=value_gauge == "invertible")
    generator = torch.Generator().manual_seed(0)
    noisy = {
        n: weights[n] * (1 + 1e-2 * torch.randn(weights[n].shape, generator=generator))
        for n in weights.entries
    }
    pair = Pair(model, model)
    maps = solved(weights.edit(noisy), pair, tmp_path / "runs", known, value_gauge=value_gauge)
    assert farthest(folded(weights, maps), folded(model.weights, Maps())) < 5e-2


def test_unlike_models_come_closer_and_keep_their_logits(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9)
    pair = Pair(teacher, pico_model(tmp_path / "student", "qwen2", seed=1))
    student = pair.student.weights
    maps = solved(student, pair, tmp_path / "runs")
    layout = pico_samples(texts=5).layout
    after = logits(folded(student, maps), layout)
    torch.testing.assert_close(after, logits(student, layout), rtol=0, atol=1e-9)
    for figures in gauge_figures(maps):
        assert figures.distance_after < figures.distance_before
    for gauge in maps.values():
        gauge.verify(1e-5, "here")


def test_heads_of_another_shape_keep_their_gauges(tmp_path: Path) -> None:
    student = pico_model(tmp_path / "student")
    teacher = pico_model(tmp_path / "teacher", seed=9, num_key_value_heads=4)
    maps = solved(student.weights, Pair(teacher, student), tmp_path / "runs")
    assert set(maps) == {"up.0", "up.1"}


def test_models_without_a_shared_gauge_are_refused(tmp_path: Path) -> None:
    student = pico_model(tmp_path / "student")
    shape = {"num_key_value_heads": 4, "intermediate_size": 64}
    teacher = pico_model(tmp_path / "teacher", seed=9, **shape)
    with pytest.raises(RecipeError, match="neither heads nor neurons of one shape"):
        solved(student.weights, Pair(teacher, student), tmp_path / "runs")


def test_neurons_that_are_zero_keep_the_factor_one(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    dead = model.weights.edit({name: model.weights[name].index_fill(0, torch.tensor([5]), 0.0)})
    maps = solved(dead, Pair(model, model), tmp_path / "runs")
    assert float(maps["up.0"].blocks[5]) == 1.0
    maps["up.0"].verify(1e-9, "here")


def test_weights_that_are_not_finite_are_refused_with_their_layer(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    name = "model.layers.1.self_attn.v_proj.weight"
    broken = model.weights.edit({name: torch.full_like(model.weights[name], torch.inf)})
    with pytest.raises(RotdistillError, match=r"head-gauge: layer 1: value: .* NaN or Inf"):
        solved(broken, Pair(model, model), tmp_path / "runs")


def test_a_layer_is_compared_with_the_one_that_an_earlier_step_matched() -> None:
    maps = Maps({}, {0: LayerDiagnostics(reference=3), 1: LayerDiagnostics()})
    assert [reference_layer(maps, layer, default=7) for layer in range(3)] == [3, 7, 7]
