"""Better by more than chance, and within a guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.questions import Question
from rotdistill_core.evaluation.acceptance import (
    TextScores,
    accept_if_better,
    interpolate,
    scored_rows,
    scores_by_text,
    significantly_lower,
)
from rotdistill_core.testing import pico_model, pico_samples


def scores(*means: float, rows: int = 10) -> TextScores:
    return TextScores(rows * torch.tensor(means).double(), torch.full((len(means),), rows).double())


def test_scores_are_sums_and_counts_by_text() -> None:
    made = scores_by_text(torch.tensor([1.0, 2.0, 5.0, 4.0]), torch.tensor([7, 7, 9, 7]))
    assert made.total.tolist() == [7.0, 5.0]
    assert made.rows.tolist() == [3.0, 1.0]
    assert made.mean == 3.0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1.0, 1.1, 0.9, 1.0), (0.8, 0.9, 0.7, 0.8), True),  # all fall alike
        ((1.0, 1.0, 1.0, 1.0), (0.0, 1.3, 1.3, 1.3), False),  # one text falls, the others rise
        ((1.0, 1.1, 0.9, 1.0), (1.0, 1.1, 0.9, 1.0), False),  # nothing happens
        ((1.0, 1.1, 0.9, 1.0), (1.2, 1.3, 1.1, 1.2), False),
        ((1.0, 1.1, 0.9, 1.0), (0.5, 0.5, float("nan"), 0.5), False),
        ((1.0, 1.1, 0.9, 1.0), (0.5, 0.5, float("-inf"), 0.5), False),
        ((1.0, 1.1, 0.9), (0.1, 0.1, 0.1), False),  # too few to tell
    ],
)
def test_better_means_beyond_chance(
    before: tuple[float, ...], after: tuple[float, ...], expected: bool
) -> None:
    assert significantly_lower(scores(*before), scores(*after)) is expected


def test_where_nothing_is_gained_about_a_sixth_passes() -> None:
    maker, passed = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        start = torch.rand(20, generator=maker).double()
        passed += significantly_lower(
            TextScores(start, torch.ones(20)),
            TextScores(start + torch.randn(20, generator=maker), torch.ones(20)),
        )
    assert 0.12 < passed / 2000 < 0.22  # one standard error, one side


def test_only_the_teachers_own_answers_are_judged_where_there_are_any() -> None:
    texts = tuple(
        Text(name, "en", "validation", tuple(range(12)), 8) for name in ("a", "a.own", "b")
    )
    layout = PackedTexts(texts, 0)
    questions = tuple(
        Question(t.id, "en", "validation", "?", None if t.id.endswith(".own") else "!")
        for t in texts
    )
    rows, targets, text = scored_rows(layout, Samples(layout, questions, ""), "validation")
    assert (rows.tolist(), targets.tolist(), text.tolist()) == (
        [19, 20, 21, 22],
        [8, 9, 10, 11],
        [1] * 4,
    )
    rows, _, text = scored_rows(layout, Samples(layout, (), ""), "validation")
    assert (len(rows), text.unique().tolist()) == (12, [0, 1, 2])
    rows, _, text = scored_rows(layout, Samples(layout, (), ""), "validation", most=6)
    assert (len(rows), text.unique().tolist()) == (6, [0, 1, 2])


def edited(folder: Path, by: float) -> tuple[Weights, Weights, str]:
    weights, name = pico_model(folder).weights, "model.layers.0.mlp.down_proj.weight"
    return weights, weights.edit({name: weights[name] + by}), name


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_a_share_of_an_edit_lies_between(tmp_path: Path, share: float) -> None:
    before, after, name = edited(tmp_path / "model", 2.0)
    made = interpolate(before, after, share)
    torch.testing.assert_close(made[name], before[name] + share * 2.0)
    assert {n for n in made.entries if not torch.equal(made[n], before[n])} == {name}


def test_a_share_of_an_edit_that_unties_the_head(tmp_path: Path) -> None:
    before = pico_model(tmp_path / "model", tie_word_embeddings=True).weights
    after = before.untie().edit({"lm_head.weight": before.head() + 1.0})
    made = interpolate(before, after, 0.5)
    assert not made.tied
    torch.testing.assert_close(made.head(), before.head() + 0.5)


@pytest.mark.parametrize(
    ("guard", "share"),
    [(None, 1.0), (1.0, 0.0), (1.06, 0.5), (1.03, 0.25), (1.005, 0.0), (2.0, 1.0)],
)
def test_as_much_is_taken_as_the_guard_allows(
    tmp_path: Path, guard: float | None, share: float
) -> None:
    before, after, name = edited(tmp_path / "model", 1.0)
    notes: dict[str, Any] = {}

    def score(view: Weights, split: str) -> TextScores:
        moved = float((view[name] - before[name]).mean())
        return (
            scores(*([1.0 + 0.1 * moved] * 9))
            if split == "guard-validation"
            else scores(*([2.0 - moved] * 9))
        )

    made = accept_if_better(before, after, score, guard, notes)
    assert float((made[name] - before[name]).mean()) == pytest.approx(share, abs=1e-6)
    assert notes["validation KL after"] == pytest.approx(2.0 - share)
    assert ("refused" in notes) is (share == 0)


def test_what_is_not_better_is_refused_and_said(tmp_path: Path) -> None:
    before, after, _ = edited(tmp_path / "model", 1.0)
    notes: dict[str, Any] = {}
    made = accept_if_better(
        before, after, lambda view, _: scores(*([1.0 if view is before else 1.5] * 9)), None, notes
    )
    assert made is before
    assert "from 1.0000 to 1.5000" in notes["refused"]


def test_pico_texts_have_a_guard_to_judge_by() -> None:
    samples = pico_samples(guard=6)
    assert len(scored_rows(samples.layout, samples, "guard-validation").text.unique()) == 3
