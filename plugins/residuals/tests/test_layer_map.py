"""The layer map: the dynamic programme against every map there is, and planted maps found from streams."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotdistill_residuals._layer_map import explained, monotone, spread
from rotdistill_residuals.step import Residuals

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.forward.activations import ActivationStore, write_shard
from rotdistill_core.testing import pico_model, pico_output, pico_samples, random_rotation


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 10**6), st.booleans())
def test_the_map_is_the_best_there_is(rows: int, columns: int, seed: int, ties: bool) -> None:
    table = torch.randn(
        rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    table = table.round() if ties else table
    found = monotone(table)
    assert (found[0], found[-1], sorted(found)) == (0, columns - 1, found)
    every = [
        m
        for m in itertools.combinations_with_replacement(range(columns), rows)
        if m[0] == 0 and m[-1] == columns - 1
    ]
    best = max(float(table[range(rows), [*m]].sum()) for m in every)
    assert float(table[range(rows), found].sum()) == pytest.approx(best, abs=1e-12)
    assert found == monotone(table.clone())


def planted(
    root: Path, found: list[int], seed: int, boundaries: int = 6, broken: bool = False
) -> ActivationStore:
    """Return a bank whose student boundary l is the teacher's boundary `found[l]`, turned, with a little noise."""
    layout, out = pico_samples(texts=30).layout, pico_output(root)
    maker = torch.Generator().manual_seed(seed)
    theirs = [
        torch.randn(layout.rows, 24, generator=maker) @ torch.diag(torch.linspace(1, 3, 24))
        for _ in range(boundaries)
    ]
    mine = [
        theirs[m] @ random_rotation(24, m).float()[:, :20]
        + 0.1 * torch.randn(layout.rows, 20, generator=maker)
        for m in found
    ]
    if broken:
        mine[1][5, 3] = torch.nan
    sides = {"teacher": theirs, "student": mine}
    shards = {
        side: tuple(write_shard(out, side, b, X, X.dtype, {}) for b, X in enumerate(streams))
        for side, streams in sides.items()
    }
    return ActivationStore(
        out.store.root,
        shards,
        {"teacher": layout, "student": layout},
        tuple(range(len(found))),
        tuple(found),
    )


@pytest.mark.parametrize(
    "found", [[0, 1, 2, 3, 4, 5], [0, 0, 4, 5], [0, 2, 2, 3, 5], [0, 5], [0, 0, 0, 1, 4, 4, 5]]
)
def test_a_planted_map_is_found(tmp_path: Path, found: list[int]) -> None:
    table = explained(planted(tmp_path, found, seed=1), quiet)
    assert monotone(table) == found
    assert all(float(table[b, m]) == float(table[b].max()) > 0.5 for b, m in enumerate(found))


def test_a_stream_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RotdistillError, match=r"student boundary 1: .* NaN or Inf"):
        explained(planted(tmp_path, [0, 2, 5], seed=1, broken=True), quiet)


def test_boundaries_that_were_cut_away_lie_between_their_neighbours() -> None:
    assert spread((0, 1, 4, 5), [0, 2, 6, 9], 6) == (0, 2, 3, 5, 6, 9)


def test_a_capture_keeps_the_map_it_found(tmp_path: Path) -> None:
    pair = Pair(
        pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=5),
        pico_model(tmp_path / "student", "qwen2", seed=1, num_hidden_layers=3),
    )
    out = pico_output(tmp_path / "runs")
    activations = Residuals(layer_map="match").capture(
        pair, pair.student.weights, pico_samples(texts=20), out, quiet
    )
    assert activations.teacher_boundaries == tuple(out.notes["layer map"])
    assert (activations.teacher_boundaries[0], activations.teacher_boundaries[-1]) == (0, 5)
    assert out.notes["mean R² of match"] >= out.notes["mean R² of stretch"] - 1e-9


def test_a_student_cut_from_its_teacher_knows_its_map(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    with pytest.raises(RecipeError, match="its layer map is known"):
        Residuals(layer_map="match").capture(
            Pair(model, model), model.weights, pico_samples(), pico_output(tmp_path), quiet
        )
