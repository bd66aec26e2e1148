"""Captured states are used while they are the student's, and only then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rotdistill_lm_head_ridge import _final_states as rotdistill_head_states
from rotdistill_lm_head_ridge._final_states import _walked, final_states
from torch import Tensor

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.testing import captured_activations, pico_model, pico_output, pico_samples

LAYOUT = pico_samples(guard=4).layout.select("fit", "validation", "guard-validation")
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(pico_model(tmp_path / "teacher", seed=9), pico_model(tmp_path / "student"))


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[PackedTexts]:
    """Note what is walked."""
    seen: list[PackedTexts] = []
    real = _walked
    monkeypatch.setattr(
        rotdistill_head_states,
        "_walked",
        lambda w, m, layout, p: (seen.append(layout), real(w, m, layout, p))[1],
    )
    return seen


def bank_of(pair: Pair, root: Path, *splits: str, most: int | None = None) -> ActivationStore:
    samples = pico_samples(guard=4)
    return captured_activations(
        pair,
        pair.student.weights,
        replace(samples, layout=samples.layout.select(*splits, most=most)),
        pico_output(root),
    )


def truth(weights: Weights) -> Tensor:
    walk = LayerwiseForward(weights, LAYOUT, torch.device("cpu"), torch.float32)
    for _ in walk:
        walk.run()
    return walk.states


def states(weights: Weights, activations: ActivationStore, pair: Pair) -> Tensor:
    return final_states(weights, activations, pair.student, LAYOUT, lambda *_: None)


@pytest.mark.parametrize("most", [None, 12])
def test_what_was_captured_is_not_walked_again(
    pair: Pair, walked: list[PackedTexts], tmp_path: Path, most: int | None
) -> None:
    activations = bank_of(pair, tmp_path / "runs", "fit", "validation", most=most)
    made = states(pair.student.weights, activations, pair)
    torch.testing.assert_close(made, truth(pair.student.weights))
    again = {t.id for layout in walked[1:] for t in layout.texts}
    assert again == {t.id for t in LAYOUT.texts} - {
        t.id for t in activations.layouts["student"].texts
    }
    assert len(walked[0].texts) == 2


def test_an_edited_student_is_walked(pair: Pair, walked: list[PackedTexts], tmp_path: Path) -> None:
    activations = bank_of(pair, tmp_path / "runs", "fit", "validation")
    edited = pair.student.weights.edit({DOWN: 1.1 * pair.student.weights[DOWN]})
    torch.testing.assert_close(states(edited, activations, pair), truth(edited))
    assert walked[-1] == LAYOUT


def test_a_cut_student_is_walked(pair: Pair, walked: list[PackedTexts], tmp_path: Path) -> None:
    activations, cut = (
        bank_of(pair, tmp_path / "runs", "fit", "validation"),
        pair.student.weights.cut([0]),
    )
    torch.testing.assert_close(states(cut, activations, pair), truth(cut))
    assert walked == [LAYOUT]
