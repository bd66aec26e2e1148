"""Planted permutations are found again, by weights and by activations; assignments are optimal; other shapes are recorded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_hungarian_permute.step import HungarianPermute, steps
from safetensors.torch import load_file

from rotdistill_core.alignment.assignment import assign, assign_heads
from rotdistill_core.architecture.table import HeadLayout
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.linalg.maps import Map, Maps, Rotation
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
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


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def aligned(
    teacher: Model, student: Model, root: Path, maps: Maps | None = None, **options: Any
) -> tuple[Maps, dict[str, Any]]:
    out = pico_output(root)
    step, pair = HungarianPermute(texts=6, **options), Pair(teacher, student)
    return step.align(student.weights, maps or Maps(), pair, pico_samples(), out, quiet), out.notes


def scrambled(model: Model, folder: Path, seed: int = 3) -> tuple[Model, Mapping[str, Map]]:
    weights, planted = scramble(model.weights, seed)
    save_folder(weights, model.folder, folder)
    return open_model(ModelRef(model=str(folder))), planted


def back(planted: Mapping[str, Map]) -> Maps:
    residual = planted["residual"].invert()
    return Maps({f"residual.{b}": residual for b in range(3)})


def test_it_is_an_aligner() -> None:
    assert steps() == [HungarianPermute]
    assert stage_of(HungarianPermute) == "align"


@criteria
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_planted_permutations_are_found(
    tmp_path: Path, criterion: str, model_type: str, shape: dict[str, int]
) -> None:
    teacher = pico_model(tmp_path / "model", model_type, **shape)
    student, planted = scrambled(teacher, tmp_path / "scrambled")
    maps, notes = aligned(teacher, student, tmp_path / "runs", back(planted), criterion=criterion)
    for space in (f"{s}.{i}" for s in ("q", "kv", "neurons") for i in range(2)):
        assert torch.equal(maps[space].index, planted[space].invert().index), space  # type: ignore[union-attr]
        assert maps[space].square
    for part in ("heads", "neurons"):
        for card in maps.diagnostics.values():
            assert card[part]["score"] == pytest.approx(1, abs=1e-4)
            assert card[part]["identity_score"] < 0.99 or card[part]["identity"]
            assert card[part]["random_score"] < 0.99
        assert notes[part]["of"] == 2
    assert notes["neurons"]["layers that change"] == 2


@criteria
def test_a_model_matches_itself_by_the_identity(tmp_path: Path, criterion: str) -> None:
    model = pico_model(tmp_path / "model")
    maps, notes = aligned(model, model, tmp_path / "runs", criterion=criterion)
    assert all(torch.equal(found.index, torch.arange(len(found.index))) for found in maps.values())  # type: ignore[union-attr]
    assert all(
        card["heads"]["identity"] and card["neurons"]["identity"]
        for card in maps.diagnostics.values()
    )
    assert notes["heads"]["layers that change"] == notes["neurons"]["layers that change"] == 0
    assert notes["heads"]["score"] == pytest.approx(notes["heads"]["identity_score"])


@criteria
def test_other_shapes_get_an_assignment_that_no_fold_takes(tmp_path: Path, criterion: str) -> None:
    teacher = pico_model(
        tmp_path / "t",
        seed=9,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=64,
        head_dim=8,
        num_hidden_layers=5,
    )
    student = pico_model(tmp_path / "s", seed=1, head_dim=8)
    maps, _ = aligned(teacher, student, tmp_path / "runs", criterion=criterion)
    for i in range(2):
        q, kv, neurons = (maps[f"{space}.{i}"] for space in ("q", "kv", "neurons"))
        assert (q.square, kv.square, neurons.square) == (False, True, False)
        assert (len(q.index), len(neurons.index)) == (64, 64)  # type: ignore[union-attr]
        for found in (q, kv, neurons):
            found.verify(0.0, "here")
        heads = torch.tensor(maps.diagnostics[i]["heads"]["permutation"])
        assert sorted(heads[heads >= 0].tolist()) == [0, 1, 2, 3]
    assert [card["reference"] for card in maps.diagnostics.values()] == [0, 2]


def test_heads_of_other_widths_are_told_in_the_card_alone(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "t", seed=9, head_dim=12)
    maps, _ = aligned(teacher, pico_model(tmp_path / "s", seed=1), tmp_path / "runs")
    assert set(maps) == {"neurons.0", "neurons.1"}
    assert len(maps.diagnostics[0]["heads"]["permutation"]) == 4


def test_models_of_different_widths_need_a_map_of_the_stream(tmp_path: Path) -> None:
    teacher, student = (
        pico_model(tmp_path / "t", seed=9, hidden_size=48),
        pico_model(tmp_path / "s"),
    )
    with pytest.raises(RecipeError, match="put procrustes before it"):
        aligned(teacher, student, tmp_path / "runs")
    wide = Rotation(random_rotation(48, 2)[:32])
    maps, _ = aligned(
        teacher, student, tmp_path / "runs2", Maps({f"residual.{b}": wide for b in range(3)})
    )
    assert maps["neurons.0"].square


def test_a_student_that_was_folded_is_compared_in_the_basis_that_it_is_in(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    twin, planted = scrambled(model, tmp_path / "twin")
    folded = twin.weights.fold({"residual": Rotation(random_rotation(32, 8))})
    maps = HungarianPermute().align(
        folded,
        back(planted),
        Pair(model, twin),
        pico_samples(),
        pico_output(tmp_path / "runs"),
        quiet,
    )
    assert torch.equal(maps["neurons.1"].index, planted["neurons.1"].invert().index)  # type: ignore[union-attr]


@criteria
def test_a_stage_finds_layers_that_changed_places(tmp_path: Path, criterion: str) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=4)
    if criterion == "weights":
        student = model.weights.cut([1, 0, 2, 3])
        save_folder(student, model.folder, tmp_path / "swapped")
        other = open_model(ModelRef(model=str(tmp_path / "swapped")))
        maps, _ = aligned(model, other, tmp_path / "runs", criterion=criterion, within_stage=2)
        assert [card["reference"] for card in maps.diagnostics.values()] == [1, 0, 2, 3]
        assert all(
            card["neurons"]["score"] == pytest.approx(1, abs=1e-5)
            for card in maps.diagnostics.values()
        )
    maps, _ = aligned(model, model, tmp_path / "runs2", criterion=criterion, within_stage=3)
    assert [card["reference"] for _, card in sorted(maps.diagnostics.items())] == [0, 1, 2, 3]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    broken = model.weights.edit({name: torch.full_like(model.weights[name], torch.nan)})
    with pytest.raises(RotdistillError, match="NaN or Inf"):
        HungarianPermute().align(
            broken,
            Maps(),
            Pair(model, model),
            pico_samples(),
            pico_output(tmp_path / "runs"),
            quiet,
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5))
def test_an_assignment_is_the_best_of_all(seed: int, n: int, m: int) -> None:
    score = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    kept = score.clone()
    index = assign(score)
    assert torch.equal(score, kept)
    assert int((index >= 0).sum()) == min(n, m)
    taken = (index >= 0).nonzero().flatten()
    small = score if n <= m else score.T
    best = max(
        sum(float(small[r, c]) for r, c in enumerate(p))
        for p in itertools.permutations(range(max(n, m)), min(n, m))
    )
    assert float(score[index[taken], taken].sum()) == pytest.approx(best, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([(4, 2, 4, 2), (4, 2, 6, 2), (6, 3, 4, 2), (4, 1, 4, 4)])
)
def test_query_heads_move_with_their_groups(seed: int, shape: tuple[int, int, int, int]) -> None:
    s, t = HeadLayout(shape[0], shape[1], 8), HeadLayout(shape[2], shape[3], 8)
    heads, groups = assign_heads(
        torch.rand(s.query, t.query, generator=torch.Generator().manual_seed(seed)), s, t
    )
    taken = heads[heads >= 0].tolist()
    assert len(taken) == len(set(taken))
    for b, a in enumerate(groups.tolist()):
        inside = heads[b * (t.query // t.groups) : (b + 1) * (t.query // t.groups)]
        assert set((inside[inside >= 0] // (s.query // s.groups)).tolist()) <= {a}


def test_the_attention_of_one_text_is_kept_to_be_looked_at(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "model", num_hidden_layers=3)
    student, _ = scrambled(teacher, tmp_path / "scrambled")
    maps, _ = aligned(teacher, student, tmp_path / "runs", criterion="activations")
    for layer in range(3):
        both = load_file(tmp_path / "runs" / maps.diagnostics[layer]["attention"])
        assert both["student"].shape == both["teacher"].shape
        assert both["student"].shape[0] == 4
        assert bool((both["student"].triu(1) == 0).all())
        heads = torch.tensor(maps.diagnostics[layer]["heads"]["permutation"])
        assert torch.allclose(
            both["student"][heads], both["teacher"], atol=1e-5
        )  # behind the permutation they are the teacher's
        assert not torch.allclose(
            both["student"], both["teacher"], atol=1e-2
        ) or heads.tolist() == [0, 1, 2, 3]
    assert "attention" not in aligned(teacher, student, tmp_path / "other")[0].diagnostics[0]
