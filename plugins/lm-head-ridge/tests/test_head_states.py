"""Captured states are used while they are the student's, and only then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import rotdistill_head_states
import torch
from rotdistill_head_states import final_states
from torch import Tensor

from rotdistill_core.bank import Bank
from rotdistill_core.models import Pair
from rotdistill_core.samples import Layout
from rotdistill_core.testing import captured, pico_model, pico_out, pico_samples
from rotdistill_core.walk import Walk
from rotdistill_core.weights import Weights

LAYOUT = pico_samples(guard=4).layout.select("fit", "validation", "guard-validation")
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(pico_model(tmp_path / "teacher", seed=9), pico_model(tmp_path / "student"))


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    """Note what is walked."""
    seen: list[Layout] = []
    real = rotdistill_head_states._walked
    monkeypatch.setattr(rotdistill_head_states, "_walked", lambda w, m, layout, p: (seen.append(layout), real(w, m, layout, p))[1])
    return seen


def bank_of(pair: Pair, root: Path, *splits: str, most: int | None = None) -> Bank:
    samples = pico_samples(guard=4)
    return captured(pair, pair.student.weights, replace(samples, layout=samples.layout.select(*splits, most=most)), pico_out(root))


def truth(weights: Weights) -> Tensor:
    walk = Walk(weights, LAYOUT, torch.device("cpu"), torch.float32)
    for _ in walk:
        walk.run()
    return walk.states


def states(weights: Weights, bank: Bank, pair: Pair) -> Tensor:
    return final_states(weights, bank, pair.student, LAYOUT, lambda *_: None)


@pytest.mark.parametrize("most", [None, 12])
def test_what_was_captured_is_not_walked_again(pair: Pair, walked: list[Layout], tmp_path: Path, most: int | None) -> None:
    bank = bank_of(pair, tmp_path / "runs", "fit", "validation", most=most)
    made = states(pair.student.weights, bank, pair)
    torch.testing.assert_close(made, truth(pair.student.weights))
    again = {t.id for layout in walked[1:] for t in layout.texts}
    assert again == {t.id for t in LAYOUT.texts} - {t.id for t in bank.layouts["student"].texts}
    assert len(walked[0].texts) == 2


def test_an_edited_student_is_walked(pair: Pair, walked: list[Layout], tmp_path: Path) -> None:
    bank = bank_of(pair, tmp_path / "runs", "fit", "validation")
    edited = pair.student.weights.edit({DOWN: 1.1 * pair.student.weights[DOWN]})
    torch.testing.assert_close(states(edited, bank, pair), truth(edited))
    assert walked[-1] == LAYOUT


def test_a_cut_student_is_walked(pair: Pair, walked: list[Layout], tmp_path: Path) -> None:
    bank, cut = bank_of(pair, tmp_path / "runs", "fit", "validation"), pair.student.weights.cut([0])
    torch.testing.assert_close(states(cut, bank, pair), truth(cut))
    assert walked == [LAYOUT]
