"""Greedy answers in batches, compared with one prompt after the other in plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.forward.generate import Decoding, greedy_answers
from rotdistill_core.testing import pico_folder

CPU = torch.device("cpu")
END = 2


def prompts(shared: int) -> dict[str, list[int]]:
    """Return prompts of several lengths with a shared beginning."""
    prefix = list(range(10, 10 + shared))
    lengths = (3, 5, 5, 9)
    return {f"q{k}": [*prefix, *range(20 + 7 * k, 20 + 7 * k + n)] for k, n in enumerate(lengths)}


def decoding(folder: Path, tokens: int) -> Decoding:
    """Return how the model of a folder answers on the CPU in float32."""
    return Decoding(folder, open_checkpoint(folder).weights, tokens, CPU, torch.float32)


def quiet(*_: object) -> None:
    """Show nothing."""


def greedy_alone(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """Return the greedy continuation, one token at a time, without any cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_answers_in_a_batch_are_those_of_each_prompt_alone(
    tmp_path: Path, shared: int, sliding: bool
) -> None:
    changes = {"head_dim": 8, "sliding_window": 6} if sliding else {}
    folder = pico_folder(tmp_path / "model", "gemma3_text" if sliding else "llama", **changes)
    asked = prompts(shared)
    answers = greedy_answers(decoding(folder, 6), asked, quiet)
    assert answers == {name: greedy_alone(folder, prompt, 6) for name, prompt in asked.items()}


def test_answer_ends_with_the_first_end_token(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "model")
    tokens = greedy_alone(folder, [10, 11, 12], 6)
    end = tokens[2]
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = end
    settings.save_pretrained(folder)
    answers = greedy_answers(decoding(folder, 6), {"q": [10, 11, 12]}, quiet)
    assert answers == {"q": tokens[: tokens.index(end) + 1]}
    assert len(answers["q"]) < len(tokens)


def test_progress_counts_answers(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []

    def progress(done: int, total: int, _: str) -> None:
        reports.append((done, total))

    folder = pico_folder(tmp_path / "model")
    asked = {f"q{k}": [10 + k % 40, 12, 13] for k in range(70)}
    answers = greedy_answers(decoding(folder, 2), asked, progress)
    assert reports == [(0, 70), (64, 70)]
    assert answers.keys() == asked.keys()
