"""Committed answers: what is there is not generated again, and running out of memory is no end."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.data.batching import ANSWERS_AT_ONCE, ANSWERS_PER_CHUNK
from rotdistill_core.errors import SetupError
from rotdistill_core.forward.answers import (
    KeptAnswers,
    asked_greedily,
    kept_answers,
    model_answers,
)
from rotdistill_core.forward.generate import AnsweringModel, AnswerWriter, greedy_answers
from rotdistill_core.forward.growth import Growth
from rotdistill_core.forward.whole import whole_model
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import pico_folder, pico_model, pico_output

CPU = torch.device("cpu")
PROMPTS = {f"q{k}": [10, 11, *range(20, 23 + k)] for k in range(10)}
"""Ten prompts of ten lengths."""
ASKED = asked_greedily(PROMPTS, 3)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Cut chunks of four, and return how many answers grow at once, as they are begun."""
    monkeypatch.setattr("rotdistill_core.forward.generate.ANSWERS_PER_CHUNK", 4)
    sizes: list[int] = []
    plain = Growth.run

    def noted(growth: Growth) -> Any:
        sizes.append(growth.width)
        return plain(growth)

    monkeypatch.setattr(Growth, "run", noted)
    return sizes


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that pretends a device on which only so many answers fit."""
    plain = Growth._grow

    def limit(most: int) -> None:
        def grow(growth: Growth) -> None:
            if growth.width > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            plain(growth)

        monkeypatch.setattr(Growth, "_grow", grow)

    return limit


def model_of(folder: Path) -> AnsweringModel:
    return AnsweringModel(folder, open_checkpoint(folder).weights, CPU, torch.float32)


def chunks_of(prompts: dict[str, list[int]], size: float = 1.0) -> list[list[str]]:
    """Return how prompts are divided; the model is not looked at."""
    model: Any = SimpleNamespace(device=CPU, dtype="", parameters=size)
    writer = AnswerWriter(model, print)
    return writer.chunks(asked_greedily(prompts, 3))


def answer(folder: Path, out: StepOutput) -> KeptAnswers:
    return kept_answers(AnswerWriter, model_of(folder), ASKED, out, "s", quiet)


def quiet(*_: object) -> None:
    """Show nothing."""


def committed(root: Path) -> dict[str, Any]:
    """Return the content of each committed chunk by the name of its file."""
    return {path.name: json.loads(path.read_text()) for path in root.glob("runs/run/answers/s/*")}


def test_chunks_are_made_of_prompts_from_short_to_long(widths: list[int]) -> None:
    shuffled = {name: PROMPTS[name] for name in sorted(PROMPTS, reverse=True)}
    assert [len(chunk) for chunk in chunks_of(shuffled)] == [4, 4, 2]
    assert list(chain.from_iterable(chunks_of(shuffled))) == list(PROMPTS)


def test_chunks_do_not_cut_the_usual_widths() -> None:
    assert ANSWERS_PER_CHUNK % ANSWERS_AT_ONCE == 0
    prompts = {f"q{k}": [1] * (1 + k % 7) for k in range(600)}
    ordered = sorted(prompts, key=lambda name: len(prompts[name]))
    chunks = chunks_of(prompts)
    assert list(chain.from_iterable(chunks)) == ordered
    assert [len(chunk) for chunk in chunks] == [256, 256, 88]


def test_chunks_of_slow_answers_are_smaller() -> None:
    prompts = {f"q{k}": [1] for k in range(600)}
    lengths = [[len(chunk) for chunk in chunks_of(prompts, size)] for size in (1e9, 2e10, 1e13)]
    assert [max(chunk) for chunk in lengths] == [256, 66, 32]


def test_only_missing_chunks_are_generated_by_a_model_that_loads_once(
    tmp_path: Path, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pico_folder(tmp_path / "model")
    whole = answer(folder, pico_output(tmp_path / "runs"))
    assert (whole.tokens, whole.made) == (greedy_answers(model_of(folder), PROMPTS, 3), 10)
    files = committed(tmp_path)
    (tmp_path / "runs/run/answers/s/00000.json").unlink()
    (tmp_path / "runs/run/answers/s/00002.json").write_text("torn")
    loads: list[object] = []

    def counted(*args: Any) -> Any:
        loads.append(args)
        return whole_model(*args)

    monkeypatch.setattr("rotdistill_core.forward.generate.whole_model", counted)
    widths.clear()
    assert answer(folder, pico_output(tmp_path / "runs")) == KeptAnswers(whole.answers, 6)
    assert widths == [4, 2]
    assert len(loads) == 1
    assert committed(tmp_path) == files
    assert answer(folder, pico_output(tmp_path / "runs")) == KeptAnswers(whole.answers, 0)
    assert len(loads) == 1


def test_progress_counts_all_prompts(tmp_path: Path, widths: list[int]) -> None:
    folder = pico_folder(tmp_path / "model")
    model = model_of(folder)
    reports: list[tuple[int, int]] = []

    def progress(done: int, total: int, _: str) -> None:
        reports.append((done, total))

    kept_answers(AnswerWriter, model, ASKED, pico_output(tmp_path / "runs"), "s", progress)
    assert reports == [(done, 10) for done in range(11)]
    (tmp_path / "runs/run/answers/s/00002.json").unlink()
    reports.clear()
    kept_answers(AnswerWriter, model, ASKED, pico_output(tmp_path / "runs"), "s", progress)
    assert reports == [(8, 10), (9, 10), (10, 10)]


def test_other_prompts_or_lengths_or_models_are_other_answers(
    tmp_path: Path, widths: list[int]
) -> None:
    models = [pico_model(tmp_path / f"m{seed}", seed=seed) for seed in (0, 1)]

    def made(model: Model, prompts: dict[str, list[int]], length: int) -> int:
        out = pico_output(tmp_path / "runs")
        return model_answers(model, prompts, length, out, "s", quiet).made

    assert made(models[0], PROMPTS, 3) == 10
    assert made(models[0], PROMPTS, 3) == 0
    assert made(models[1], PROMPTS, 3) == 10
    assert made(models[0], PROMPTS, 2) == 10
    assert made(models[0], {**PROMPTS, "q0": [10, 11, 30]}, 3) == 10


def test_a_batch_that_does_not_fit_is_halved(
    tmp_path: Path, widths: list[int], memory_for: Callable[[int], None]
) -> None:
    folder = pico_folder(tmp_path / "model")
    expected = greedy_answers(model_of(folder), PROMPTS, 3)
    memory_for(1)
    widths.clear()
    lines: list[str] = []
    root = tmp_path / "runs"
    out = StepOutput(ArtifactStore(root, lines.append), Ledger(root / "run"), "key")
    kept = answer(folder, out)
    assert (kept.tokens, kept.made) == (expected, 10)
    assert widths == [4, 2, *[1] * 3]
    assert [line.partition("does not hold")[2] for line in lines] == [
        " 4 answers at once; it goes on with 2.",
        " 2 answers at once; it goes on with 1.",
    ]
    assert {chunk["at_once"] for chunk in committed(tmp_path).values()} == {1}
    assert out.notes == {"answers at once, for want of memory": 1}


def test_a_resumed_run_goes_on_with_as_many_answers_at_once(
    tmp_path: Path, widths: list[int], memory_for: Callable[[int], None]
) -> None:
    folder = pico_folder(tmp_path / "model")
    memory_for(2)
    answer(folder, pico_output(tmp_path / "runs"))
    files = committed(tmp_path)
    (tmp_path / "runs/run/answers/s/00001.json").unlink()
    memory_for(64)  # a larger device would take four
    widths.clear()
    out = pico_output(tmp_path / "runs")
    assert answer(folder, out).made == 4
    assert widths == [2]
    assert committed(tmp_path) == files
    assert out.notes == {"answers at once, for want of memory": 2}


def test_notes_reach_the_step_whose_answers_they_are(
    tmp_path: Path, widths: list[int], memory_for: Callable[[int], None]
) -> None:
    model = pico_model(tmp_path / "model")
    memory_for(3)
    out = pico_output(tmp_path / "runs")
    model_answers(model, PROMPTS, 3, out, "s", quiet)
    assert out.notes == {"answers at once, for want of memory": 2}
    assert sorted(out.used) == [f"run/answers/s/0000{k}.json" for k in range(3)]
    aside = pico_output(tmp_path / "runs", "evaluator")
    answer(model.folder, aside.aside())
    assert aside.notes == out.notes
    assert not aside.used


def test_a_device_without_memory_for_one_prompt_is_named(
    tmp_path: Path, widths: list[int], memory_for: Callable[[int], None]
) -> None:
    folder = pico_folder(tmp_path / "model")
    memory_for(0)
    with pytest.raises(SetupError) as caught:
        answer(folder, pico_output(tmp_path / "runs"))
    assert str(caught.value) == (
        f"{folder}: the memory of cpu does not hold one prompt of 5 tokens with an answer of up to "
        "3. Free memory there, ask for shorter answers, take a smaller model or dtype, or let this "
        'model compute on the CPU (device = "cpu").'
    )
    assert committed(tmp_path) == {}


def test_a_device_without_memory_for_the_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    folder = pico_folder(tmp_path / "model")
    with pytest.raises(SetupError, match=f"{folder}: the memory of cpu does not hold the model"):
        answer(folder, pico_output(tmp_path / "runs"))
