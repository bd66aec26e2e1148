"""The teacher's final states come from the capture where it holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rotdistill_prompt_kl import _teacher_states
from rotdistill_prompt_kl._teacher_states import states_of_teacher

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.acceptance import teacher_final_states
from rotdistill_core.forward.activations import ActivationStore
from rotdistill_core.testing import captured_activations, pico_model, pico_output, pico_samples


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    teacher = pico_model(tmp_path / "teacher", seed=1, num_hidden_layers=3)
    return Pair(teacher, pico_model(tmp_path / "student", seed=2))


@pytest.fixture
def samples() -> Samples:
    return pico_samples(texts=12, guard=4)


@pytest.fixture
def captured(pair: Pair, samples: Samples, tmp_path: Path) -> ActivationStore:
    return captured_activations(pair, pair.student.weights, samples, pico_output(tmp_path / "one"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[PackedTexts]:
    """The layouts for which the teacher is run."""
    layouts: list[PackedTexts] = []

    def noted(teacher: object, layout: PackedTexts, *rest: object) -> torch.Tensor:
        layouts.append(layout)
        return teacher_final_states(teacher, layout, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_teacher_states, "teacher_final_states", noted)
    return layouts


def continuation(samples: Samples) -> Text:
    """Return a text that nobody captured; it begins with the shared prompt."""
    first = samples.layout.texts[0]
    return replace(first, id="continued", tokens=(*first.tokens[:-2], 5, 6, 7))


def layouts(samples: Samples) -> dict[str, PackedTexts]:
    """Return training texts: captured or not, with the guard, with a shorter shared prefix."""
    layout = samples.layout
    fit = layout.select(Split.FIT)
    guard = layout.select(Split.GUARD_VALIDATION)
    new = continuation(samples)
    return {
        "captured": PackedTexts((*fit.texts[::-1], *guard.texts), layout.prefix),
        "mixed": PackedTexts((new, *fit.texts, *guard.texts), layout.prefix),
        "new": PackedTexts((new,), layout.prefix),
        "new with a guard": PackedTexts((new, *guard.texts), layout.prefix),
        "shorter prefix": PackedTexts((*fit.texts, new), layout.prefix - 1),
        "no prefix": PackedTexts((*fit.texts, *guard.texts), 0),
    }


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("captured", 0),
        ("mixed", 1),
        ("new", 1),
        ("new with a guard", 1),
        ("shorter prefix", 1),
        ("no prefix", 0),
    ],
)
def test_only_texts_that_were_not_captured_are_computed(
    pair: Pair,
    samples: Samples,
    captured: ActivationStore,
    computed: list[PackedTexts],
    tmp_path: Path,
    kind: str,
    texts: int,
) -> None:
    layout = layouts(samples)[kind]
    found = states_of_teacher(
        pair, layout, captured, pico_output(tmp_path / "two"), lambda *_: None
    )
    assert sum(len(each.texts) for each in computed) == texts
    out = pico_output(tmp_path / "three")
    expected = teacher_final_states(pair.teacher, layout, out, lambda *_: None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [{"side": "shuffled"}, {"dtype": "bfloat16"}])
def test_rows_of_a_control_or_rounded_rows_are_not_used(
    pair: Pair,
    samples: Samples,
    captured: ActivationStore,
    computed: list[PackedTexts],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str],
) -> None:
    sidecar = captured.sidecar("teacher", 3)
    monkeypatch.setattr(ActivationStore, "sidecar", lambda *_: sidecar | changed)
    layout = samples.layout.select(Split.FIT)
    states_of_teacher(pair, layout, captured, pico_output(tmp_path / "two"), lambda *_: None)
    assert [len(each.texts) for each in computed] == [len(layout.texts)]
