"""The activation store: which rows it gives, and how it is stored and restored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Side, Split
from rotdistill_core.forward.activations import (
    ActivationStore,
    restore_activations,
    write_shard,
)
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import (
    captured_activations,
    final_states,
    pico_model,
    pico_output,
    pico_samples,
)

SAMPLES = pico_samples(texts=10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico_model(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=4)


@pytest.fixture
def out(tmp_path: Path) -> StepOutput:
    return pico_output(tmp_path / "runs")


@pytest.fixture
def activations(model: Model, out: StepOutput) -> ActivationStore:
    """Both sides of a student cut to layers 0, 1 and 3."""
    return captured_activations(Pair(model, model), model.weights.cut([0, 1, 3]), SAMPLES, out)


def test_teacher_rows_follow_the_texts_asked_for(
    model: Model, activations: ActivationStore
) -> None:
    layout = SAMPLES.layout.select(Split.VALIDATION)
    rows = activations.teacher_states(layout, 4)
    expected = final_states(model.weights, layout, torch.float32)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    assert activations.paired_mask(layout).all()
    assert activations.width(Side.TEACHER) == 32


def test_depths_are_those_of_the_uncut_student(activations: ActivationStore) -> None:
    assert activations.depths == (0, 1, 3, 4)
    assert activations.teacher_boundaries == (0, 1, 2, 3, 4)


def test_store_is_restored_from_json(activations: ActivationStore) -> None:
    info = json.loads(json.dumps(activations.info(SAMPLES)))
    assert restore_activations(info, activations.root, SAMPLES) == activations


def test_texts_are_stored_as_runs_of_their_numbers(activations: ActivationStore) -> None:
    sample = SAMPLES.layout.select(Split.FIT)
    part = replace(activations, layouts={**activations.layouts, Side.STUDENT: sample})
    info = part.info(SAMPLES)
    assert info["texts"] == {Side.TEACHER: [[0, 10]], Side.STUDENT: [[0, 3], [5, 8]]}
    assert restore_activations(info, part.root, SAMPLES) == part
    info["texts"][Side.STUDENT] = [[8, 11]]
    with pytest.raises(ValueError, match="the run has 10 texts"):
        restore_activations(info, part.root, SAMPLES)


def test_rows_of_two_tokenizers_are_means_over_spans(out: StepOutput) -> None:
    text = SAMPLES.layout.texts[0]
    student = PackedTexts((replace(text, tokens=text.tokens[:3], plain=True),), 0)
    teacher = PackedTexts((replace(text, tokens=text.tokens[:5], plain=True),), 0)
    T = torch.arange(10.0).reshape(5, 2)
    spans = torch.tensor([[0, 0], [1, 3], [3, 5]])
    shards = {
        side: (write_shard(out, side, 0, rows, rows.dtype, {}),)
        for side, rows in ((Side.TEACHER, T), (Side.SPANS, spans))
    }
    layouts = {Side.TEACHER: teacher, Side.SPANS: student}
    store = ActivationStore(out.store.root, shards, layouts, (0,), (0,))
    expected = torch.stack([T[0], T[1:3].mean(0), T[3:5].mean(0)])
    torch.testing.assert_close(store.teacher_states(student, 0), expected)
    assert store.paired_mask(student).tolist() == [False, True, True]


def test_anchor_replaces_the_teacher_for_aligners(activations: ActivationStore) -> None:
    assert activations.for_alignment is activations
    anchor = activations.shards[Side.STUDENT]
    layouts = {**activations.layouts, Side.ANCHOR: activations.layouts[Side.STUDENT]}
    both = replace(activations, shards={**activations.shards, Side.ANCHOR: anchor}, layouts=layouts)
    seen = both.for_alignment
    assert seen.shards == {Side.TEACHER: anchor, Side.STUDENT: anchor}
    assert seen.teacher_boundaries == (0, 1, 2, 3, 4)


def test_sidecar_describes_its_shard(out: StepOutput) -> None:
    rows = torch.zeros(3, 2)
    shard = write_shard(out, Side.STUDENT, 7, rows, torch.bfloat16, {"model": "pico"})
    path = out.store.root / shard
    assert path.name == "00007.safetensors"
    sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar == {
        "model": "pico",
        "site": "residual",
        "boundary": 7,
        "tokens": 3,
        "shape": [3, 2],
        "dtype": "bfloat16",
        "sha256": out.used[shard].sha256,
        "shard": "00007.safetensors",
    }
