"""Procrustes on captures: planted rotations are recovered, and figures separate fit from chance."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import scipy.linalg
import torch
from rotdistill_procrustes.step import Procrustes, steps
from safetensors.torch import save_file

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.forward import boundary_sums
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.row_rms import rms_normalise
from rotdistill_core.linalg.diagnostics import LayerDiagnostics
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    STEP_CHECKS,
    a_planted_rotation_is_found,
    captured_activations,
    parametrize_with_checks,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
    rotated_twin,
)

Tie = Literal["all"] | int
ties = pytest.mark.parametrize("tie", ["all", 1, 2])
EYE = torch.eye(32, dtype=torch.float64)
MODES = {
    "shrink": Procrustes(shrink=0.6),
    "zscore": Procrustes(whiten="zscore"),
    "full": Procrustes(whiten="full"),
    "ridge": Procrustes(whiten="full", ridge=0.1),
    "all": Procrustes(whiten="full", ridge=0.01, shrink=0.6, tie=2),
}
modes = pytest.mark.parametrize("mode", MODES)


@parametrize_with_checks(
    Procrustes,
    {},
    {"tie": 1},
    {"whiten": "zscore"},
    {"whiten": "full", "ridge": 0.01, "shrink": 0.6},
    checks=(*STEP_CHECKS, a_planted_rotation_is_found),
)
def test_procrustes_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def quiet(*_: object) -> None:
    """Ignore progress."""


def aligned(
    pair: Pair, samples: Samples, root: Path, tie: Tie = "all"
) -> tuple[Maps, ActivationStore]:
    activations = captured_activations(pair, pair.student.weights, samples, pico_output(root))
    return Procrustes(tie=tie).align(activations, Maps(), pair, quiet), activations


def matrices(maps: Maps, boundaries: int) -> list[torch.Tensor]:
    rotations = [maps.rotation(boundary) for boundary in range(boundaries)]
    assert all(isinstance(rotation, Rotation) for rotation in rotations)
    assert len(maps) == len(maps.diagnostics) == boundaries
    return [rotation.matrix for rotation in rotations if rotation]


def with_rows(
    activations: ActivationStore, out: StepOutput, **sides: Sequence[torch.Tensor]
) -> ActivationStore:
    """Return the store with other rows in place of the captured ones."""
    shards = dict(activations.shards)
    for side, states in sides.items():
        paths = [
            out.tensors(f"planted/{side}/{boundary}.safetensors", {"rows": rows})
            for boundary, rows in enumerate(states)
        ]
        shards[side] = tuple(path.relative_to(activations.root).as_posix() for path in paths)
    return replace(activations, shards=shards)


def all_rows(activations: ActivationStore, side: str) -> list[torch.Tensor]:
    return [activations.rows(side, boundary).clone() for boundary in range(4)]


def assert_close(R: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(R, expected, rtol=0, atol=atol)


def test_the_plugin_offers_the_step() -> None:
    assert steps() == [Procrustes]


@ties
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_planted_rotation_is_recovered_from_the_capture_alone(
    tmp_path: Path, samples: Samples, model_type: str, tie: Tie
) -> None:
    teacher = pico_model(tmp_path / "model", model_type, num_hidden_layers=3)
    twin, Q = rotated_twin(teacher, tmp_path / "twin", 4)
    maps, _ = aligned(Pair(teacher, twin), samples, tmp_path / "runs", tie)
    for R in matrices(maps, 4):
        assert_close(R, Q.T, atol=1e-6)
    for figures in maps.diagnostics.values():
        assert figures.cosine_after == pytest.approx(1, abs=1e-9)
        assert figures.rms_ratio == pytest.approx(1, abs=1e-6)
        assert figures.scale == pytest.approx(1, abs=1e-6)
    assert (maps.tied() is not None) is (tie == "all")


@ties
def test_identical_models_need_no_rotation(
    tmp_path: Path, model: Model, samples: Samples, tie: Tie
) -> None:
    maps, _ = aligned(Pair(model, model), samples, tmp_path / "runs", tie)
    for R in matrices(maps, 4):
        assert_close(R, EYE, atol=1e-9)
    for figures in maps.diagnostics.values():
        assert figures.cosine_before == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("tie", "stages"),
    [("all", [0, 0, 0, 0]), (1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (3, [0, 0, 0, 1])],
)
def test_boundaries_of_a_stage_share_their_rotation(
    tmp_path: Path, model: Model, samples: Samples, tie: Tie, stages: list[int]
) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3)
    maps, _ = aligned(Pair(teacher, model), samples, tmp_path / "runs", tie)
    rotations = matrices(maps, 4)
    assert [maps.diagnostics[boundary].stage for boundary in range(4)] == stages
    for a in range(4):
        for b in range(4):
            assert torch.equal(rotations[a], rotations[b]) is (stages[a] == stages[b])


@ties
def test_a_wider_teacher_gives_orthonormal_rows_and_a_projector(
    tmp_path: Path, model: Model, samples: Samples, tie: Tie
) -> None:
    teacher = pico_model(tmp_path / "wide", seed=9, hidden_size=48, num_hidden_layers=6)
    maps, _ = aligned(Pair(teacher, model), samples, tmp_path / "runs", tie)
    for boundary, R in enumerate(matrices(maps, 4)):
        P = R.T @ R
        assert R.shape == (32, 48)
        assert_close(R @ R.T, EYE, atol=1e-12)
        assert_close(P @ P, P, atol=1e-12)
        figures = maps.diagnostics[boundary]
        assert figures.rank_rtr == pytest.approx(32)
        assert figures.max_rrt < 1e-12
        assert figures.cosine_before is None


class WiderStream(NamedTuple):
    """A student whose stream is a part of its teacher's."""

    pair: Pair
    activations: ActivationStore
    inside: torch.Tensor
    """The student's 32 directions among the teacher's 48."""


