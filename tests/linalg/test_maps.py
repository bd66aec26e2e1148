"""Maps between spaces, and their effect on readers, writers and biases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotdistill_core.errors import CheckFailed
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.linalg.maps import (
    Gauge,
    Maps,
    Permutation,
    Rotation,
    restore_maps,
    store_maps,
    transform_param,
)
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 6)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, d: int, e: int | None = None, scale: float = 1.0) -> Rotation:
    return Rotation(torch.linalg.qr(randn(seed, e or d, d))[0].T, scale)


def permutation(seed: int, n: int) -> Permutation:
    return Permutation(torch.randperm(n, generator=torch.Generator().manual_seed(seed)))


def assert_close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


@few
@given(seeds, sizes, st.integers(0, 3))
def test_a_rotation_followed_by_its_inverse_changes_nothing(seed: int, d: int, more: int) -> None:
    R = rotation(seed, d, d + more, scale=2.5)
    there_and_back = R.then(R.invert())
    assert_close(there_and_back.matrix, torch.eye(d, dtype=torch.float64))
    assert there_and_back.scale == pytest.approx(1.0)
    assert R.square == (more == 0)
    R.verify(1e-12, "here")


@few
@given(seeds, sizes, sizes)
def test_then_applies_one_rotation_after_the_other(seed: int, d: int, n: int) -> None:
    one = rotation(seed, d, d + 1, 2.0)
    two = rotation(seed + 1, d + 1, d + 3, 3.0)
    X = randn(seed + 2, n, d)
    assert_close(one.then(two).apply(X, 1), two.apply(one.apply(X, 1), 1))
    assert one.then(two).scale == 6.0
    one.then(two).verify(1e-12, "here")


def test_a_rectangular_rotation_makes_a_projector() -> None:
    R = rotation(0, 3, 5)
    P = R.invert().then(R).matrix
    assert P.shape == (5, 5)
    assert_close(P @ P, P)
    assert float(P.trace()) == pytest.approx(3.0)


def test_a_tall_matrix_is_no_rotation() -> None:
    with pytest.raises(CheckFailed):
        rotation(0, 3, 5).invert().verify(1e-6, "here")


@pytest.mark.parametrize(("d", "e"), [(4, 4), (3, 5)])
def test_verify_names_the_place_and_the_size_of_the_error(d: int, e: int) -> None:
    R = rotation(0, d, e).matrix
    R[0] *= 1.01
    with pytest.raises(
        CheckFailed,
        match=r"layer 2: the rotation is off orthogonal by \d\.\d\de-02, more than 1e-05",
    ) as caught:
        Rotation(R).verify(1e-5, "layer 2")
    assert caught.value.exit_code == 4
    assert Rotation(R).error() == pytest.approx(1.01**2 - 1)


@pytest.mark.parametrize(("d", "e"), [(4, 4), (3, 5)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_rotation_that_is_not_finite_is_refused(d: int, e: int, bad: float) -> None:
    R = rotation(0, d, e).matrix
    R[-1, -1] = bad
    with pytest.raises(CheckFailed):
        Rotation(R).verify(1e-5, "here")


def test_a_rotation_is_verified_in_float64() -> None:
    R = rotation(0, 6).matrix.float()
    assert 1e-9 < Rotation(R).error() < 1e-6
    Rotation(R).verify(1e-5, "here")


@few
@given(seeds, sizes, sizes)
def test_permutations_invert_and_follow_each_other(seed: int, n: int, rows: int) -> None:
    one, two = permutation(seed, n), permutation(seed + 1, n)
    X = randn(seed, rows, n)
    assert torch.equal(one.apply(X, 1), X[:, one.index])
    assert torch.equal(one.then(two).apply(X, 1), X[:, one.index][:, two.index])
    assert torch.equal(one.invert().apply(one.apply(X, 1), 1), X)
    assert torch.equal(one.then(one.invert()).index, torch.arange(n))
    one.verify(0.0, "here")


@pytest.mark.parametrize("index", [[0, 0, 2], [1, 2, 3], [-1, 0, 1]])
def test_an_index_that_is_no_bijection_is_refused(index: list[int]) -> None:
    with pytest.raises(CheckFailed, match="layer 1: the permutation is not a bijection"):
        Permutation(torch.tensor(index)).verify(0.0, "layer 1")


@few
@given(seeds, sizes, sizes, st.integers(0, 2))
def test_readers_writers_and_biases_change_basis(seed: int, d: int, f: int, more: int) -> None:
    R = rotation(seed, d, d + more)
    Q, maps = R.matrix, {"residual": R}
    reader, writer, bias = randn(seed, f, d), randn(seed + 1, d, f), randn(seed + 2, d)
    assert_close(transform_param(reader, ("neurons.0", "residual"), maps), reader @ Q)
    assert_close(transform_param(writer, ("residual", "neurons.0"), maps), Q.T @ writer)
    assert_close(transform_param(bias, ("residual",), maps), bias @ Q)


@few
@given(seeds, sizes, sizes)
def test_a_parameter_between_two_spaces_changes_basis_on_both_axes(
    seed: int, d: int, f: int
) -> None:
    R, P = rotation(seed, d), permutation(seed, f)
    maps = {"residual": R, "neurons.1": P}
    W, b = randn(seed, f, d), randn(seed + 1, f)
    assert_close(transform_param(W, ("neurons.1", "residual"), maps), W[P.index] @ R.matrix)
    assert torch.equal(transform_param(b, ("neurons.1",), maps), b[P.index])
    assert torch.equal(transform_param(W, ("neurons.2", "vocab"), maps), W)


@few
@given(seeds, sizes, sizes)
def test_inverse_maps_give_the_old_parameter_back(seed: int, d: int, f: int) -> None:
    maps = {"residual": rotation(seed, d), "neurons.0": permutation(seed, f)}
    back = {space: one.invert() for space, one in maps.items()}
    W, axes = randn(seed, d, f), ("residual", "neurons.0")
    assert_close(transform_param(transform_param(W, axes, maps), axes, back), W)


def test_up_and_down_in_new_bases_compute_the_same() -> None:
    maps = {"residual": rotation(0, 4), "neurons.0": permutation(1, 6)}
    X, up, down = randn(2, 5, 4), randn(3, 6, 4), randn(4, 4, 6)
    new_up = transform_param(up, ("neurons.0", "residual"), maps)
    new_down = transform_param(down, ("residual", "neurons.0"), maps)
    Q = maps["residual"].apply(torch.eye(4, dtype=torch.float64), 1)
    assert_close((X @ Q) @ new_up.T @ new_down.T, X @ up.T @ down.T @ Q)


def test_maps_return_the_rotation_that_all_boundaries_share() -> None:
    R, other = rotation(0, 3), rotation(1, 3)
    tied = Maps(
        {"residual.0": R, "residual.1": Rotation(R.matrix.clone()), "neurons.0": permutation(0, 4)}
    )
    assert tied.tied() is R
    assert tied.rotation(1) is tied["residual.1"]
    assert tied.rotation(2) is None
    assert tied.add({"residual.2": other}, {}).tied() is None
    assert Maps().tied() is None


def test_maps_inside_layers_are_all_but_those_of_the_stream() -> None:
    maps = Maps({"residual.0": rotation(0, 3), "neurons.0": permutation(0, 4)})
    assert maps.inside_layers() == {"neurons.0": maps["neurons.0"]}


def test_adding_maps_keeps_the_old_ones_untouched() -> None:
    first = LayerDiagnostics(cosine_after=0.1, k=3)
    old = Maps({"residual.0": rotation(0, 3)}, {0: first})
    later = {0: LayerDiagnostics(cosine_after=0.2), 1: LayerDiagnostics(k=3)}
    new = old.add({"residual.1": rotation(1, 3)}, later)
    assert list(old) == ["residual.0"]
    assert old.diagnostics == {0: first}
    assert list(new) == ["residual.0", "residual.1"]
    assert new.diagnostics == {0: LayerDiagnostics(cosine_after=0.2, k=3), 1: later[1]}


def step_output(root: Path) -> StepOutput:
    return StepOutput(ArtifactStore(root), Ledger(root / "run"), "key")


def test_stored_maps_are_restored_and_a_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    R = rotation(0, 3, 5, scale=0.7)
    maps = Maps(
        {"residual.0": R, "residual.1": R, "neurons.0": permutation(0, 4)},
        {0: LayerDiagnostics(k=3), 1: LayerDiagnostics(k=3)},
    )
    out = step_output(tmp_path)
    info = store_maps(maps, out)
    assert len([path for path in out.used if path.endswith(".safetensors")]) == 2
    restored = restore_maps(info, tmp_path)
    assert torch.equal(restored["residual.1"].matrix, R.matrix)
    assert restored["residual.1"].scale == 0.7
    assert torch.equal(restored["neurons.0"].index, maps["neurons.0"].index)
    assert restored.tied() is restored["residual.0"]
    assert restored.diagnostics == maps.diagnostics


def test_the_document_of_a_boundary_names_its_map(tmp_path: Path) -> None:
    maps = Maps({"residual.0": rotation(0, 3)}, {0: LayerDiagnostics(k=3)})
    info = store_maps(maps, step_output(tmp_path))
    document = json.loads((tmp_path / info["cards"]["0"]).read_text(encoding="utf-8"))
    assert document == {"k": 3, "map": info["spaces"]["residual.0"]}
    assert document["map"]["kind"] == "Rotation"


def gauge(seed: int, n: int, k: int) -> Gauge:
    return Gauge(0.2 * randn(seed, n, k, k) + torch.eye(k, dtype=torch.float64) * 2)


@few
@given(seeds, sizes, sizes, st.integers(1, 3))
def test_a_gauge_keeps_the_product_of_producer_and_consumer(
    seed: int, n: int, k: int, copies: int
) -> None:
    G, maps = gauge(seed, n, k), {"value.0": gauge(seed, n, k)}
    V, o = randn(seed + 1, n * k, 3), randn(seed + 2, 3, n * copies * k)
    values = V.reshape(n, 1, k, 3).expand(n, copies, k, 3).reshape(-1, 3)
    new_v = transform_param(V, ("kv.0", "residual"), maps, "value.0")
    new_o = transform_param(o, ("residual", "q.0"), maps, "value.0*")
    new_values = new_v.reshape(n, 1, k, 3).expand(n, copies, k, 3).reshape(-1, 3)
    assert_close(new_o @ new_values, o @ values)
    assert_close(G.apply(G.invert().apply(V, 0), 0), V)
    assert_close(
        G.then(gauge(seed + 3, n, k)).apply(V, 0), gauge(seed + 3, n, k).apply(G.apply(V, 0), 0)
    )
    G.verify(1e-9, "here")


@few
@given(seeds, sizes, sizes)
def test_a_gauge_follows_the_permutation_of_its_space(seed: int, n: int, k: int) -> None:
    """On the way back the inverse gauge comes before the inverse permutation."""
    maps = {"kv.0": permutation(seed, n).blocks(k), "value.0": gauge(seed, n, k)}
    back = {space: one.invert() for space, one in maps.items()}
    W = randn(seed, n * k, 4)
    there = transform_param(W, ("kv.0", "residual"), maps, "value.0")
    permuted = W.reshape(n, k, 4)[permutation(seed, n).index].flatten(0, 1)
    assert_close(there, maps["value.0"].apply(permuted, 0))
    assert_close(transform_param(there, ("kv.0", "residual"), back, "value.0", back=True), W)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gauge_without_inverse_is_refused(bad: float) -> None:
    blocks = gauge(0, 3, 2).blocks
    blocks[1, 0] = bad
    with pytest.raises(CheckFailed, match=r"kv: a block of the gauge has no inverse"):
        Gauge(blocks).verify(1e-5, "kv")


def test_an_assignment_between_spaces_of_different_sizes_fills_gaps_with_zeros() -> None:
    wider, X = Permutation(torch.tensor([2, -1, 0, 1]), 3), randn(0, 5, 3)
    assert not wider.square
    wider.verify(0.0, "here")
    gap = torch.zeros(5, dtype=torch.float64)
    assert_close(wider.apply(X, 1), torch.stack([X[:, 2], gap, X[:, 0], X[:, 1]], 1))
    assert wider.invert().index.tolist() == [2, 3, 0]
    assert wider.then(wider.invert()).index.tolist() == [0, 1, 2]
    assert wider.blocks(2).index.tolist() == [4, 5, -1, -1, 0, 1, 2, 3]
    with pytest.raises(CheckFailed):
        Permutation(torch.tensor([2, -1, 2, 1]), 3).verify(0.0, "here")


def test_gauges_and_assignments_are_stored_and_restored(tmp_path: Path) -> None:
    maps = Maps(
        {
            "value.0": gauge(0, 2, 3),
            "neurons.0": Permutation(torch.tensor([1, -1, 0]), 2),
            "q.0": permutation(0, 4),
        }
    )
    restored = restore_maps(store_maps(maps, step_output(tmp_path)), tmp_path)
    assert torch.equal(restored["value.0"].blocks, maps["value.0"].blocks)
    assert restored["neurons.0"].index.tolist() == [1, -1, 0]
    assert restored["neurons.0"].size == 2
    assert restored["q.0"].square
