"""Edits are kept when they lower the KL by more than chance, and only within the guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.packed import PackedTexts, Samples, Text
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.acceptance import (
    BACKOFF,
    MORE_TEXTS,
    TextScores,
    accept_if_better,
    caution_of_overfit,
    interpolate,
    largest_allowed_share,
    paired_final_states,
    refuse_without_gain,
    scored_rows,
    scores_by_text,
    significantly_lower,
    teacher_final_states,
    wider_guard,
)
from rotdistill_core.store.results import CautionKind, Remedy, StepReport
from rotdistill_core.testing import (
    final_states,
    pico_baked,
    pico_model,
    pico_output,
    pico_samples,
)

NAME = "model.layers.0.mlp.down_proj.weight"
RIDGE = Remedy("a larger ridge")


def scores(*means: float, rows: int = 10) -> TextScores:
    """Return the scores of texts with these mean KLs."""
    return TextScores(rows * torch.tensor(means).double(), torch.full((len(means),), rows).double())


def test_scores_are_sums_and_counts_by_text() -> None:
    found = scores_by_text(torch.tensor([1.0, 2.0, 5.0, 4.0]), torch.tensor([7, 7, 9, 7]))
    assert found.total.tolist() == [7.0, 5.0]
    assert found.rows.tolist() == [3.0, 1.0]
    assert found.mean == 3.0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param((1.0, 1.1, 0.9, 1.0), (0.8, 0.9, 0.7, 0.8), True, id="all fall alike"),
        pytest.param((1.0, 1.0, 1.0, 1.0), (0.0, 1.3, 1.3, 1.3), False, id="one falls, three rise"),
        pytest.param((1.0, 1.1, 0.9, 1.0), (1.0, 1.1, 0.9, 1.0), False, id="no change"),
        pytest.param((1.0, 1.1, 0.9, 1.0), (1.2, 1.3, 1.1, 1.2), False, id="all rise"),
        pytest.param((1.0, 1.1, 0.9, 1.0), (0.5, 0.5, float("nan"), 0.5), False, id="NaN"),
        pytest.param((1.0, 1.1, 0.9, 1.0), (0.5, 0.5, float("-inf"), 0.5), False, id="-Inf"),
        pytest.param((1.0, 1.1, 0.9), (0.1, 0.1, 0.1), False, id="too few texts"),
    ],
)
def test_significance_needs_a_common_fall(
    before: tuple[float, ...], after: tuple[float, ...], expected: bool
) -> None:
    assert significantly_lower(scores(*before), scores(*after)) is expected


def test_one_in_six_noise_edits_passes() -> None:
    maker, passed = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        start = torch.rand(20, generator=maker).double()
        passed += significantly_lower(
            TextScores(start, torch.ones(20)),
            TextScores(start + torch.randn(20, generator=maker), torch.ones(20)),
        )
    assert 0.12 < passed / 2000 < 0.22  # one standard error, one side


def some_samples(*teacher_answered: str) -> Samples:
    """Return three validation texts of four answer tokens each; some the teacher answered."""
    names = ("a", "b", "c")
    layout = PackedTexts(
        tuple(
            Text(name, "en", "validation", (k, *range(1, 12)), 8) for k, name in enumerate(names)
        ),
        0,
    )
    questions = tuple(
        Conversation(name, "en", Split.VALIDATION, "?", None if name in teacher_answered else "!")
        for name in names
    )
    return Samples(layout, questions, "")


def test_only_answers_of_the_teacher_are_scored_if_there_are_any() -> None:
    samples = some_samples("b")
    rows, targets, text = scored_rows(samples.layout, samples, Split.VALIDATION)
    assert rows.tolist() == [19, 20, 21, 22]
    assert targets.tolist() == [8, 9, 10, 11]
    assert text.tolist() == [1] * 4


def test_copies_of_a_text_count_as_one() -> None:
    samples = some_samples()
    a, b, c = samples.layout.texts
    layout = PackedTexts((a, replace(b, tokens=a.tokens), c), 0)
    rows, _, text = scored_rows(layout, samples, Split.VALIDATION)
    assert len(rows) == 12
    assert text.unique().tolist() == [0, 2]


@pytest.mark.parametrize(("most", "count"), [(None, 12), (12, 12), (6, 6), (5, 4), (1, 1)])
def test_scored_rows_spread_evenly_over_all_texts(most: int | None, count: int) -> None:
    samples = some_samples()
    rows, _, text = scored_rows(samples.layout, samples, Split.VALIDATION, most)
    assert len(rows) == count
    assert text.unique().tolist() == ([0, 1, 2] if count > 2 else [0])


def test_pico_samples_have_guard_texts_to_score() -> None:
    samples = pico_samples(guard=6)
    scored = scored_rows(samples.layout, samples, Split.GUARD_VALIDATION)
    assert len(scored.text.unique()) == 3


def test_final_states_of_the_teacher_are_computed_once(tmp_path: Path) -> None:
    teacher, layout = pico_model(tmp_path / "model"), pico_samples(texts=5).layout
    reported: list[str] = []

    def progress(done: int, total: int, text: str) -> None:
        reported.append(f"{done}/{total}")

    first, again = (
        teacher_final_states(teacher, layout, pico_output(tmp_path / "runs", step), progress)
        for step in ("one", "two")
    )
    torch.testing.assert_close(first, final_states(teacher.weights, layout, torch.float32))
    assert torch.equal(first, again)
    assert reported == ["1/2", "2/2"]


def edited(folder: Path, by: float) -> tuple[Weights, Weights]:
    """Return a pico model's weights, and the same with a number added to one parameter."""
    weights = pico_model(folder).weights
    return weights, weights.edit({NAME: weights[NAME] + by})


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_interpolation_scales_the_edit(tmp_path: Path, share: float) -> None:
    before, after = edited(tmp_path / "model", 2.0)
    between = interpolate(before, after, share)
    torch.testing.assert_close(between[NAME], before[NAME] + share * 2.0)
    changed = {name for name in between.entries if not torch.equal(between[name], before[name])}
    assert changed == {NAME}