@pytest.fixture
def wider(tmp_path: Path, model: Model, samples: Samples) -> WiderStream:
    teacher = pico_model(tmp_path / "wide", seed=9, hidden_size=48, num_hidden_layers=3)
    pair = Pair(teacher, model)
    out = pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    inside = random_rotation(48, 2)[:32]
    states = [rows.double() @ inside for rows in all_rows(activations, "student")]
    return WiderStream(pair, with_rows(activations, out, teacher=states), inside)


def test_a_student_inside_a_wider_stream_is_located(wider: WiderStream) -> None:
    maps = Procrustes().align(wider.activations, Maps(), wider.pair, quiet)
    for R in matrices(maps, 4):
        assert_close(R, wider.inside, atol=1e-6)
    for figures in maps.diagnostics.values():
        assert figures.cosine_after == pytest.approx(1, abs=1e-9)


def test_a_wider_student_is_refused(tmp_path: Path, model: Model, samples: Samples) -> None:
    student = pico_model(tmp_path / "wide", hidden_size=48)
    with pytest.raises(RecipeError, match=r"the student is wider \(48\) than the teacher \(32\)"):
        aligned(Pair(model, student), samples, tmp_path / "runs")


@ties
def test_shuffled_rows_fit_far_worse(
    tmp_path: Path, model: Model, samples: Samples, tie: Tie
) -> None:
    twin, _ = rotated_twin(model, tmp_path / "twin", 4)
    maps, _ = aligned(Pair(model, twin), samples, tmp_path / "runs", tie)
    for figures in maps.diagnostics.values():
        assert figures.cosine_shuffled < figures.cosine_after - 0.4
        assert figures.centred_shuffled < figures.centred_after - 0.5
        assert abs(figures.cosine_before) < 0.5


@ties
@pytest.mark.parametrize("width", [32, 48])
def test_fewer_rows_than_dimensions_still_give_an_orthogonal_map(
    tmp_path: Path, model: Model, tie: Tie, width: int
) -> None:
    layout = pico_samples(texts=5, prefix=0).layout
    texts = layout.select("fit", limit=1).texts + layout.select("validation").texts
    few = PackedTexts(texts, 0)
    assert int(few.split("fit").sum()) < 32
    teacher = pico_model(tmp_path / "teacher", seed=9, hidden_size=width, num_hidden_layers=3)
    pair, out = Pair(teacher, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, Samples(few, (), ""), out)
    maps = Procrustes(tie=tie).align(activations, Maps(), pair, quiet)
    for R in matrices(maps, 4):
        assert_close(R @ R.T, EYE, atol=1e-10)


