"""Captured states are used as long as they are the student's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from rotdistill_lm_head_ridge import _final_states
from rotdistill_lm_head_ridge._final_states import PROBE_TEXTS, StudentStates
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.data.splits import Split
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.testing import captured_activations, pico_model, pico_output, pico_samples

LAYOUT = pico_samples(guard=4).layout.select(Split.FIT, Split.VALIDATION, Split.GUARD_VALIDATION)
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(pico_model(tmp_path / "teacher", seed=9), pico_model(tmp_path / "student"))


@pytest.fixture
def computed() -> Iterator[list[PackedTexts]]:
    """Note the layouts that are sent through the student."""
    layouts: list[PackedTexts] = []

    def noted(weights: Weights, layout: PackedTexts, *rest: object) -> LayerwiseForward:
        layouts.append(layout)
        return LayerwiseForward(weights, layout, *rest)  # type: ignore[arg-type]

    with mock.patch.object(_final_states, "LayerwiseForward", noted):
        yield layouts


def captured(pair: Pair, root: Path, limit: int | None = None) -> ActivationStore:
    """Return activations of fit and validation texts, or the first of them."""
    samples = pico_samples(guard=4)
    layout = samples.layout.select(Split.FIT, Split.VALIDATION, limit=limit)
    return captured_activations(
        pair, pair.student.weights, replace(samples, layout=layout), pico_output(root)
    )


def truth(weights: Weights) -> Tensor:
    forward = LayerwiseForward(weights, LAYOUT, torch.device("cpu"), torch.float32)
    for _ in forward:
        forward.run()
    return forward.states


def states(weights: Weights, activations: ActivationStore, pair: Pair) -> Tensor:
    return StudentStates.of(weights, activations, pair.student, LAYOUT).on(LAYOUT)


@pytest.mark.parametrize("limit", [None, 12])
def test_captured_texts_are_not_computed_again(
    pair: Pair, computed: list[PackedTexts], tmp_path: Path, limit: int | None
) -> None:
    activations = captured(pair, tmp_path / "runs", limit)
    computed.clear()
    found = states(pair.student.weights, activations, pair)
    torch.testing.assert_close(found, truth(pair.student.weights))
    probe, missing = computed
    assert len(probe.texts) == PROBE_TEXTS
    known = {text.id for text in activations.layouts["student"].texts}
    assert {text.id for text in missing.texts} == {text.id for text in LAYOUT.texts} - known


def test_an_edited_student_is_computed_anew(
    pair: Pair, computed: list[PackedTexts], tmp_path: Path
) -> None:
    activations = captured(pair, tmp_path / "runs")
    computed.clear()
    edited = pair.student.weights.edit({DOWN: 1.1 * pair.student.weights[DOWN]})
    torch.testing.assert_close(states(edited, activations, pair), truth(edited))
    assert computed[-1] == LAYOUT


def test_a_student_with_fewer_layers_is_computed_anew(
    pair: Pair, computed: list[PackedTexts], tmp_path: Path
) -> None:
    activations = captured(pair, tmp_path / "runs")
    computed.clear()
    cut = pair.student.weights.cut([0])
    torch.testing.assert_close(states(cut, activations, pair), truth(cut))
    assert computed == [LAYOUT]
