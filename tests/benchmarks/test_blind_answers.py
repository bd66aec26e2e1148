"""A blind sheet hides which variant wrote what, and its score finds it out again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.blind_answers import preferred, questions, written


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run whose variants say who they are."""

    def answer(variant: str, k: int) -> dict[str, str]:
        return {"question": f"Why {k}?", "teacher": f"Because {k}.", "student": f"{variant} {k}"}

    answers = {v: {f"q{k}": answer(v, k) for k in range(30)} for v in ("base", "full", "other")}
    (tmp_path / "report.json").write_text(json.dumps({"answers": answers}), encoding="utf-8")
    return tmp_path


def filled(sheet: str, wanted: str) -> str:
    """Return the sheet as somebody fills it in who always prefers one variant."""
    lines = []
    letter = ""
    for line in sheet.splitlines():
        if line in ("**A**", "**B**"):
            letter = line.strip("*")
        if line.startswith(f"> {wanted}"):
            chosen = letter
        lines.append(f"better: {chosen}" if line.startswith("better:") else line)
    return "\n".join(lines)


@pytest.mark.parametrize("wanted", ["base", "full"])
def test_the_variant_that_a_reader_prefers_is_counted(run: Path, wanted: str) -> None:
    asked = list(questions(run, ("base", "full"), seed=3))
    assert preferred(filled(written(asked), wanted), asked) == Counter({wanted: 30})


def test_both_letters_stand_for_both_variants(run: Path) -> None:
    firsts = Counter(next(iter(q.answers)) for q in questions(run, ("base", "full"), seed=0))
    assert set(firsts) == {"base", "full"}
    assert min(firsts.values()) > 5


def test_undecided_questions_are_neither(run: Path) -> None:
    asked = list(questions(run, ("base", "full"), seed=0))
    sheet = written(asked).replace("better: ", "better: =")
    assert preferred(sheet, asked) == Counter({"neither": 30})


def test_a_sheet_that_is_not_filled_in_is_refused(run: Path) -> None:
    asked = list(questions(run, ("base", "full"), seed=0))
    with pytest.raises(SystemExit, match="0 of 30 lines"):
        preferred(written(asked), asked)


def test_a_variant_without_answers_is_named(run: Path) -> None:
    with pytest.raises(SystemExit, match=r"no answers of refit; it has those of base, full, other"):
        list(questions(run, ("refit", "full"), seed=0))