def test_directions_that_no_row_has_stay_as_they_are(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    absent = torch.arange(20, 32)
    flat = [rows.index_fill(1, absent, 0) for rows in all_rows(activations, "student")]
    flattened = with_rows(activations, out, student=flat, teacher=flat)
    for R in matrices(Procrustes().align(flattened, Maps(), pair, quiet), 4):
        assert_close(R, EYE, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "at"), [(1e4, [0, 33]), (1e4, [34]), (1.0, [0])], ids=["sinks", "a sink", "position 0"]
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_sinks_and_the_first_position_do_not_turn_the_map(
    tmp_path: Path, model: Model, samples: Samples, side: str, size: float, at: list[int]
) -> None:
    twin, Q = rotated_twin(model, tmp_path / "twin", 4)
    pair, out = Pair(model, twin), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, twin.weights, samples, out)
    states = all_rows(activations, side)
    for boundary, rows in enumerate(states):
        generator = torch.Generator().manual_seed(boundary)
        rows[at] = size * torch.randn(len(at), 32, generator=generator)
    disturbed = with_rows(activations, out, **{side: states})
    for R in matrices(Procrustes().align(disturbed, Maps(), pair, quiet), 4):
        assert_close(R, Q.T, atol=1e-6)


@pytest.mark.parametrize("keep", [[0, 1, 2], [0, 2]])
def test_boundaries_are_compared_at_the_same_relative_depth(
    tmp_path: Path, model: Model, samples: Samples, keep: list[int]
) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=6)
    pair, out = Pair(teacher, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights.cut(keep), samples, out)
    assert activations.depths == (*keep, 3)
    turns = [random_rotation(32, depth) for depth in activations.depths]
    states = [
        activations.rows("teacher", 2 * depth).double() @ Q
        for depth, Q in zip(activations.depths, turns, strict=True)
    ]
    turned = with_rows(activations, out, student=states)
    maps = Procrustes(tie=1).align(turned, Maps(), pair, quiet)
    for R, Q in zip(matrices(maps, len(turns)), turns, strict=True):
        assert_close(R, Q.T, atol=1e-6)


def test_earlier_maps_and_figures_are_kept(tmp_path: Path, model: Model, samples: Samples) -> None:
    first = LayerDiagnostics(reference=7, extra={"note": 1})
    earlier = Maps({"neurons.0": Rotation(EYE)}, {0: first})
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    maps = Procrustes().align(activations, earlier, pair, quiet)
    assert maps["neurons.0"] is earlier["neurons.0"]
    assert maps.diagnostics[0].reference == 7
    assert maps.diagnostics[0].extra == {"note": 1}
    assert (len(earlier), dict(earlier.diagnostics)) == (1, {0: first})


@modes
def test_a_planted_rotation_is_recovered_whitened_or_not(
    tmp_path: Path, model: Model, samples: Samples, mode: str
) -> None:
    twin, Q = rotated_twin(model, tmp_path / "twin", 4)
    pair, out = Pair(model, twin), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, twin.weights, samples, out)
    maps = MODES[mode].align(activations, Maps(), pair, quiet)
    for R in matrices(maps, 4):
        assert_close(R, Q.T, atol=1e-6)
    for figures in maps.diagnostics.values():
        assert figures.k == (19 if MODES[mode].shrink < 1 else 32)
        assert figures.centred_after == pytest.approx(1, abs=1e-9)
        assert figures.centred_shuffled < 0.5


@modes
def test_a_student_inside_a_wider_stream_is_located_whitened_or_not(
    wider: WiderStream, mode: str
) -> None:
    maps = MODES[mode].align(wider.activations, Maps(), wider.pair, quiet)
    for R in matrices(maps, 4):
        assert_close(R, wider.inside, atol=1e-6)


def mean_cosine(A: torch.Tensor, B: torch.Tensor) -> float:
    return float(torch.cosine_similarity(A, B).mean())


def test_figures_are_those_of_the_validation_rows(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3)
    maps, activations = aligned(Pair(teacher, model), samples, tmp_path / "runs")
    validation, fit = samples.layout.split("validation"), samples.layout.split("fit")
    fit[0] = False
    for boundary, figures in maps.diagnostics.items():
        rotation = maps.rotation(boundary)
        assert rotation is not None
        R = rotation.matrix
        S = rms_normalise(activations.rows("student", boundary)[validation])
        T = rms_normalise(activations.rows("teacher", boundary)[validation])
        mean = rms_normalise(activations.rows("teacher", boundary)[fit]).mean(0)
        centred = mean_cosine((S - S.mean(0)) @ R, T - T.mean(0))
        assert figures.rows == int(validation.sum())
        assert figures.cosine_before == pytest.approx(mean_cosine(S, T))
        assert figures.cosine_after == pytest.approx(mean_cosine(S @ R, T))
        assert figures.cosine_mean == pytest.approx(mean_cosine(mean[None], T))
        assert figures.centred_after == pytest.approx(centred)
        assert abs(figures.centred_random) < 0.2


