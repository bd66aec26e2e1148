"""The layer map: the dynamic programme against every monotone map, and planted maps in streams."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_residuals._layer_map import (
    best_monotone_map,
    explained_variance,
    interpolate_map,
    match_layers,
)
from rotdistill_residuals.step import Residuals
from safetensors.torch import load_file, save_file

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.splits import Side
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.forward.activations import ActivationStore, write_shard
from rotdistill_core.testing import pico_model, pico_output, pico_samples, random_rotation


def quiet(*_: object) -> None:
    """Take progress and print nothing."""


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 10**6), st.booleans())
def test_the_map_has_the_largest_sum_of_all_monotone_maps(
    rows: int, columns: int, seed: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    r2 = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    r2 = r2.round() if ties else r2
    best = best_monotone_map(r2)
    assert (best[0], best[-1], sorted(best)) == (0, columns - 1, best)
    monotone_maps = [
        candidate
        for candidate in itertools.combinations_with_replacement(range(columns), rows)
        if candidate[0] == 0 and candidate[-1] == columns - 1
    ]
    largest = max(float(r2[range(rows), [*candidate]].sum()) for candidate in monotone_maps)
    assert float(r2[range(rows), best].sum()) == pytest.approx(largest, abs=1e-12)


def test_the_leftmost_of_equal_maps_is_taken() -> None:
    assert best_monotone_map(torch.zeros(4, 3, dtype=torch.float64)) == [0, 0, 0, 2]


def planted(
    root: Path, layer_map: list[int], seed: int, boundaries: int = 6, broken: bool = False
) -> ActivationStore:
    """Return a capture whose student boundary l is the teacher's boundary `layer_map[l]`.

    The student's stream is the teacher's in a random basis, with a little noise.
    """
    layout = pico_samples(texts=30).layout
    out = pico_output(root)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.diag(torch.linspace(1, 3, 24))
    teacher = [torch.randn(layout.rows, 24, generator=generator) @ scale for _ in range(boundaries)]
    student = []
    for m in layer_map:
        R = random_rotation(24, m).float()[:, :20]
        noise = 0.1 * torch.randn(layout.rows, 20, generator=generator)
        student.append(teacher[m] @ R + noise)
    shards = {
        side: tuple(write_shard(out, side, b, X, X.dtype, {}) for b, X in enumerate(streams))
        for side, streams in ((Side.TEACHER, teacher), (Side.STUDENT, student))
    }
    if broken:  # the program itself writes no such file
        path = out.store.root / shards[Side.STUDENT][1]
        tensors = load_file(path)
        tensors["rows"][5, 3] = torch.nan
        save_file(tensors, path)
    return ActivationStore(
        root=out.store.root,
        shards=shards,
        layouts={Side.TEACHER: layout, Side.STUDENT: layout},
        depths=tuple(range(len(layer_map))),
        teacher_boundaries=tuple(layer_map),
    )


@pytest.mark.parametrize(
    "layer_map",
    [[0, 1, 2, 3, 4, 5], [0, 0, 4, 5], [0, 2, 2, 3, 5], [0, 5], [0, 0, 0, 1, 4, 4, 5]],
)
def test_a_planted_map_is_found(tmp_path: Path, layer_map: list[int]) -> None:
    matched = match_layers(planted(tmp_path, layer_map, seed=1), quiet)
    assert matched.teacher_boundaries == tuple(matched.matched) == tuple(layer_map)
    assert matched.mean_r2_match == pytest.approx(matched.mean_r2_stretch)
    for b, m in enumerate(layer_map):
        assert float(matched.r2[b, m]) == float(matched.r2[b].max()) > 0.5


def test_a_stream_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RotdistillError, match=r"student boundary 1: .* NaN or Inf"):
        explained_variance(planted(tmp_path, [0, 2, 5], seed=1, broken=True), quiet)


def test_boundaries_that_were_cut_away_lie_between_their_neighbours() -> None:
    assert interpolate_map((0, 1, 4, 5), [0, 2, 6, 9], 6) == (0, 2, 3, 5, 6, 9)


def test_a_capture_keeps_the_map_that_it_found(tmp_path: Path) -> None:
    pair = Pair(
        pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=5),
        pico_model(tmp_path / "student", "qwen2", seed=1, num_hidden_layers=3),
    )
    activations = Residuals(layer_map="match").capture(
        pair,
        pair.student.weights,
        pico_samples(texts=20),
        pico_output(tmp_path / "runs"),
        quiet,
    )
    table = json.loads((tmp_path / "runs/run/layer_map.json").read_text(encoding="utf-8"))
    layer_map = table["student boundary -> teacher boundary"]
    assert activations.teacher_boundaries == tuple(layer_map[str(b)] for b in range(4))
    assert (activations.teacher_boundaries[0], activations.teacher_boundaries[-1]) == (0, 5)
    r2 = torch.tensor(table["R²"])
    stretched = [pair.teacher_depth(b) for b in range(4)]
    assert (
        float(r2[range(4), activations.teacher_boundaries].mean())
        >= float(r2[range(4), stretched].mean()) - 1e-9
    )


def test_a_layer_map_needs_rows_of_both_splits(tmp_path: Path) -> None:
    pair = Pair(
        pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3),
        pico_model(tmp_path / "student", "qwen2", seed=1),
    )
    with pytest.raises(RecipeError, match="needs fit and validation rows"):
        Residuals(layer_map="match", student_texts=1).capture(
            pair, pair.student.weights, pico_samples(), pico_output(tmp_path / "runs"), quiet
        )


def test_a_student_cut_from_its_teacher_knows_its_map(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    with pytest.raises(RecipeError, match="its layer map is known"):
        Residuals(layer_map="match").capture(
            Pair(model, model), model.weights, pico_samples(), pico_output(tmp_path), quiet
        )
