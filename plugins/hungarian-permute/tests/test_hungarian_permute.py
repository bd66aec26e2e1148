"""Planted permutations are recovered, by weights and by activations; other shapes are recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_hungarian_permute.step import HungarianPermute, steps
from safetensors.torch import load_file

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.linalg.maps import Map, Maps, Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    parametrize_with_checks,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
    save_folder,
    scramble,
)

criteria = pytest.mark.parametrize("criterion", ["weights", "activations"])
SHAPES = {
    "grouped": {},
    "one group": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
}


@parametrize_with_checks(
    HungarianPermute, {}, {"criterion": "activations", "max_texts": 4, "within_stage": 2}
)
def test_hungarian_permute_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def quiet(*_: object) -> None:
    """Ignore progress."""


def aligned(
    teacher: Model, student: Model, root: Path, maps: Maps | None = None, **options: Any
) -> tuple[Maps, dict[str, Any]]:
    out = pico_output(root)
    step, pair = HungarianPermute(max_texts=6, **options), Pair(teacher, student)
    maps = step.align(student.weights, maps or Maps(), pair, pico_samples(), out, quiet)
    return maps, out.notes


def scrambled(model: Model, folder: Path, seed: int = 3) -> tuple[Model, Mapping[str, Map]]:
    weights, planted = scramble(model.weights, seed)
    save_folder(weights, model.folder, folder)
    return open_model(ModelRef(model=str(folder))), planted


def stream_back(planted: Mapping[str, Map]) -> Maps:
    residual = planted["residual"].invert()
    return Maps({f"residual.{boundary}": residual for boundary in range(3)})


def references(maps: Maps) -> list[int | None]:
    return [figures.reference for _, figures in sorted(maps.diagnostics.items())]


def test_the_plugin_offers_the_step() -> None:
    assert steps() == [HungarianPermute]


@criteria
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_planted_permutations_are_recovered(
    tmp_path: Path, criterion: str, model_type: str, shape: dict[str, int]
) -> None:
    teacher = pico_model(tmp_path / "model", model_type, **shape)
    student, planted = scrambled(teacher, tmp_path / "scrambled")
    stream = stream_back(planted)
    maps, notes = aligned(teacher, student, tmp_path / "runs", stream, criterion=criterion)
    for space in (f"{kind}.{i}" for kind in ("q", "kv", "neurons") for i in range(2)):
        assert torch.equal(maps[space].index, planted[space].invert().index), space
        assert maps[space].square
    for layer in maps.diagnostics.values():
        for figures in (layer.heads, layer.neurons):
            assert figures.score == pytest.approx(1, abs=1e-4)
            assert figures.identity_score < 0.99 or figures.identity
            assert figures.random_score < 0.99
        assert not layer.neurons.identity
    assert notes["neurons"]["layers that change"] == notes["neurons"]["of"] == 2


@criteria
def test_a_model_matches_itself_by_the_identity(tmp_path: Path, criterion: str) -> None:
    model = pico_model(tmp_path / "model")
    maps, notes = aligned(model, model, tmp_path / "runs", criterion=criterion)
    for permutation in maps.values():
        assert torch.equal(permutation.index, torch.arange(len(permutation.index)))
    for layer in maps.diagnostics.values():
        assert layer.heads.identity
        assert layer.neurons.identity
    for part in ("heads", "neurons"):
        assert notes[part]["layers that change"] == 0
        assert notes[part]["score"] == pytest.approx(notes[part]["identity_score"])


@criteria
def test_other_shapes_get_an_assignment_that_no_fold_takes(tmp_path: Path, criterion: str) -> None:
    teacher = pico_model(
        tmp_path / "teacher",
        seed=9,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=64,
        head_dim=8,
        num_hidden_layers=5,
    )
    student = pico_model(tmp_path / "student", seed=1, head_dim=8)
    maps, _ = aligned(teacher, student, tmp_path / "runs", criterion=criterion)
    for i in range(2):
        q, kv, neurons = maps[f"q.{i}"], maps[f"kv.{i}"], maps[f"neurons.{i}"]
        assert (q.square, kv.square, neurons.square) == (False, True, False)
        assert (len(q.index), len(neurons.index)) == (64, 64)
        for assignment in (q, kv, neurons):
            assignment.verify(0.0, "here")
        heads = maps.diagnostics[i].heads.permutation
        assert sorted(head for head in heads if head >= 0) == [0, 1, 2, 3]
    assert references(maps) == [0, 2]


def test_heads_of_other_widths_are_in_the_figures_alone(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, head_dim=12)
    student = pico_model(tmp_path / "student", seed=1)
    maps, _ = aligned(teacher, student, tmp_path / "runs")
    assert set(maps) == {"neurons.0", "neurons.1"}
    assert len(maps.diagnostics[0].heads.permutation) == 4


def test_models_of_different_widths_need_a_map_of_the_stream(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, hidden_size=48)
    student = pico_model(tmp_path / "student")
    with pytest.raises(RecipeError, match="put procrustes before it"):
        aligned(teacher, student, tmp_path / "runs")
    wide = Rotation(random_rotation(48, 2)[:32])
    stream = Maps({f"residual.{boundary}": wide for boundary in range(3)})
    maps, _ = aligned(teacher, student, tmp_path / "with-map", stream)
    assert maps["neurons.0"].square


def test_a_folded_student_is_compared_in_its_present_basis(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    twin, planted = scrambled(model, tmp_path / "twin")
    folded = twin.weights.fold({"residual": Rotation(random_rotation(32, 8))})
    maps = HungarianPermute().align(
        folded,
        stream_back(planted),
        Pair(model, twin),
        pico_samples(),
        pico_output(tmp_path / "runs"),
        quiet,
    )
    assert torch.equal(maps["neurons.1"].index, planted["neurons.1"].invert().index)


def test_a_stage_matches_layers_that_changed_places(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=4)
    save_folder(model.weights.cut([1, 0, 2, 3]), model.folder, tmp_path / "swapped")
    swapped = open_model(ModelRef(model=str(tmp_path / "swapped")))
    maps, _ = aligned(model, swapped, tmp_path / "runs", within_stage=2)
    assert references(maps) == [1, 0, 2, 3]
    for layer in maps.diagnostics.values():
        assert layer.neurons.score == pytest.approx(1, abs=1e-5)


@criteria
def test_a_stage_matches_the_layers_of_one_model_in_order(tmp_path: Path, criterion: str) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=4)
    maps, _ = aligned(model, model, tmp_path / "runs", criterion=criterion, within_stage=3)
    assert references(maps) == [0, 1, 2, 3]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    broken = model.weights.edit({name: torch.full_like(model.weights[name], torch.nan)})
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    with pytest.raises(RotdistillError, match="NaN or Inf"):
        HungarianPermute().align(broken, Maps(), pair, pico_samples(), out, quiet)


def test_the_attention_of_one_text_is_kept_for_plots(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "model", num_hidden_layers=3)
    student, _ = scrambled(teacher, tmp_path / "scrambled")
    maps, _ = aligned(teacher, student, tmp_path / "runs", criterion="activations")
    for layer in range(3):
        figures = maps.diagnostics[layer]
        both = load_file(tmp_path / "runs" / figures.attention)
        assert both["student"].shape == both["teacher"].shape
        assert both["student"].shape[0] == 4
        assert bool((both["student"].triu(1) == 0).all())
        # Permuted, the student's heads are the teacher's.
        permuted = both["student"][list(figures.heads.permutation)]
        torch.testing.assert_close(permuted, both["teacher"], rtol=0, atol=1e-5)
        same = torch.allclose(both["student"], both["teacher"], atol=1e-2)
        assert not same or figures.heads.identity


def test_no_attention_is_kept_where_weights_are_compared(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    maps, _ = aligned(model, model, tmp_path / "runs")
    assert maps.diagnostics[0].attention is None


def test_a_stage_may_span_a_cut(tmp_path: Path) -> None:
    """Its layers lie far apart in the teacher, and the first of them is wanted again."""
    teacher = pico_model(tmp_path / "model", num_hidden_layers=12)
    save_folder(teacher.weights.cut([0, 1, 2, 11]), teacher.folder, tmp_path / "cut")
    student = open_model(ModelRef(model=str(tmp_path / "cut")))
    weights = teacher.weights.cut([0, 1, 2, 11])
    pair, out = Pair(teacher, teacher), pico_output(tmp_path / "runs")
    assert student.depth == weights.depth
    step = HungarianPermute(criterion="activations", within_stage=2)
    maps = step.align(weights, Maps(), pair, pico_samples(), out, quiet)
    assert references(maps) == [0, 1, 2, 11]