def test_figures_name_their_stage_and_spectrum(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3)
    maps, _ = aligned(Pair(teacher, model), samples, tmp_path / "runs")
    for boundary, figures in maps.diagnostics.items():
        assert figures.aligner == "procrustes"
        assert (figures.layer, figures.stage, figures.k) == (boundary, 0, 32)
        spectrum, null = figures.singular_values, figures.singular_values_shuffled
        assert list(spectrum) == sorted(spectrum, reverse=True)
        assert sum(null) < sum(spectrum)
        assert figures.gap_at_k == spectrum[31] / spectrum[0]
        document = json.loads(json.dumps(figures.as_dict(), allow_nan=False))
        assert LayerDiagnostics.from_dict(document) == figures


def test_the_rms_ratio_is_that_of_the_raw_streams(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    louder = [3 * rows for rows in all_rows(activations, "student")]
    maps = Procrustes().align(with_rows(activations, out, student=louder), Maps(), pair, quiet)
    for figures in maps.diagnostics.values():
        assert figures.rms_ratio == pytest.approx(3)
        assert figures.scale == pytest.approx(1)


@modes
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_that_are_not_finite_stop_before_any_solve(
    tmp_path: Path,
    model: Model,
    samples: Samples,
    side: str,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("LAPACK was called")

    twin, _ = rotated_twin(model, tmp_path / "twin", 4)
    pair, out = Pair(model, twin), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, twin.weights, samples, out)
    states = all_rows(activations, side)
    broken = with_rows(activations, out, **{side: states})
    states[1][40, 3], states[1][41, 2] = float("nan"), float("inf")
    # The program itself writes no such file.
    save_file({"rows": states[1]}, broken.root / broken.shards[side][1])
    for name in ("svd", "eigh"):
        monkeypatch.setattr(scipy.linalg, name, called)
        monkeypatch.setattr(torch.linalg, name, called)
    folder = (model if side == "teacher" else twin).ref.model
    place = f"{side} {folder}, layer boundary 1, site residual"
    with pytest.raises(RotdistillError) as error:
        MODES[mode].align(broken, Maps(), pair, quiet)
    assert f"{place}: 2 of {states[1].numel()} values are NaN or Inf" in str(error.value)


def test_the_size_of_chunks_does_not_change_the_answer(
    tmp_path: Path, model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3), model)
    maps, activations = aligned(pair, samples, tmp_path / "runs")
    monkeypatch.setattr(boundary_sums, "CHUNK_ROWS", 7)
    again = Procrustes().align(activations, Maps(), pair, quiet)
    assert_close(matrices(again, 4)[0], matrices(maps, 4)[0], atol=1e-10)
    expected = maps.diagnostics[2].cosine_shuffled
    assert again.diagnostics[2].cosine_shuffled == pytest.approx(expected, abs=1e-9)


def test_boundaries_are_read_one_at_a_time(
    tmp_path: Path, model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams_read: list[weakref.ref[torch.Tensor]] = []
    read_rows = ActivationStore.rows

    def watched(activations: ActivationStore, side: str, boundary: int) -> torch.Tensor:
        rows = read_rows(activations, side, boundary)
        streams_read.append(weakref.ref(rows))
        assert sum(stream() is not None for stream in streams_read) <= 3
        return rows

    monkeypatch.setattr(ActivationStore, "rows", watched)
    aligned(Pair(model, model), samples, tmp_path / "runs")
    # Each boundary for its sums and for its diagnostics, both with the thresholds of the sample.
    assert len(streams_read) == 32


def test_a_split_without_rows_is_refused(tmp_path: Path, model: Model, samples: Samples) -> None:
    for missing, other in (("fit", "validation"), ("validation", "fit")):
        one_split = Samples(PackedTexts(samples.layout.select(other).texts, 0), (), "")
        with pytest.raises(RecipeError, match=f"boundary 0 has no {missing} rows"):
            aligned(Pair(model, model), one_split, tmp_path / missing)


def test_a_ridge_that_would_do_nothing_is_refused(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    with pytest.raises(RecipeError, match="ridge is for the covariances"):
        Procrustes(ridge=0.1).align(activations, Maps(), pair, quiet)