def test_interpolation_unties_a_head_that_the_edit_unties(tmp_path: Path) -> None:
    before = pico_model(tmp_path / "model", tie_word_embeddings=True).weights
    after = before.untie().edit({"lm_head.weight": before.head() + 1.0})
    between = interpolate(before, after, 0.5)
    assert not between.tied
    torch.testing.assert_close(between.head(), before.head() + 0.5)


@pytest.mark.parametrize(
    ("limit", "share", "tried"),
    [(2.0, 1.0, [1.0]), (0.5, 0.5, [1.0, 0.5]), (0.3, 0.25, [1.0, 0.5, 0.25]), (0.0, 0.0, BACKOFF)],
)
def test_the_largest_allowed_share_is_the_first_within_the_limit(
    limit: float, share: float, tried: list[float]
) -> None:
    asked: list[float] = []

    def ood_kl(candidate: float) -> float:
        asked.append(candidate)
        return candidate

    assert largest_allowed_share(BACKOFF, ood_kl, limit) == share
    assert asked == list(tried)


def test_a_kl_that_is_not_a_number_is_not_allowed() -> None:
    assert largest_allowed_share(BACKOFF, lambda _: float("nan"), 9.0) == 0.0


def scorer(before: Weights) -> Callable[[Weights, Split], TextScores]:
    """Return a score that falls by the size of the edit, and by 0.1 times that rises outside."""

    def score(view: Weights, split: Split) -> TextScores:
        size = float((view[NAME] - before[NAME]).mean())
        mean = 1.0 + 0.1 * size if split == Split.GUARD_VALIDATION else 2.0 - size
        return scores(*([mean] * 9))

    return score


@pytest.mark.parametrize(
    ("guard", "share"),
    [(None, 1.0), (1.0, 0.0), (1.06, 0.5), (1.03, 0.25), (1.005, 0.0), (2.0, 1.0)],
)
def test_as_much_of_an_edit_is_kept_as_the_guard_allows(
    tmp_path: Path, guard: float | None, share: float
) -> None:
    before, after = edited(tmp_path / "model", 1.0)
    out = pico_output(tmp_path / "runs")
    kept = accept_if_better(before, after, scorer(before), guard, out)
    assert float((kept[NAME] - before[NAME]).mean()) == pytest.approx(share, abs=1e-6)
    assert out.notes["validation KL before"] == pytest.approx(2.0)
    assert out.notes["validation KL after"] == pytest.approx(2.0 - share)
    assert bool(out.report.refused) is (share == 0)
    assert (kept is before) is (share == 0)
    words = {0.5: "half of it, the guard allows no more", 0.25: "a quarter of it, the guard"}
    assert [caution.kind for caution in out.report.cautions] == [CautionKind.GUARDED] * (
        share in words
    )
    for caution in out.report.cautions:
        assert caution.text.startswith(words[share])
        assert "from 1.000 to 1.100" in caution.text
        assert "Try: a wider guard (--set guard=" in caution.text
    assert StepReport.from_dict(out.report.as_dict()) == out.report


