"""Procrustes on captures: planted rotations are found again, and the diagnostics can tell a fit from chance."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import scipy.linalg
import torch
from rotdistill_procrustes.step import Procrustes, steps

from rotdistill_core.alignment import streams as rotdistill_streams
from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.data.packed import PackedTexts, Samples
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.forward.activations import ActivationStore, rms_normalise
from rotdistill_core.linalg.maps import Maps, Rotation
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    captured_activations,
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
    "shrink": Procrustes(shrink=0.6), "zscore": Procrustes(whiten="zscore"), "full": Procrustes(whiten="full"),
    "ridge": Procrustes(whiten="full", ridge=0.1), "all": Procrustes(whiten="full", ridge=0.01, shrink=0.6, tie=2),
}  # fmt: skip
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def samples() -> Samples:
    return pico_samples()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "model", num_hidden_layers=3)


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def aligned(
    pair: Pair, samples: Samples, root: Path, tie: Tie = "all"
) -> tuple[Maps, ActivationStore]:
    activations = captured_activations(pair, pair.student.weights, samples, pico_output(root))
    return Procrustes(tie=tie).align(activations, Maps(), pair, quiet), activations


def matrices(maps: Maps, boundaries: int) -> list[torch.Tensor]:
    found = [maps.rotation(b) for b in range(boundaries)]
    assert all(isinstance(rotation, Rotation) for rotation in found)
    assert len(maps) == len(maps.diagnostics) == boundaries
    return [rotation.matrix for rotation in found if rotation]


def planted(
    activations: ActivationStore, out: StepOutput, **sides: Sequence[torch.Tensor]
) -> ActivationStore:
    """Return the bank with other rows in place of what was captured."""
    shards = dict(activations.shards)
    for side, states in sides.items():
        paths = [
            out.tensors(f"planted/{side}/{b}.safetensors", {"rows": rows})
            for b, rows in enumerate(states)
        ]
        shards[side] = tuple(path.relative_to(activations.root).as_posix() for path in paths)
    return replace(activations, shards=shards)


def test_it_is_an_aligner() -> None:
    assert steps() == [Procrustes]
    assert stage_of(Procrustes) == "align"


@ties
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_planted_rotation_is_found_again_from_the_capture_alone(
    tmp_path: Path, samples: Samples, model_type: str, tie: Tie
) -> None:
    teacher = pico_model(tmp_path / "model", model_type, num_hidden_layers=3)
    twin, Q = rotated_twin(teacher, tmp_path / "twin", 4)
    maps, _ = aligned(Pair(teacher, twin), samples, tmp_path / "runs", tie)
    for R in matrices(maps, 4):
        torch.testing.assert_close(R, Q.T, rtol=0, atol=1e-6)
    for card in maps.diagnostics.values():
        assert card["cosine_after"] == pytest.approx(1, abs=1e-9)
        assert (card["rms_ratio"], card["scale"]) == pytest.approx((1, 1), abs=1e-6)
    assert (maps.tied() is not None) is (tie == "all")


@ties
def test_identical_models_need_no_rotation(
    tmp_path: Path, model: Model, samples: Samples, tie: Tie
) -> None:
    maps, _ = aligned(Pair(model, model), samples, tmp_path / "runs", tie)
    for R in matrices(maps, 4):
        torch.testing.assert_close(R, EYE, rtol=0, atol=1e-9)
    assert all(
        card["cosine_before"] == pytest.approx(1, abs=1e-12) for card in maps.diagnostics.values()
    )


@pytest.mark.parametrize(
    ("tie", "stages"),
    [("all", [0, 0, 0, 0]), (1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (3, [0, 0, 0, 1])],
)
def test_boundaries_of_a_stage_share_their_rotation(
    tmp_path: Path, model: Model, samples: Samples, tie: Tie, stages: list[int]
) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3)
    maps, _ = aligned(Pair(teacher, model), samples, tmp_path / "runs", tie)
    found = matrices(maps, 4)
    assert [maps.diagnostics[b]["stage"] for b in range(4)] == stages
    for a in range(4):
        for b in range(4):
            assert torch.equal(found[a], found[b]) is (stages[a] == stages[b])


@ties
def test_a_wider_teacher_gives_orthonormal_rows_and_a_projector(
    tmp_path: Path, model: Model, samples: Samples, tie: Tie
) -> None:
    teacher = pico_model(tmp_path / "wide", seed=9, hidden_size=48, num_hidden_layers=6)
    maps, _ = aligned(Pair(teacher, model), samples, tmp_path / "runs", tie)
    for boundary, R in enumerate(matrices(maps, 4)):
        P = R.T @ R
        assert R.shape == (32, 48)
        torch.testing.assert_close(R @ R.T, EYE, rtol=0, atol=1e-12)
        torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-12)
        assert maps.diagnostics[boundary]["rank_rtr"] == pytest.approx(32)
        assert maps.diagnostics[boundary]["max_rrt"] < 1e-12
        assert maps.diagnostics[boundary]["cosine_before"] is None


def test_a_student_inside_a_wider_stream_is_found_again(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    teacher = pico_model(tmp_path / "wide", seed=9, hidden_size=48, num_hidden_layers=3)
    pair, out = Pair(teacher, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    inside = random_rotation(48, 2)[:32]
    seen = planted(
        activations,
        out,
        teacher=[activations.rows("student", b).double() @ inside for b in range(4)],
    )
    maps = Procrustes().align(seen, Maps(), pair, quiet)
    for R in matrices(maps, 4):
        torch.testing.assert_close(R, inside, rtol=0, atol=1e-6)
    assert all(
        card["cosine_after"] == pytest.approx(1, abs=1e-9) for card in maps.diagnostics.values()
    )


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
    for card in maps.diagnostics.values():
        assert card["cosine_shuffled"] < card["cosine_after"] - 0.4
        assert card["centred_shuffled"] < card["centred_after"] - 0.5
        assert abs(card["cosine_before"]) < 0.5


@ties
@pytest.mark.parametrize("width", [32, 48])
def test_fewer_rows_than_dimensions_still_give_an_orthogonal_map(
    tmp_path: Path, model: Model, tie: Tie, width: int
) -> None:
    layout = pico_samples(texts=5, prefix=0).layout
    few = PackedTexts(layout.select("fit", most=1).texts + layout.select("validation").texts, 0)
    assert int(few.split("fit").sum()) < 32
    pair = Pair(
        pico_model(tmp_path / "teacher", seed=9, hidden_size=width, num_hidden_layers=3), model
    )
    activations = captured_activations(
        pair, model.weights, Samples(few, (), ""), pico_output(tmp_path / "runs")
    )
    maps = Procrustes(tie=tie).align(activations, Maps(), pair, quiet)
    for R in matrices(maps, 4):
        torch.testing.assert_close(R @ R.T, EYE, rtol=0, atol=1e-10)


def test_directions_that_no_row_has_stay_where_they_are(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    flat = [
        activations.rows("student", b).clone().index_fill_(1, torch.arange(20, 32), 0)
        for b in range(4)
    ]
    seen = planted(activations, out, student=flat, teacher=flat)
    for R in matrices(Procrustes().align(seen, Maps(), pair, quiet), 4):
        torch.testing.assert_close(R, EYE, rtol=0, atol=1e-9)


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
    states = [activations.rows(side, b).clone() for b in range(4)]
    for b, rows in enumerate(states):
        rows[at] = size * torch.randn(len(at), 32, generator=torch.Generator().manual_seed(b))
    maps = Procrustes().align(planted(activations, out, **{side: states}), Maps(), pair, quiet)
    for R in matrices(maps, 4):
        torch.testing.assert_close(R, Q.T, rtol=0, atol=1e-6)


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
    maps = Procrustes(tie=1).align(planted(activations, out, student=states), Maps(), pair, quiet)
    for R, Q in zip(matrices(maps, len(turns)), turns, strict=True):
        torch.testing.assert_close(R, Q.T, rtol=0, atol=1e-6)


def test_earlier_maps_are_kept(tmp_path: Path, model: Model, samples: Samples) -> None:
    earlier = Maps({"neurons.0": Rotation(EYE)}, {0: {"note": 1}})
    pair = Pair(model, model)
    activations = captured_activations(pair, model.weights, samples, pico_output(tmp_path / "runs"))
    maps = Procrustes().align(activations, earlier, pair, quiet)
    assert maps["neurons.0"] is earlier["neurons.0"]
    assert maps.diagnostics[0]["note"] == 1
    assert (len(earlier), dict(earlier.diagnostics)) == (1, {0: {"note": 1}})


@modes
def test_a_planted_rotation_is_found_again_whitened_or_not(
    tmp_path: Path, model: Model, samples: Samples, mode: str
) -> None:
    twin, Q = rotated_twin(model, tmp_path / "twin", 4)
    pair = Pair(model, twin)
    activations = captured_activations(pair, twin.weights, samples, pico_output(tmp_path / "runs"))
    maps = MODES[mode].align(activations, Maps(), pair, quiet)
    for R in matrices(maps, 4):
        torch.testing.assert_close(R, Q.T, rtol=0, atol=1e-6)
    for card in maps.diagnostics.values():
        assert card["k"] == (19 if MODES[mode].shrink < 1 else 32)
        assert card["centred_after"] == pytest.approx(1, abs=1e-9)
        assert card["centred_shuffled"] < 0.5


@modes
def test_a_student_inside_a_wider_stream_is_found_again_whitened_or_not(
    tmp_path: Path, model: Model, samples: Samples, mode: str
) -> None:
    pair, out = (
        Pair(pico_model(tmp_path / "wide", seed=9, hidden_size=48, num_hidden_layers=3), model),
        pico_output(tmp_path / "runs"),
    )
    activations = captured_activations(pair, model.weights, samples, out)
    inside = random_rotation(48, 2)[:32]
    seen = planted(
        activations,
        out,
        teacher=[activations.rows("student", b).double() @ inside for b in range(4)],
    )
    for R in matrices(MODES[mode].align(seen, Maps(), pair, quiet), 4):
        torch.testing.assert_close(R, inside, rtol=0, atol=1e-6)


def test_the_card_has_every_figure_beside_its_nulls(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    teacher = pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3)
    maps, activations = aligned(Pair(teacher, model), samples, tmp_path / "runs")
    use = samples.layout.split("validation")
    for boundary, card in maps.diagnostics.items():
        assert json.loads(json.dumps(card, allow_nan=False)) == card
        for figure in ("cosine", "centred"):
            assert {name.removeprefix(f"{figure}_") for name in card if name.startswith(figure)} == {
                "before", "after", "shuffled", "random", "mean",
            }  # fmt: skip
        assert (card["aligner"], card["layer"], card["stage"], card["k"]) == (
            "procrustes",
            boundary,
            0,
            32,
        )
        assert card["singular_values"] == sorted(card["singular_values"], reverse=True)
        assert sum(card["singular_values_shuffled"]) < sum(card["singular_values"])
        assert card["gap_at_k"] == card["singular_values"][31] / card["singular_values"][0]
        S, T = (
            rms_normalise(activations.rows(side, boundary)[use]) for side in ("student", "teacher")
        )
        R = maps.rotation(boundary)
        assert R is not None
        assert card["rows"] == int(use.sum())
        assert card["cosine_after"] == pytest.approx(
            float(torch.cosine_similarity(S @ R.matrix, T).mean())
        )
        assert card["centred_after"] == pytest.approx(
            float(torch.cosine_similarity((S - S.mean(0)) @ R.matrix, T - T.mean(0)).mean())
        )
        assert abs(card["centred_random"]) < 0.2
        fit = samples.layout.split("fit")
        fit[0] = False
        mean = rms_normalise(activations.rows("teacher", boundary)[fit]).mean(0)
        assert card["cosine_mean"] == pytest.approx(
            float(torch.cosine_similarity(mean[None], T).mean())
        )


def test_the_rms_ratio_is_that_of_the_raw_streams(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    pair, out = Pair(model, model), pico_output(tmp_path / "runs")
    activations = captured_activations(pair, model.weights, samples, out)
    louder = planted(
        activations, out, student=[3 * activations.rows("student", b) for b in range(4)]
    )
    diagnostics = Procrustes().align(louder, Maps(), pair, quiet).diagnostics.values()
    assert all(
        card["rms_ratio"] == pytest.approx(3) and card["scale"] == pytest.approx(1)
        for card in diagnostics
    )


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("mode", MODES)
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
    states = [activations.rows(side, b).clone() for b in range(4)]
    states[1][40, 3], states[1][41, 2] = float("nan"), float("inf")
    bad = planted(activations, out, **{side: states})
    for name in ("svd", "eigh"):
        monkeypatch.setattr(scipy.linalg, name, called)
        monkeypatch.setattr(torch.linalg, name, called)
    folder = (model if side == "teacher" else twin).ref.model
    with pytest.raises(RotdistillError) as error:
        MODES[mode].align(bad, Maps(), pair, quiet)
    assert (
        f"{side} {folder}, layer boundary 1, site residual: 2 of {states[1].numel()} values are NaN or Inf"
        in str(error.value)
    )


def test_chunks_do_not_change_the_answer(
    tmp_path: Path, model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3), model)
    maps, activations = aligned(pair, samples, tmp_path / "runs")
    monkeypatch.setattr(rotdistill_streams, "CHUNK", 7)
    again = Procrustes().align(activations, Maps(), pair, quiet)
    torch.testing.assert_close(matrices(again, 4)[0], matrices(maps, 4)[0], rtol=0, atol=1e-10)
    assert again.diagnostics[2]["cosine_shuffled"] == pytest.approx(
        maps.diagnostics[2]["cosine_shuffled"], abs=1e-9
    )


def test_boundaries_are_read_one_at_a_time(
    tmp_path: Path, model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    rows = ActivationStore.rows

    def watched(activations: ActivationStore, side: str, boundary: int) -> torch.Tensor:
        alive.append(weakref.ref(read := rows(activations, side, boundary)))
        assert sum(each() is not None for each in alive) <= 3
        return read

    monkeypatch.setattr(ActivationStore, "rows", watched)
    aligned(Pair(model, model), samples, tmp_path / "runs")
    assert len(alive) == 16


def test_a_split_without_rows_is_refused(tmp_path: Path, model: Model, samples: Samples) -> None:
    for split, other in (("fit", "validation"), ("validation", "fit")):
        some = Samples(PackedTexts(samples.layout.select(other).texts, 0), (), "")
        with pytest.raises(RecipeError, match=f"boundary 0 has no {split} rows"):
            aligned(Pair(model, model), some, tmp_path / split)


def test_a_ridge_that_would_do_nothing_is_refused(
    tmp_path: Path, model: Model, samples: Samples
) -> None:
    pair = Pair(model, model)
    activations = captured_activations(pair, model.weights, samples, pico_output(tmp_path / "runs"))
    with pytest.raises(RecipeError, match="ridge is for the covariances"):
        Procrustes(ridge=0.1).align(activations, Maps(), pair, quiet)
