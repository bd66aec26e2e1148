"""The step as a whole: which layers and sizes it keeps, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_chop._size import Size
from rotdistill_chop.step import Chop, steps

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.plugin.step import check_models, stage_of
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    logits,
    parametrize_with_checks,
    pico_model,
    plain_transformers,
    random_rotation,
    save_folder,
)

Cut = Callable[..., Weights]
Scale = Callable[[Weights, tuple[int, ...], float], Weights]
CUTS: tuple[dict[str, Any], ...] = (
    {"neurons": 40},
    {"kv_heads": 1},
    {"width": 28},
    {"layers": 2, "neurons": 30, "kv_heads": 1, "width": 24},
)
# Norms after attention and MLP rule a narrower stream of Gemma out.
POSSIBLE = [
    (model_type, options)
    for model_type in ("llama", "qwen2", "qwen3", "gemma3_text")
    for options in CUTS
    if model_type != "gemma3_text" or "width" not in options
]


@parametrize_with_checks(
    Chop,
    {"layers": 1},
    {"layers": 1, "criterion": "kl"},
    {"neurons": 30, "kv_heads": 1},
    {"width": 24},
    {"keep_fraction": 0.6},
)
def test_chop_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_chop_is_an_inexact_fold() -> None:
    assert steps() == [Chop]
    assert stage_of(Chop) == "fold"
    assert not Chop.exact


def test_listed_layers_are_kept(deep: Model, chop: Cut, out: StepOutput) -> None:
    short = chop(deep, layers=[0, 2, 5])
    assert short.lineage.depths == (0, 2, 5, 6)
    assert out.notes["layers kept"] == [0, 2, 5]
    down = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(short[down.format(1)], deep.weights[down.format(2)])


@pytest.mark.parametrize("idle", [(1, 2), (2, 3), (3, 4)])
def test_angle_cuts_the_run_of_layers_that_do_least(
    deep: Model, chop: Cut, scale_layers: Scale, idle: tuple[int, int]
) -> None:
    short = chop(deep, scale_layers(deep.weights, idle, 1e-3), layers=4)
    assert short.lineage.depths == (*(i for i in range(6) if i not in idle), 6)


@pytest.mark.parametrize("idle", [(1, 3), (1, 4), (2, 3), (2, 4)])
def test_kl_cuts_layers_that_do_nothing_wherever_they_are(
    deep: Model, chop: Cut, scale_layers: Scale, out: StepOutput, idle: tuple[int, int]
) -> None:
    short = chop(deep, scale_layers(deep.weights, idle, 0.0), layers=4, criterion="kl")
    assert short.lineage.depths == (*(i for i in range(6) if i not in idle), 6)
    assert out.notes["KL by number of layers cut"]["2"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("layers", "kept"), [(6, [0, 1, 2, 3, 4, 5]), (2, [0, 5]), (1, [0])])
def test_number_of_layers_keeps_the_first(
    deep: Model, chop: Cut, layers: int, kept: list[int]
) -> None:
    assert chop(deep, layers=layers).lineage.depths == (*kept, 6)


@pytest.mark.parametrize("layers", [4, [0, 3], [1, 0], [0, 0]], ids=str)
def test_layers_that_the_student_lacks_are_refused(
    llama: Model, chop: Cut, layers: int | list[int]
) -> None:
    with pytest.raises(RecipeError, match="chop: layers"):
        chop(llama, layers=layers)


@pytest.mark.parametrize(("model_type", "options"), POSSIBLE, ids=str)
def test_transformers_loads_the_cut_model_and_computes_the_same(
    chop: Cut, samples: Samples, tmp_path: Path, model_type: str, options: dict[str, int]
) -> None:
    model = pico_model(tmp_path / "model", model_type, num_hidden_layers=3)
    cut = chop(model, **options)
    save_folder(cut, model.folder, tmp_path / "cut", torch.float64)
    layout = samples.layout.select(Split.HELDOUT, limit=3)
    _, expected = plain_transformers(cut.adapter, tmp_path / "cut", layout)
    torch.testing.assert_close(logits(cut, layout), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("model_type", "options"), POSSIBLE, ids=str)
def test_cut_model_has_the_size_asked_for_and_its_parameters(
    chop: Cut, tmp_path: Path, model_type: str, options: dict[str, int]
) -> None:
    model = pico_model(tmp_path / "model", model_type, num_hidden_layers=3)
    cut = chop(model, **options)
    assert Size.of(cut) == Size.of(model.weights)._replace(**options)
    assert Size.of(cut).parameters(model.weights).total == cut.parameters
    untied_head = 0 if cut.tied else cut["lm_head.weight"].numel()
    assert cut.parameters - untied_head < model.weights.parameters


def test_narrower_stream_of_gemma_is_refused(chop: Cut, tmp_path: Path) -> None:
    gemma = pico_model(tmp_path / "model", "gemma3_text", num_hidden_layers=3)
    with pytest.raises(RecipeError, match="cannot be rotated"):
        check_models(Chop(width=28), Pair(gemma, gemma))
    with pytest.raises(RecipeError, match="cannot be rotated"):
        chop(gemma, width=28)


def test_basis_of_an_earlier_fold_carries_over_to_the_cut_stream(llama: Model, chop: Cut) -> None:
    turned = llama.weights.fold({"residual": Rotation(random_rotation(32, 8))})
    one = chop(llama, width=24).lineage.basis
    two = chop(llama, turned, width=24).lineage.basis
    assert one is not None
    assert two is not None
    # Both name the same subspace of the original stream.
    torch.testing.assert_close(two @ two.T, one @ one.T, rtol=0, atol=1e-4)


def test_narrower_stream_of_another_model_is_its_own_basis(
    llama: Model, samples: Samples, out: StepOutput, tmp_path: Path
) -> None:
    other = pico_model(tmp_path / "other", num_hidden_layers=3, seed=1)
    cut = Chop(width=24).fold(other.weights, Pair(llama, other), samples, out, lambda *_: None)
    assert cut.lineage.basis is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neurons": 49}, "neurons = 49, but the student has 48"),
        ({"kv_heads": 3}, "kv_heads = 3, but the student has 2"),
        ({"width": 33}, "width = 33, but the student has 32"),
        ({"width": 30}, "transformers refuses width = 30"),
        ({"keep_fraction": 0.01}, r"keep_fraction = 0\.01 leaves less than two layers"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_met_are_refused(
    llama: Model, chop: Cut, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        chop(llama, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "say what stays"), ({"keep_fraction": 0.5, "neurons": 3}, "leave out neurons")],
    ids=str,
)
def test_step_without_a_size_or_with_two_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chop(**options)
