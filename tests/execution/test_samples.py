"""The texts of a run are answered once for all runs, and frozen in each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.data.tokenization import shared_prefix_length
from rotdistill_core.execution.executor import Executor
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.layout import RunLayout


def test_texts_are_frozen_with_hashes_and_answers_are_shared(
    work: Path, executor: Callable[..., Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = executor("one")
    samples = one.samples()
    layout = RunLayout(one.folder)
    header, *lines = layout.texts.read_text(encoding="utf-8").splitlines()
    columns = ("id", "language", "split", "tokens", "answer_from", "system", "sha256")
    assert header == "\t".join(columns)
    rows = [line.split("\t") for line in lines]
    assert [row[0] for row in rows] == [text.id for text in samples.layout.texts]
    assert [row[-1] for row in rows] == [digest(text.tokens) for text in samples.layout.texts]
    assert layout.system_prompt.read_text(encoding="utf-8") == samples.style
    assert {row[-2] for row in rows} == {digest(samples.style)}
    assert (one.folder / RunLayout.answers("teacher-heldout", 0)).is_file()
    assert not (one.folder / RunLayout.answers("teacher-own", 0)).exists()

    def answer_again(*_: object) -> None:
        raise AssertionError("the teacher has answered these questions")

    monkeypatch.setattr("rotdistill_core.forward.generate.AnswerWriter.answers", answer_again)
    assert executor("two").samples().digest() == samples.digest()


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2, 4]], 1),
        ([[1, 2, 3]], 2),
        ([[5], [5, 6]], 0),
        ([[1, 2], [3, 4]], 0),
    ],
)
def test_every_prompt_keeps_a_token_of_its_own(prompts: list[list[int]], shared: int) -> None:
    assert shared_prefix_length(prompts) == shared
