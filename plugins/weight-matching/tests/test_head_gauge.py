"""Planted gauges are found again, bring scrambled weights back, and are exact to fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_weight_matching.head_gauge import HeadGauge, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.linalg.maps import Gauge, Maps, Rotation
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.testing import logits, pico_model, pico_output, pico_samples, scramble

SHAPES = {
    "grouped": {},
    "one group": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
}
EYE = torch.eye(32, dtype=torch.float64)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def solved(
    weights: Weights, pair: Pair, root: Path, maps: Maps | None = None, **options: Any
) -> tuple[Maps, dict[str, Any]]:
    out = pico_output(root)
    return HeadGauge(**options).align(weights, maps or Maps(), pair, out, quiet), out.notes


def folded(weights: Weights, maps: Maps) -> Weights:
    """Fold all maps, and the identity where there is none for the stream, so that gains are absorbed alike."""
    return weights.fold(
        {
            "residual": maps.tied() or Rotation(EYE),
            **{s: m for s, m in maps.items() if not s.startswith("residual.")},
        }
    )


def largest(one: Weights, two: Weights) -> float:
    """Return the largest relative distance of a parameter."""
    return max(float((one[n] - two[n]).norm() / two[n].norm()) for n in two.entries)


def unscrambling(model: Model, seed: int, invertible: bool) -> tuple[Weights, Maps]:
    """Return the scrambled model and the way back of everything but the gauges."""
    weights, planted = scramble(model.weights, seed, invertible)
    back = {
        space: found.invert() for space, found in planted.items() if not isinstance(found, Gauge)
    }
    residual = back.pop("residual")
    return weights, Maps({**{f"residual.{b}": residual for b in range(3)}, **back})


def test_it_is_an_aligner() -> None:
    assert steps() == [HeadGauge]
    assert stage_of(HeadGauge) == "align"


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("value", ["orthogonal", "invertible"])
def test_planted_gauges_are_taken_back(
    tmp_path: Path, model_type: str, shape: dict[str, int], value: str
) -> None:
    model = pico_model(tmp_path / "model", model_type, **shape)
    weights, known = unscrambling(model, 3, value == "invertible")
    maps, notes = solved(weights, Pair(model, model), tmp_path / "runs", known, value=value)
    restored, original = folded(weights, maps), folded(model.weights, Maps())
    assert largest(restored, original) < 1e-10
    layout = pico_samples(texts=5).layout
    torch.testing.assert_close(
        logits(restored, layout), logits(model.weights, layout), rtol=0, atol=1e-9
    )
    for name in ("value", "key", "up"):
        assert notes[name]["distance_after"] < 1e-10
        assert notes[name]["distance_before"] > 0.1
        assert notes[name]["distance_chance"] > 0.3


def test_only_the_gauges_asked_for_are_solved(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    maps, _ = solved(model.weights, Pair(model, model), tmp_path / "runs", gauges=["up"])
    assert set(maps) == {"up.0", "up.1"}
    torch.testing.assert_close(maps["up.0"].blocks, torch.ones(48, 1, 1, dtype=torch.float64))  # type: ignore[union-attr]


@pytest.mark.parametrize("value", ["orthogonal", "invertible"])
def test_noise_on_the_weights_moves_the_gauges_little(tmp_path: Path, value: str) -> None:
    model = pico_model(tmp_path / "model")
    weights, known = unscrambling(model, 4, value == "invertible")
    maker = torch.Generator().manual_seed(0)
    noisy = {
        n: weights[n] * (1 + 1e-2 * torch.randn(weights[n].shape, generator=maker))
        for n in weights.entries
    }
    maps, _ = solved(weights.edit(noisy), Pair(model, model), tmp_path / "runs", known, value=value)
    assert largest(folded(weights, maps), folded(model.weights, Maps())) < 5e-2


def test_unlike_models_come_closer_and_keep_their_logits(tmp_path: Path) -> None:
    pair = Pair(pico_model(tmp_path / "t", seed=9), pico_model(tmp_path / "s", "qwen2", seed=1))
    maps, notes = solved(pair.student.weights, pair, tmp_path / "runs")
    layout = pico_samples(texts=5).layout
    after = folded(pair.student.weights, maps)
    torch.testing.assert_close(
        logits(after, layout), logits(pair.student.weights, layout), rtol=0, atol=1e-9
    )
    assert all(figures["distance_after"] < figures["distance_before"] for figures in notes.values())
    for found in maps.values():
        found.verify(1e-5, "here")


def test_what_has_another_shape_is_left_alone(tmp_path: Path) -> None:
    student = pico_model(tmp_path / "s")
    other_heads = Pair(pico_model(tmp_path / "t", seed=9, num_key_value_heads=4), student)
    assert set(solved(student.weights, other_heads, tmp_path / "runs")[0]) == {"up.0", "up.1"}
    other = Pair(
        pico_model(tmp_path / "u", seed=9, num_key_value_heads=4, intermediate_size=64), student
    )
    with pytest.raises(RecipeError, match="neither heads nor neurons of one shape"):
        solved(student.weights, other, tmp_path / "runs2")


def test_neurons_that_are_zero_keep_the_factor_one(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    dead = model.weights.edit({name: model.weights[name].index_fill(0, torch.tensor([5]), 0.0)})
    maps, _ = solved(dead, Pair(model, model), tmp_path / "runs")
    assert float(maps["up.0"].blocks[5]) == 1.0  # type: ignore[union-attr]
    maps["up.0"].verify(1e-9, "here")


def test_weights_that_are_not_finite_are_refused_with_their_layer(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    name = "model.layers.1.self_attn.v_proj.weight"
    broken = model.weights.edit({name: torch.full_like(model.weights[name], torch.inf)})
    with pytest.raises(RotdistillError, match=r"head-gauge: layer 1: value: .* NaN or Inf"):
        solved(broken, Pair(model, model), tmp_path / "runs")
