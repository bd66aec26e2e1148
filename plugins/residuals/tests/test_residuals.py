"""The steps that come with the core, on pico models: capture and change of basis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rotdistill_residuals.step import Residuals
from safetensors.torch import load_file

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.packed import Samples
from rotdistill_core.errors import RotdistillError
from rotdistill_core.forward.activations import ActivationStore, restore_activations
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import final_states, pico_model, pico_output, pico_samples, save_folder

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def samples() -> Samples:
    return pico_samples(texts=20)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(
        pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3),
        pico_model(tmp_path / "student", "qwen2", seed=1),
    )


@pytest.fixture
def wide(tmp_path: Path) -> Pair:
    return Pair(
        pico_model(tmp_path / "wide", seed=9, hidden_size=48),
        pico_model(tmp_path / "narrow", seed=1),
    )


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


def count_runs(monkeypatch: pytest.MonkeyPatch, most: int = 10**6) -> list[int]:
    """Count the layers that are computed, and fail when there are more than `most`."""
    ran: list[int] = []
    real = LayerwiseForward.run

    def run(walk: LayerwiseForward, *args: object, **kwargs: object) -> None:
        assert len(ran) < most, "a layer was computed"
        ran.append(walk.boundary)
        real(walk, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerwiseForward, "run", run)
    return ran


def shard_bytes(activations: ActivationStore) -> dict[str, bytes]:
    return {
        name: (activations.root / name).read_bytes()
        for shards in activations.shards.values()
        for name in shards
    }


def test_residuals_write_one_shard_and_sidecar_per_boundary(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    activations = Residuals().capture(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
    )
    assert (len(activations.shards["teacher"]), len(activations.shards["student"])) == (4, 3)
    assert (activations.depths, activations.layouts["teacher"]) == ((0, 1, 2), samples.layout)
    assert {text.split for text in activations.layouts["student"].texts} == {"fit", "validation"}
    for side, model in (("teacher", pair.teacher), ("student", pair.student)):
        for boundary, name in enumerate(activations.shards[side]):
            shard = activations.root / name
            sidecar = json.loads(shard.with_suffix(".json").read_text(encoding="utf-8"))
            rows = load_file(shard)["rows"]
            assert sidecar["sha256"] == sha256_of(shard)
            assert (sidecar["side"], sidecar["boundary"], sidecar["layers"]) == (
                side,
                boundary,
                model.depth,
            )
            assert (sidecar["model"], sidecar["dtype"], sidecar["shard"]) == (
                model.ref.model,
                "float32",
                shard.name,
            )
            assert (
                sidecar["shape"]
                == list(rows.shape)
                == [activations.layouts[side].rows, model.width]
            )
            assert torch.equal(activations.rows(side, boundary), rows)
        last = final_states(model.weights, activations.layouts[side], torch.float32)
        assert torch.equal(activations.rows(side, model.depth), last)


def test_a_second_capture_with_the_same_key_computes_nothing(
    pair: Pair, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Residuals().capture(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
    )
    count_runs(monkeypatch, most=0)
    again = Residuals().capture(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
    )
    assert again.info() == first.info()
    restored = restore_activations(json.loads(json.dumps(first.info())), first.root, samples)
    assert restored == first


def test_another_run_in_the_folder_shares_the_teachers_shards(
    pair: Pair, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Residuals().capture(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
    )
    ran = count_runs(monkeypatch)
    out = StepOutput(
        ArtifactStore(tmp_path / "runs"), Ledger(tmp_path / "runs" / "other"), "other key", "step"
    )
    other = Residuals().capture(pair, pair.student.weights, samples, out, quiet)
    assert ran == [0, 1]
    assert other.shards["teacher"] == first.shards["teacher"]
    assert set(other.shards["teacher"]) <= set(out.used)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_killed_capture_goes_on_at_the_layer_where_it_was(
    pair: Pair, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = Residuals().capture(
        pair, pair.student.weights, samples, pico_output(tmp_path / "whole"), quiet
    )
    with (
        monkeypatch.context() as patch,
        pytest.raises(AssertionError, match="a layer was computed"),
    ):
        count_runs(patch, most=stop)
        Residuals().capture(
            pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
        )
    ran = count_runs(monkeypatch)
    resumed = Residuals().capture(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
    )
    assert ran == [0, 1, 2, 0, 1][stop:]
    assert shard_bytes(resumed) == shard_bytes(whole)


def test_a_damaged_shard_is_captured_again(pair: Pair, samples: Samples, tmp_path: Path) -> None:
    whole = Residuals().capture(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
    )
    expected = shard_bytes(whole)
    shard = whole.root / whole.shards["student"][1]
    shard.write_bytes(expected[whole.shards["student"][1]][:-1] + b"\x7f")
    again = Residuals().capture(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
    )
    assert shard_bytes(again) == expected


def test_residuals_can_be_kept_in_bfloat16_and_on_fewer_student_texts(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    step = Residuals(store="bfloat16", student_texts=3)
    activations = step.capture(
        pair, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
    )
    assert len(activations.layouts["student"].texts) == 3
    assert activations.rows("student", 2).dtype == torch.bfloat16
    assert torch.equal(
        activations.rows("teacher", 3),
        final_states(pair.teacher.weights, samples.layout, torch.float32).bfloat16(),
    )


def test_nan_in_the_student_stops_with_model_and_layer_named(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    broken = pair.student.weights.edit(
        {DOWN: torch.full_like(pair.student.weights[DOWN], torch.nan)}
    )
    with pytest.raises(
        RotdistillError, match=r"student: layer 1: \d+ rows are NaN or Inf, the first is row 0"
    ) as told:
        Residuals().capture(pair, broken, samples, pico_output(tmp_path / "runs"), quiet)
    assert pair.student.ref.model in str(told.value)


def test_infinite_weights_in_the_teacher_stop_with_model_and_layer_named(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    save_folder(
        pair.teacher.weights.edit({DOWN: torch.full((32, 48), torch.inf)}),
        pair.teacher.folder,
        tmp_path / "inf",
    )
    broken = Pair(open_model(ModelRef(model=str(tmp_path / "inf"))), pair.student)
    with pytest.raises(RotdistillError, match=r"inf: layer 1: \d+ rows are NaN or Inf"):
        Residuals().capture(
            broken, pair.student.weights, samples, pico_output(tmp_path / "runs"), quiet
        )


def test_nan_in_the_embeddings_is_not_blamed_on_a_layer(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    name = "model.embed_tokens.weight"
    broken = pair.student.weights.edit(
        {name: torch.full_like(pair.student.weights[name], torch.nan)}
    )
    with pytest.raises(RotdistillError, match="NaN or Inf") as told:
        Residuals().capture(pair, broken, samples, pico_output(tmp_path / "runs"), quiet)
    assert "layer -1" not in str(told.value)
