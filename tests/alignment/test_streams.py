"""Paired streams: sums against explicit ones, rows that are taken, and figures with their nulls."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rotdistill_core.alignment import streams as module
from rotdistill_core.alignment.streams import (
    PairedStreams,
    StreamSums,
    cosine,
    diagnose,
    mean_cosines,
    orthogonality,
    paired_streams,
    random_orthogonal,
    spectral_gap,
    sum_fit_rows,
)
from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.row_rms import rms_normalise
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.linalg.paired_sums import PairedSums
from rotdistill_core.linalg.solvers import polar
from rotdistill_core.testing import (
    captured_activations,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sums_of(*boundaries: tuple[torch.Tensor, torch.Tensor], squares: bool = True) -> StreamSums:
    """The sums of a stage whose boundaries have these rows."""
    found = []
    for S, T in boundaries:
        sums = PairedSums(S.shape[1], T.shape[1], 1e9, shuffled=True, squares=squares)
        sums.add(S, T, T.roll(len(T) // 2, 0))
        found.append(sums.value())
    return StreamSums.of(found)


def test_the_sums_of_a_stage_are_those_of_its_boundaries() -> None:
    S, T = randn(0, 12, 3), randn(1, 12, 5)
    sums = sums_of((S[:5], T[:5]), (S[5:], T[5:]))
    torch.testing.assert_close(sums.C_st, S.T @ T)
    torch.testing.assert_close(sums.C_ss, S.T @ S)
    torch.testing.assert_close(sums.C_tt, T.T @ T)
    assert sums.student_energy == pytest.approx(float(S.pow(2).sum()))
    assert sums.rows.tolist() == [5, 7]
    torch.testing.assert_close(sums.teacher_means, torch.stack([T[:5].mean(0), T[5:].mean(0)]))
    assert torch.equal(sums.shuffled().C_st, sums.C_st_shuffled)
    assert torch.equal(sums.shuffled().shuffled().C_st, sums.C_st)


def test_covariances_are_centred_within_each_boundary() -> None:
    S, T = randn(0, 20, 3) + 5.0, randn(1, 20, 4) - 2.0
    S[10:] += 100.0
    sums = sums_of((S[:10], T[:10]), (S[10:], T[10:]))
    X = torch.cat([S[:10] - S[:10].mean(0), S[10:] - S[10:].mean(0)])
    Y = torch.cat([T[:10] - T[:10].mean(0), T[10:] - T[10:].mean(0)])
    C_ss, C_st, C_tt = sums.centred()
    torch.testing.assert_close(C_ss, X.T @ X / 20, rtol=0, atol=1e-9)
    torch.testing.assert_close(C_st, X.T @ Y / 20, rtol=0, atol=1e-9)
    torch.testing.assert_close(C_tt, Y.T @ Y / 20, rtol=0, atol=1e-9)


def test_squares_are_added_up_only_when_asked_for() -> None:
    S, T = randn(0, 8, 3), randn(1, 8, 3)
    sums = sums_of((S, T), squares=False)
    assert not sums.C_ss.any()
    assert not sums.C_tt.any()
    torch.testing.assert_close(sums.C_st, S.T @ T)


def test_the_scale_is_the_least_squares_factor() -> None:
    S, R = randn(0, 30, 4), random_rotation(4, 1)
    assert sums_of((S, 2.5 * S @ R)).scale(R) == pytest.approx(2.5)


def test_position_0_massive_rows_and_other_splits_are_left_out(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    samples, out = pico_samples(), pico_output(tmp_path / "runs")
    pair = Pair(model, model)
    activations = captured_activations(pair, model.weights, samples, out)
    [streams] = paired_streams(activations, pair, [1], Split.FIT, "here")
    fit = samples.layout.split(Split.FIT)
    assert 0 not in streams.taken
    assert bool(fit[streams.taken].all())
    assert len(streams.taken) == int(fit.sum()) - 1
    sums = sum_fit_rows(activations, pair, [1], "here", squares=True)
    X = rms_normalise(streams.S[streams.taken])
    torch.testing.assert_close(sums.C_ss, X.T @ X)


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    samples, out = pico_samples(), pico_output(tmp_path / "runs")
    pair = Pair(model, model)
    activations = captured_activations(pair, model.weights, samples, out)
    with pytest.raises(RecipeError, match="here: boundary 2 has no guard rows"):
        next(paired_streams(activations, pair, [2], Split.GUARD, "here"))


def test_the_gap_of_a_spectrum_is_a_share_of_its_largest_value() -> None:
    S = torch.tensor([4.0, 3.0, 1.0])
    assert [spectral_gap(S, k) for k in range(4)] == [0.0, 0.25, 0.5, 0.25]


@pytest.mark.parametrize("d_t", [6, 9])
def test_the_random_rotation_is_orthogonal_and_always_the_same(d_t: int) -> None:
    R = random_orthogonal(6, d_t)
    torch.testing.assert_close(R @ R.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(R, random_orthogonal(6, d_t))


def test_the_cosine_of_a_row_of_zeros_is_zero() -> None:
    A = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert cosine(A, torch.ones(2, 2)) == pytest.approx(0.5 / 2**0.5)


def test_centred_cosines_ignore_what_all_rows_share() -> None:
    A, B = randn(0, 50, 8), randn(1, 50, 8)
    apart, together = mean_cosines(A, B), mean_cosines(A + 100.0, B + 100.0)
    assert together.raw > 0.99
    assert together.centred == pytest.approx(apart.centred, abs=1e-9)


def test_figures_compare_a_map_with_its_nulls() -> None:
    S, R = randn(0, 60, 6), random_rotation(6, 1)
    T = 2.0 * S @ R
    streams = PairedStreams(boundary=4, S=S, T=T, taken=torch.arange(40))
    mean = rms_normalise(T).mean(0)
    figures = diagnose(
        streams, fitted=R, shuffled=random_rotation(6, 2), random=random_rotation(6, 3), mean=mean
    )
    assert figures.rows == 40
    assert figures.cosine_after == pytest.approx(1.0)
    assert figures.centred_after == pytest.approx(1.0)
    for null in (figures.cosine_shuffled, figures.cosine_random, figures.cosine_mean):
        assert null < 0.6
    assert figures.centred_mean == 0.0
    assert figures.rms_ratio == pytest.approx(0.5)


def test_streams_of_two_widths_have_no_cosine_before_the_map() -> None:
    S, T = randn(0, 20, 4), randn(1, 20, 6)
    R = random_rotation(6, 1)[:4]
    streams = PairedStreams(boundary=0, S=S, T=T, taken=torch.arange(20))
    figures = diagnose(streams, fitted=R, shuffled=R, random=R, mean=T.mean(0))
    assert figures.cosine_before is None
    assert figures.centred_before is None
    assert figures.cosine_after == figures.cosine_random


@pytest.mark.parametrize("d_t", [4, 6])
def test_orthogonality_measures_a_projector_or_an_identity(d_t: int) -> None:
    figures = orthogonality(Rotation(random_rotation(d_t, 1)[:4]))
    assert figures.max_rrt < 1e-12
    if d_t == 4:
        assert figures.max_rtr < 1e-12
        assert figures.rank_rtr is None
    else:
        assert figures.max_rtr is None
        assert figures.rank_rtr == pytest.approx(4)


def test_an_aligner_by_hand_measures_what_solve_stages_does(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "plugins" / "hooks.md"
    (shown,) = re.findall(r"^```python\n(sums = .*?)^return maps", page.read_text(), re.M | re.S)
    student, teacher = (pico_model(tmp_path / name, seed=len(name)) for name in ("a", "bb"))
    pair, out = Pair(teacher, student), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, student.weights, pico_samples(), out)
    solved: list[torch.Tensor] = []

    def solve(sums: StreamSums, where: str) -> module.StageSolution:
        assert where == "mine: stage 0" + ", shuffled" * len(solved)
        R, S = polar(sums.C_st, where)
        solved.append(R)
        return module.StageSolution(R, S, k=len(S), gap=spectral_gap(S, len(S)))

    maps = module.solve_stages(
        activations,
        Maps(),
        pair,
        lambda *_: None,
        use="mine",
        tie="all",
        solve=solve,
        squares=False,
    )
    place: dict[str, Any] = {name: getattr(module, name) for name in module.__all__}
    place |= {"Rotation": Rotation, "Split": Split, "replace": replace}
    place |= {"activations": activations, "pair": pair, "boundaries": [0, 1, 2]}
    place |= {"self": SimpleNamespace(use="mine"), "R": solved[0], "null": solved[1]}
    exec(shown, place)
    assert {*place["diagnostics"]} == {0, 1, 2}
    for boundary, by_hand in place["diagnostics"].items():
        figures, measured = by_hand.as_dict(), maps.diagnostics[boundary].as_dict()
        assert figures.pop("iterations") == 12
        assert figures.items() <= measured.items()
    (of_stages,) = {rotation.scale for rotation in maps.values() if isinstance(rotation, Rotation)}
    assert place["found"]["residual.2"].scale == of_stages


def test_every_name_of_the_module_is_public_or_has_an_underscore() -> None:
    defined = {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    }
    assert defined == {*module.__all__}
