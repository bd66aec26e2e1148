"""The step `residuals` on pico models: shards, reuse, resumption after a kill, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rotdistill_residuals.step import Residuals, steps
from safetensors.torch import load_file, save_file

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.forward.activations import ActivationStore, restore_activations
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    PicoWorkspace,
    final_states,
    parametrize_with_checks,
    pico_baked,
    pico_model,
    pico_output,
    pico_samples,
    random_rotation,
)

DOWN = "model.layers.1.mlp.down_proj.weight"


# `layer_map = "match"` is left to test_layer_map.py and `store = "moments"` to test_sums.py: the
# kit's output already holds shards of all texts, and the step takes them for its own, of fewer.
@parametrize_with_checks(Residuals, {}, {"dtype": "bfloat16"}, {"control": "shuffled"})
def test_residuals_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.fixture
def samples() -> Samples:
    return pico_samples(texts=20)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(
        pico_model(tmp_path / "teacher", seed=9, num_hidden_layers=3),
        pico_model(tmp_path / "student", "qwen2", seed=1),
    )


def quiet(*_: object) -> None:
    """Take progress and print nothing."""


def captured(
    pair: Pair,
    samples: Samples,
    runs: Path,
    step: Residuals | None = None,
    weights: Weights | None = None,
) -> ActivationStore:
    step = step or Residuals()
    return step.capture(pair, weights or pair.student.weights, samples, pico_output(runs), quiet)


def count_runs(monkeypatch: pytest.MonkeyPatch, limit: int = 10**6) -> list[int]:
    """Record the layers that are computed, and fail when there are more than `limit`."""
    layers: list[int] = []
    real = LayerwiseForward.run

    def run(forward: LayerwiseForward, *args: object, **kwargs: object) -> None:
        assert len(layers) < limit, "a layer was computed"
        layers.append(forward.boundary)
        real(forward, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerwiseForward, "run", run)
    return layers


def shard_bytes(activations: ActivationStore) -> dict[str, bytes]:
    return {
        name: (activations.root / name).read_bytes()
        for shards in activations.shards.values()
        for name in shards
    }


def test_the_plugin_offers_the_step() -> None:
    assert steps() == [Residuals]


def test_each_boundary_has_one_shard_with_the_models_rows(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    activations = captured(pair, samples, tmp_path / "runs")
    assert len(activations.shards[Side.TEACHER]) == 4
    assert len(activations.shards[Side.STUDENT]) == 3
    assert activations.depths == (0, 1, 2)
    assert activations.layouts[Side.TEACHER] == samples.layout
    student_texts = activations.layouts[Side.STUDENT].texts
    assert {text.split for text in student_texts} == {Split.FIT, Split.VALIDATION}
    for side, model in ((Side.TEACHER, pair.teacher), (Side.STUDENT, pair.student)):
        for boundary, name in enumerate(activations.shards[side]):
            rows = load_file(activations.root / name)["rows"]
            assert list(rows.shape) == [activations.layouts[side].rows, model.width]
            assert torch.equal(activations.rows(side, boundary), rows)
        last = final_states(model.weights, activations.layouts[side], torch.float32)
        assert torch.equal(activations.rows(side, model.depth), last)


def test_each_shard_has_a_sidecar_that_describes_it(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    activations = captured(pair, samples, tmp_path / "runs")
    for side, model in ((Side.TEACHER, pair.teacher), (Side.STUDENT, pair.student)):
        for boundary, name in enumerate(activations.shards[side]):
            shard = activations.root / name
            layout = activations.layouts[side]
            assert json.loads(shard.with_suffix(".json").read_text(encoding="utf-8")) == {
                "model": model.ref.model,
                "side": side,
                "layout": layout.digest(),
                "layers": model.depth,
                "site": "residual",
                "boundary": boundary,
                "tokens": layout.rows,
                "shape": [layout.rows, model.width],
                "dtype": "float32",
                "sha256": sha256_of(shard),
                "shard": shard.name,
            }


def test_a_second_capture_with_the_same_key_computes_nothing(
    pair: Pair, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = captured(pair, samples, tmp_path / "runs")
    count_runs(monkeypatch, limit=0)
    again = captured(pair, samples, tmp_path / "runs")
    assert again.info(samples) == first.info(samples)


def test_a_capture_is_restored_from_its_info(pair: Pair, samples: Samples, tmp_path: Path) -> None:
    activations = captured(pair, samples, tmp_path / "runs")
    info = json.loads(json.dumps(activations.info(samples)))
    assert restore_activations(info, activations.root, samples) == activations


def test_another_run_in_the_folder_shares_the_teachers_shards(
    pair: Pair, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = captured(pair, samples, tmp_path / "runs")
    layers = count_runs(monkeypatch)
    other_run = Ledger(tmp_path / "runs" / "other")
    out = StepOutput(ArtifactStore(tmp_path / "runs"), other_run, "other key", "step")
    other = Residuals().capture(pair, pair.student.weights, samples, out, quiet)
    assert layers == [0, 1]
    assert other.shards[Side.TEACHER] == first.shards[Side.TEACHER]
    assert set(other.shards[Side.TEACHER]) <= set(out.used)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_killed_capture_resumes_at_the_layer_where_it_stopped(
    pair: Pair, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = captured(pair, samples, tmp_path / "whole")
    with (
        monkeypatch.context() as patch,
        pytest.raises(AssertionError, match="a layer was computed"),
    ):
        count_runs(patch, limit=stop)
        captured(pair, samples, tmp_path / "runs")
    layers = count_runs(monkeypatch)
    resumed = captured(pair, samples, tmp_path / "runs")
    assert layers == [0, 1, 2, 0, 1][stop:]
    assert shard_bytes(resumed) == shard_bytes(whole)


def test_a_damaged_shard_is_captured_again(pair: Pair, samples: Samples, tmp_path: Path) -> None:
    whole = captured(pair, samples, tmp_path / "runs")
    expected = shard_bytes(whole)
    name = whole.shards[Side.STUDENT][1]
    (whole.root / name).write_bytes(expected[name][:-1] + b"\x7f")
    again = captured(pair, samples, tmp_path / "runs")
    assert shard_bytes(again) == expected


def test_shards_can_be_bfloat16(pair: Pair, samples: Samples, tmp_path: Path) -> None:
    activations = captured(pair, samples, tmp_path / "runs", Residuals(dtype="bfloat16"))
    assert activations.rows(Side.STUDENT, 2).dtype == torch.bfloat16
    last = final_states(pair.teacher.weights, samples.layout, torch.float32)
    assert torch.equal(activations.rows(Side.TEACHER, 3), last.bfloat16())


def test_the_student_can_be_captured_on_its_first_texts(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    activations = captured(pair, samples, tmp_path / "runs", Residuals(student_texts=3))
    first = samples.layout.select(Split.FIT, Split.VALIDATION).texts[:3]
    assert activations.layouts[Side.STUDENT].texts == first
    assert activations.layouts[Side.TEACHER] == samples.layout


@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 2]], ids=["whole", "cut"])
def test_a_baked_prompt_pairs_rows_with_those_of_the_teacher_that_reads_it(
    tmp_path: Path, kept: list[int]
) -> None:
    model = pico_model(tmp_path / "model", num_hidden_layers=3)
    samples = pico_baked(pico_samples(texts=20, guard=4))
    weights = model.weights.cut(kept)
    out = pico_output(tmp_path / "runs")
    activations = Residuals().capture(Pair(model, model), weights, samples, out, quiet)
    restored = restore_activations(activations.info(samples), activations.root, samples)
    layout = samples.layout.select(Split.HELDOUT, Split.GUARD)
    rows, targets, texts = layout.prediction_rows(Split.HELDOUT)
    read = samples.theirs
    assert read is not None
    theirs, same_targets, same_texts = read.prediction_rows(Split.HELDOUT)
    assert torch.equal(targets, same_targets)
    assert [text.id for text in texts] == [text.id for text in same_texts]
    expected = final_states(model.weights, read, torch.float32)[theirs]
    found = restored.teacher_states(layout, 3)[rows]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # All but the prompt is paired, row 0 of the student included: nothing came before it.
    assert restored.paired_mask(samples.layout).all()
    assert out.notes["paired rows"] == f"{samples.layout.rows} of {samples.layout.rows}"


@pytest.mark.parametrize("wider", [0, 16])
def test_a_student_in_another_basis_is_refused(
    pair: Pair, samples: Samples, tmp_path: Path, wider: int
) -> None:
    width = pair.student.width
    rows = random_rotation(width + wider)[:width]
    folded = pair.student.weights.fold({"residual": Rotation(rows)})
    with pytest.raises(RecipeError, match="put the capture before basis-fold"):
        captured(pair, samples, tmp_path / "runs", weights=folded)


NARROW_AND_FOLDED = """
[[step]]
use = "chop"
width = 24
[[step]]
use = "residuals"
[[step]]
use = "random-rotation"
[[step]]
use = "basis-fold"
mode = "canonical"
[[step]]
id = "again"
use = "residuals"
"""


def test_a_student_that_was_cut_narrower_and_then_folded_is_refused(tmp_path: Path) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model()
    path = workspace.recipe(NARROW_AND_FOLDED)
    with pytest.raises(RecipeError, match="put the capture before basis-fold"):
        workspace.run(path)
    fold = '[[step]]\nuse = "basis-fold"\nmode = "canonical"\n'
    # Without the fold the second capture is one of the narrow stream.
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(fold, ""), encoding="utf-8")
    workspace.run(path)


def test_nan_in_the_student_is_refused_by_tensor(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    weights = pair.student.weights
    broken = weights.edit({DOWN: torch.full_like(weights[DOWN], torch.nan)})
    with pytest.raises(RotdistillError, match=rf"{DOWN}: 1536 of its 1536 numbers are NaN or Inf"):
        captured(pair, samples, tmp_path / "runs", weights=broken)


def test_infinite_weights_in_the_teacher_are_refused_by_tensor(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    shutil.copytree(pair.teacher.folder, tmp_path / "inf")
    path = tmp_path / "inf" / "model.safetensors"
    tensors = load_file(path)
    tensors[DOWN].fill_(torch.inf)
    save_file(tensors, path, {"format": "pt"})  # the program itself writes no such file
    broken = Pair(open_model(ModelRef(model=str(tmp_path / "inf"))), pair.student)
    with pytest.raises(RotdistillError, match=rf"inf.*{DOWN}: 1536 of its 1536 numbers are NaN"):
        captured(broken, samples, tmp_path / "runs")


def test_nan_in_the_embeddings_is_not_blamed_on_a_layer(
    pair: Pair, samples: Samples, tmp_path: Path
) -> None:
    name = "model.embed_tokens.weight"
    weights = pair.student.weights
    broken = weights.edit({name: torch.full_like(weights[name], torch.nan)})
    with pytest.raises(RotdistillError, match=r"the embeddings: .* NaN or Inf"):
        captured(pair, samples, tmp_path / "runs", weights=broken)
