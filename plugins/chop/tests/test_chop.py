"""Cutting layers out of pico models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rotdistill_chop.step import Chop, steps

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import RecipeError
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import pico_model, pico_output, pico_samples

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def samples() -> Samples:
    return pico_samples(texts=20)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def test_chop_is_a_fold_that_says_it_is_not_exact() -> None:
    assert steps() == [Chop]
    assert stage_of(Chop) == "fold"
    assert not Chop.exact


def chopped(
    layers: int | list[int], weights: Weights, pair: Pair, samples: Samples, root: Path
) -> tuple[Weights, StepOutput]:
    out = pico_output(root)
    return Chop(layers=layers).fold(weights, pair, samples, out, quiet), out


def test_chop_keeps_the_layers_it_is_given(tmp_path: Path, samples: Samples) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    short, out = chopped([0, 2, 5], model.weights, Pair(model, model), samples, tmp_path / "runs")
    assert short.lineage.depths == (0, 2, 5, 6)
    assert out.notes["layers kept"] == [0, 2, 5]
    assert torch.equal(short[DOWN], model.weights["model.layers.2.mlp.down_proj.weight"])


@pytest.mark.parametrize("idle", [(1, 2), (2, 3), (3, 4)])
def test_chop_cuts_the_run_of_layers_that_do_least(
    tmp_path: Path, samples: Samples, idle: tuple[int, int]
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    names = [
        f"model.layers.{i}.{part}.weight"
        for i in idle
        for part in ("mlp.down_proj", "self_attn.o_proj")
    ]
    weights = model.weights.edit({name: 1e-3 * model.weights[name] for name in names})
    short, out = chopped(4, weights, Pair(model, model), samples, tmp_path / "runs")
    assert out.notes["layers kept"] == [i for i in range(6) if i not in idle]
    angles = out.notes["angle over the cut, by first layer"]
    assert sorted(angles) == [0, 1, 2, 3, 4]
    assert min(angles, key=angles.__getitem__) == idle[0]
    assert short.lineage.depths == (*out.notes["layers kept"], 6)


@pytest.mark.parametrize(("layers", "kept"), [(6, [0, 1, 2, 3, 4, 5]), (2, [0, 5]), (1, [0])])
def test_chop_to_a_number_keeps_the_first_layer(
    tmp_path: Path, samples: Samples, layers: int, kept: list[int]
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=6)
    _, out = chopped(layers, model.weights, Pair(model, model), samples, tmp_path / "runs")
    assert out.notes["layers kept"] == kept


@pytest.mark.parametrize("layers", [3, [0, 2], [1, 0], [0, 0]])
def test_chop_refuses_layers_that_are_not_there(
    samples: Samples, tmp_path: Path, layers: int | list[int]
) -> None:
    model = pico_model(tmp_path / "model")
    with pytest.raises(RecipeError, match="chop: layers"):
        chopped(layers, model.weights, Pair(model, model), samples, tmp_path / "runs")
