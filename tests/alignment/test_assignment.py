"""Assignments of heads and neurons: optimal, group by group, and independent of gauges."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotdistill_core.alignment.assignment import (
    Similarities,
    assign,
    assign_heads,
    layer_rows,
    match_layers,
    stream_map,
    teacher_layers,
    weight_scores,
)
from rotdistill_core.architecture.table import HeadLayout
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.linalg.maps import Gauge, Maps, Rotation
from rotdistill_core.testing import gauges, pico_model, random_rotation

SEEDS = st.integers(0, 2**31)


def total(score: torch.Tensor, index: torch.Tensor) -> float:
    assigned = (index >= 0).nonzero().flatten()
    return float(score[index[assigned], assigned].sum())


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 5))
def test_an_assignment_is_the_best_of_all(seed: int, n: int, m: int) -> None:
    score = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    before = score.clone()
    index = assign(score)
    assert torch.equal(score, before)
    assert int((index >= 0).sum()) == min(n, m)
    small = score if n <= m else score.T
    best = max(
        sum(float(small[row, column]) for row, column in enumerate(columns))
        for columns in itertools.permutations(range(max(n, m)), min(n, m))
    )
    assert total(score, index) == pytest.approx(best, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([(4, 2, 4, 2), (4, 2, 6, 2), (6, 3, 4, 2), (4, 1, 4, 4)]))
def test_query_heads_move_with_their_groups(seed: int, shape: tuple[int, int, int, int]) -> None:
    s, t = HeadLayout(shape[0], shape[1], 8), HeadLayout(shape[2], shape[3], 8)
    score = torch.rand(s.query, t.query, generator=torch.Generator().manual_seed(seed))
    heads, groups = assign_heads(score, s, t)
    assigned = heads[heads >= 0].tolist()
    assert len(assigned) == len(set(assigned))
    for b, a in enumerate(groups.tolist()):
        inside = heads[b * (t.query // t.groups) : (b + 1) * (t.query // t.groups)]
        assert set((inside[inside >= 0] // (s.query // s.groups)).tolist()) <= {a}


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(RotdistillError, match="assignment: 1 of 4 values are NaN or Inf"):
        assign(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


def test_a_match_counts_what_moves_and_scores_its_nulls() -> None:
    layout = HeadLayout(query=2, groups=2, width=4)
    heads = torch.tensor([[0.1, 0.9], [0.7, 0.3]])
    neurons = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    match = match_layers(Similarities(heads, neurons), layout, layout)
    assert match.head_figures.permutation == (1, 0)
    assert (match.head_figures.moved, match.head_figures.of) == (2, 2)
    assert match.head_figures.score == pytest.approx(0.8)
    assert match.head_figures.identity_score == pytest.approx(0.2)
    assert match.head_figures.random_score == pytest.approx(0.5)
    assert match.neuron_figures.identity
    assert match.neuron_figures.permutation is None
    assert match.score == pytest.approx(1.8)
    assert match.maps(3, head_width=4)["q.3"].index.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert list(match.maps(3, head_width=None)) == ["neurons.3"]
    assert match.diagnostics(reference=5).reference == 5


def test_similarities_of_a_layer_do_not_depend_on_gauges(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", "qwen2")
    turned = model.weights.fold(gauges(model.weights, 2, invertible=True))
    heads = model.adapter.heads(model.config)
    T = layer_rows(model.weights, 1, {})
    plain = weight_scores(T, T, heads, heads)
    gauged = weight_scores(layer_rows(turned, 1, {}), T, heads, heads)
    torch.testing.assert_close(gauged.heads, plain.heads, rtol=0, atol=1e-6)
    torch.testing.assert_close(gauged.neurons, plain.neurons, rtol=0, atol=1e-5)
    assert plain.neurons.diagonal().tolist() == pytest.approx([1.0] * len(plain.neurons), abs=1e-5)


def test_rows_of_a_layer_stand_in_the_bases_of_the_maps(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", "qwen2")
    R = random_rotation(32, 1)
    G = Gauge(torch.full((48, 1, 1), 2.0, dtype=torch.float64))
    plain = layer_rows(model.weights, 0, {})
    mapped = layer_rows(model.weights, 0, {"residual": Rotation(R), "up.0": G})
    assert [*plain] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert plain["q"].shape == (32, 33), "readers carry their bias as last column"
    torch.testing.assert_close(mapped["q"][:, :-1], plain["q"][:, :-1] @ R)
    torch.testing.assert_close(mapped["q"][:, -1], plain["q"][:, -1])
    torch.testing.assert_close(mapped["o"], plain["o"] @ R)
    torch.testing.assert_close(mapped["up"][:, :-1], 2.0 * plain["up"][:, :-1] @ R)
    torch.testing.assert_close(mapped["down"], 0.5 * plain["down"] @ R)


def test_layers_are_compared_at_the_depth_that_they_came_from(tmp_path: Path) -> None:
    teacher = pico_model(tmp_path / "teacher", num_hidden_layers=6)
    student = pico_model(tmp_path / "student", num_hidden_layers=3)
    pair = Pair(teacher, student)
    assert teacher_layers(student.weights, pair) == [0, 2, 4]
    assert teacher_layers(student.weights.cut([0, 2]), pair) == [0, 4]


def test_a_folded_student_is_mapped_from_the_basis_that_it_is_in(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    Q, R = random_rotation(32, 1), Rotation(random_rotation(32, 2))
    folded = model.weights.fold({"residual": Rotation(Q)})
    maps = Maps({"residual.0": R})
    found = stream_map(folded, Pair(model, model), maps, 0)
    torch.testing.assert_close(found.matrix, Q.T @ R.matrix)


def test_streams_of_one_width_without_a_map_share_a_basis(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    found = stream_map(model.weights, Pair(model, model), Maps(), 0)
    assert torch.equal(found.matrix, torch.eye(32, dtype=torch.float64))
    wide = Pair(pico_model(tmp_path / "wide", hidden_size=48), model)
    with pytest.raises(RecipeError, match="put procrustes before it"):
        stream_map(model.weights, wide, Maps(), 0)


def test_a_student_whose_stream_was_cut_is_mapped_from_the_basis_that_it_is_in(
    tmp_path: Path,
) -> None:
    """Maps that were found after the cut start from the narrow stream, which may have turned."""
    model = pico_model(tmp_path / "model")
    basis = random_rotation(32, 1)[:, :24]
    lineage = replace(model.weights.lineage, basis=basis)
    cut = replace(model.weights, lineage=lineage)
    pair = Pair(model, model)
    found = Rotation(random_rotation(32, 2)[:24])
    assert torch.equal(stream_map(cut, pair, Maps({"residual.0": found}), 0).matrix, basis.T)
    assert torch.equal(stream_map(cut, pair, Maps(), 0).matrix, basis.T)


def test_gains_of_queries_and_keys_scale_rows_and_are_no_biases(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model", "olmo2")
    prefix = "model.layers.0.self_attn"
    gain = 1 + torch.arange(32) / 8
    weights = model.weights.edit({f"{prefix}.q_norm.weight": gain.float()})
    rows = layer_rows(weights, 0, {})
    wanted = weights[f"{prefix}.q_proj.weight"].double() * gain.double()[:, None]
    torch.testing.assert_close(rows["q"][:, :-1], wanted)
    assert not rows["q"][:, -1].any()
    assert not rows["k"][:, -1].any()