@pytest.mark.parametrize(
    ("fit", "validation", "refused", "by_heart"),
    [(0.009, 0.45, "", True), (0.2, 0.45, "", False), (0.009, 0.45, "no gain", False)],
)
def test_an_edit_that_learned_its_texts_by_heart_says_so(
    tmp_path: Path, fit: float, validation: float, refused: str, by_heart: bool
) -> None:
    out = pico_output(tmp_path / "runs")
    out.report.refused = refused
    caution_of_overfit(out, fit, validation, [RIDGE])
    assert [caution.text for caution in out.report.cautions] == [
        "it has learned its texts by heart: with all of it the KL is 0.009 on texts that it was "
        f"fitted on, and 0.450 on validation texts. Try: {MORE_TEXTS.text}; a larger ridge."
    ] * by_heart


def test_a_part_without_gain_asks_for_a_wider_guard_first(tmp_path: Path) -> None:
    before, after = edited(tmp_path / "model", 1.0)
    out = pico_output(tmp_path / "runs")

    def score(view: Weights, split: Split) -> TextScores:
        size = float((view[NAME] - before[NAME]).mean())
        whole = size > 0.9
        mean = 1.0 + 0.1 * size if split == Split.GUARD_VALIDATION else 2.0 - size * whole
        return scores(*([mean] * 9))

    assert accept_if_better(before, after, score, 1.06, out, [RIDGE]) is before
    assert "no gain beyond chance" in out.report.refused
    assert out.report.remedies[0] == wider_guard(1.06)[0]
    assert out.report.remedies[-2:] == (RIDGE, MORE_TEXTS)
    assert not out.report.cautions


def test_an_edit_without_gain_is_refused_with_both_figures(tmp_path: Path) -> None:
    before, after = edited(tmp_path / "model", 1.0)
    out = pico_output(tmp_path / "runs")

    def score(view: Weights, split: Split) -> TextScores:
        return scores(*([1.0 if view is before else 1.5] * 9))

    kept = accept_if_better(before, after, score, None, out)
    assert kept is before
    assert "from 1.0000 to 1.5000" in out.report.refused
    assert out.report.remedies == (MORE_TEXTS,)


def test_a_fall_within_chance_asks_for_texts_to_judge_by_first(tmp_path: Path) -> None:
    out = pico_output(tmp_path / "runs")
    before, after = scores(*([1.0] * 9)), scores(*([0.5, 1.4] * 4), 0.9)
    refuse_without_gain(out, before, after, [RIDGE])
    first, *others = out.report.remedies
    assert "more texts to judge by" in first.what
    assert others == [RIDGE, MORE_TEXTS]


def test_too_few_validation_texts_are_named_as_the_reason(tmp_path: Path) -> None:
    out = pico_output(tmp_path / "runs")
    refuse_without_gain(out, scores(1.0, 1.0), scores(0.5, 0.5), [RIDGE])
    assert "2 validation texts are too few to tell a gain from chance" in out.report.refused
    assert out.report.refusal == (
        f"{out.report.refused}. Try: more texts in samples.index, so that 4 or more are for "
        "validation; a larger share of them as samples.validation."
    )


def test_rows_of_a_baked_prompt_are_those_of_the_teacher_that_reads_it(tmp_path: Path) -> None:
    model = pico_model(tmp_path / "model")
    samples = pico_baked(pico_samples(texts=10, guard=2))
    layout = samples.layout.select(Split.VALIDATION, Split.GUARD)
    out = pico_output(tmp_path / "runs")
    found = paired_final_states(model, samples, layout, out, lambda *_: None)
    read = samples.read_by_teacher(layout)
    assert [text.id for text in read.texts] == [text.id for text in layout.texts]
    whole = final_states(model.weights, read, torch.float32)
    for split in (Split.VALIDATION, Split.GUARD):
        own, theirs = (each.prediction_rows(split)[0] for each in (layout, read))
        torch.testing.assert_close(found[own], whole[theirs], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1:], final_states(model.weights, layout, torch.float32)[1:])
