"""What the figures of a run mean, in words."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
from rotdistill_report._answer_summary import answer_summary, answer_verdict
from rotdistill_report._data import (
    Advice,
    Issue,
    IssueKind,
    ReportData,
    ShownFigure,
    StepDiagnostics,
    Tone,
    answer_variants,
    evenly_spaced,
    figure_table,
)
from rotdistill_report._findings import (
    alignment_issues,
    language_summary,
    larger_than_teacher,
    maps_below_the_mean,
    smallest_of_equals,
    worse_alignments,
)
from rotdistill_report._templates import is_table, note_rows, note_summary

from rotdistill_core.evaluation.intervals import Estimate, Interval, TextFigure
from rotdistill_core.linalg.diagnostics import AssignmentDiagnostics, LayerDiagnostics
from rotdistill_core.plugin.registry import step_class
from rotdistill_core.store.results import Answer

UP = Interval(2.0, 1.0, 3.0)
DOWN = Interval(-2.0, -3.0, -1.0)
FLAT = Interval(1.0, -1.0, 2.0)
ONE_TEXT = Interval(2.0, math.nan, math.nan)


def summary(length_gap: Interval, language: Interval, chrf: Interval) -> list[str]:
    """Return the summary of answers whose figures change like this from `base` to `full`."""
    changes = {
        "answer_length": length_gap,
        "answer_length_gap": length_gap,
        "answer_language": language,
        "answer_language_teacher": language,
        "answer_chrf": chrf,
    }
    own = Interval(1.0, 0.9, 1.1)
    estimates = {
        metric: {"base": Estimate(own, None), "full": Estimate(own, change)}
        for metric, change in changes.items()
    }
    return answer_summary(estimates, ["base", "full"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((DOWN, UP, UP), "towards the teacher"),
        ((UP, DOWN, DOWN), "away from the teacher"),
        ((FLAT, FLAT, ONE_TEXT), "no change beyond noise"),
    ],
)
def test_answers_move_beyond_their_intervals_only(
    changes: tuple[Interval, Interval, Interval], words: str
) -> None:
    lines = summary(*changes)
    subjects = [line.partition(":")[0] for line in lines]
    assert subjects == [
        "Length",
        "In the teacher's language",
        "In the question's language",
        "chrF against the teacher's answers, of 100",
    ]
    assert all(words in line for line in lines if "question's language" not in line)


def test_each_figure_of_an_answer_has_a_line_and_a_change_of_its_own() -> None:
    own = Interval(0.75, 0.5, 1.0)
    still = Interval(0.0, 0.0, 0.0)
    estimates = {
        metric: {"base": Estimate(own, None), "full": Estimate(own, change)}
        for metric, change in {
            "answer_length": still,
            "answer_length_gap": still,
            "answer_language": UP,
            "answer_language_teacher": still,
            "answer_chrf": UP,
            "answer_repeats": DOWN,
            "answer_repeats_teacher": still,
        }.items()
    }
    lines = answer_summary(estimates, ["base", "full"])
    assert "In the teacher's language: 75% → 75%: no change." in lines
    assert "In the question's language: 75% → 75%: more often (+2.00 [+1.00, +3.00])." in lines
    assert (
        "Answers that repeat themselves: 75% → 75% (the teacher 75%): better "
        "(-2.00 [-3.00, -1.00])." in lines
    )


def judged(
    kl: float,
    chrf: float,
    false: float = 0.0,
    texts: int = 6,
    same: bool = False,
    facts: float | None = None,
    repeats: tuple[int, int] | None = None,
) -> tuple[str, Tone]:
    """Return the verdict on answers whose figures change like this from `base` to `full`.

    Every text changes by the same amount but for a little noise that a change of 0 does not exceed.
    Of the facts one text alone changes, which is within noise. So many answers repeat themselves,
    those of the teacher last.
    """
    names = [f"held-{k}" for k in range(texts)]
    changes = {"kl": kl, "answer_chrf": chrf, "hallucination_rate": false}
    figures = {
        metric: {
            "base": {name: TextFigure(1.0, 1.0) for name in names},
            "full": {
                name: TextFigure(1.0 + change + 0.1 * (-1) ** k, 1.0)
                for k, name in enumerate(names)
            },
        }
        for metric, change in changes.items()
    }
    if facts is not None:
        figures["factual_completeness"] = {
            "base": {name: TextFigure(0.5, 1.0) for name in names},
            "full": {name: TextFigure(0.5 + facts * (k == 0), 1.0) for k, name in enumerate(names)},
        }
    for metric, count in zip(
        ("answer_repeats", "answer_repeats_teacher"), repeats or (), strict=False
    ):
        of_texts = {name: TextFigure(float(k < count), 1.0) for k, name in enumerate(names)}
        figures[metric] = {"base": of_texts, "full": of_texts}
    answers = {
        variant: {
            name: Answer(language="en", question="?", teacher="t", student="s" if same else variant)
            for name in names
        }
        for variant in ("base", "full")
    }
    report = replace(bare_report(), answers=answers, answer_variants=["base", "full"])
    sentence, tone, _ = answer_verdict(report, figures, seed=0)
    return sentence, tone


def bare_report() -> ReportData:
    """Return a report in which nothing was measured."""
    return ReportData(
        recipe_name="r",
        run="r-1",
        baseline="base",
        figures={},
        failures={},
        estimates={},
        kl_by_language={},
        layer_curves={},
        diagnostics={},
        steps=[],
        answers={},
        answer_variants=[],
        first_questions=[],
        provenance={},
        recipe_text="",
        saved_as="",
        parity={},
        model_parity={},
    )


LOWER, EQUAL, HIGHER = -1.0, 0.0, 1.0
NOT_BETTER = "The lower KL did not make better answers. "


@pytest.mark.parametrize(
    ("kl", "chrf", "false", "begins", "tone"),
    [
        (LOWER, HIGHER, EQUAL, "The answers of `full` are nearer to the teacher's than those of "
         "`base`: chrF +1.0 [", Tone.GOOD),
        (LOWER, EQUAL, EQUAL, NOT_BETTER + "The answers of `full` are not distinguishable from "
         "those of `base`: chrF 0.0 [", Tone.BAD),
        (LOWER, LOWER, EQUAL, NOT_BETTER + "The answers of `full` are farther from the teacher's "
         "than those of `base`: chrF -1.0 [", Tone.BAD),
        (LOWER, EQUAL, HIGHER, NOT_BETTER + "The answers of `full` are worse than those of "
         "`base`: false answers +1.00 [", Tone.BAD),
        (LOWER, HIGHER, HIGHER, "Against those of `base`, the answers of `full` are nearer to the "
         "teacher's by chrF +1.0 [", Tone.NEUTRAL),
        (EQUAL, EQUAL, EQUAL, "The answers of `full` are not distinguishable", Tone.NEUTRAL),
        (HIGHER, LOWER, EQUAL, "The answers of `full` are farther from the teacher's", Tone.BAD),
        (HIGHER, HIGHER, EQUAL, "The answers of `full` are nearer to the teacher's", Tone.GOOD),
    ],
)  # fmt: skip
def test_answers_are_judged_by_their_own_metrics(
    kl: float, chrf: float, false: float, begins: str, tone: Tone
) -> None:
    sentence, found = judged(kl, chrf, false)
    assert sentence.startswith(begins)
    assert found is tone


@pytest.mark.parametrize(
    ("facts", "repeats", "ends", "tone"),
    [
        (None, None, "of 100.", Tone.GOOD),
        (0.0, (0, 0), "of 100.", Tone.GOOD),
        (+0.5, (1, 1), "1 of 6 answers of `full` "
         "repeats itself (`base`: 1, teacher: 1, by this measure).", Tone.GOOD),
        (-0.5, None, "But facts went from 0.50 to 0.42 (-0.08 [-0.33, 0.00], within noise).",
         Tone.NEUTRAL),
        (None, (2, 0), "2 of 6 answers of `full` "
         "repeat themselves (`base`: 2, teacher: 0, by this measure).",
         Tone.NEUTRAL),
        (None, (3, 6), "3 of 6 answers of `full` "
         "repeat themselves (`base`: 3, teacher: 6, by this measure).",
         Tone.NEUTRAL),
    ],
)  # fmt: skip
def test_what_speaks_against_a_gain_stands_beside_it(
    facts: float | None, repeats: tuple[int, int] | None, ends: str, tone: Tone
) -> None:
    sentence, found = judged(LOWER, HIGHER, facts=facts, repeats=repeats)
    assert sentence.startswith("The answers of `full` are nearer to the teacher's")
    assert sentence.endswith(ends)
    assert found is tone


def test_a_loss_of_facts_beyond_noise_is_in_the_judgement() -> None:
    sentence, tone = judged(LOWER, HIGHER, false=1.0)
    assert "; worse by false answers +1.00 [" in sentence
    assert "better" not in sentence
    assert tone is Tone.NEUTRAL


def test_equal_answers_are_called_so_even_of_few_texts() -> None:
    same = "`full` answers as `base` does, word for word."
    assert judged(EQUAL, EQUAL, texts=2, same=True) == (same, Tone.NEUTRAL)
    assert judged(LOWER, EQUAL, same=True) == (NOT_BETTER + same, Tone.BAD)


def test_few_texts_say_nothing_of_answers() -> None:
    sentence, tone = judged(LOWER, HIGHER, texts=3)
    assert "cannot be told from 3 held-out questions" in sentence
    assert tone is Tone.NEUTRAL


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2]), (20, [0, 6, 13])],
)
def test_questions_of_the_first_screen_are_evenly_spaced(count: int, shown: list[int]) -> None:
    assert evenly_spaced([f"{k}" for k in range(count)], 3) == [f"{k}" for k in shown]


def sized(**parameters: float) -> dict[str, dict[str, ShownFigure]]:
    """Return figures of variants with so many parameters."""
    return {name: {"parameters": ShownFigure(n, f"{n}")} for name, n in parameters.items()}


@pytest.mark.parametrize(
    ("refit", "parameters", "named"),
    [
        (0.02, {"refit": 113e6, "full": 142e6}, "refit"),
        (0.02, {"refit": 142e6, "full": 142e6}, "full"),
        (0.02, {"refit": 150e6, "full": 142e6}, "full"),
        (0.50, {"refit": 113e6, "full": 142e6}, "full"),
    ],
)
def test_of_variants_as_near_as_each_other_the_smaller_is_named(
    refit: float, parameters: dict[str, float], named: str
) -> None:
    # `refit` has a KL that is larger by so much, give or take 0.1.
    kl = {
        "full": {f"{k}": TextFigure(1.0, 1.0) for k in range(8)},
        "refit": {f"{k}": TextFigure(1.0 + refit + 0.1 * (-1) ** k, 1.0) for k in range(8)},
    }
    report = replace(bare_report(), figures=sized(**parameters))
    assert smallest_of_equals(report, "full", ["refit", "full"], kl, seed=0) == named


@pytest.mark.parametrize(
    ("is_cut", "teacher", "larger"),
    [(True, 134.5e6, ["full"]), (False, 134.5e6, []), (True, 200e6, []), (True, 100e6, [])],
)
def test_a_cut_student_larger_than_its_teacher_is_an_issue(
    is_cut: bool, teacher: int, larger: list[str]
) -> None:
    figures = sized(base=113.3e6, full=141.6e6)
    report = replace(bare_report(), figures=figures, is_cut=is_cut, teacher_parameters=teacher)
    issues = list(larger_than_teacher(report))
    assert [(issue.kind, issue.subject) for issue in issues] == [
        (IssueKind.LARGER, name) for name in larger
    ]
    assert all("141.6 million parameters where its teacher has 134.5" in i.text for i in issues)


def test_one_variant_with_answers_has_no_summary() -> None:
    assert answer_summary({}, ["base"]) == []


@pytest.mark.parametrize(
    ("answered", "shown"),
    [
        (["base", "cut", "full"], ["base", "full"]),
        (["cut", "full"], ["cut", "full"]),
        (["base", "cut"], ["base", "cut"]),
        (["full"], ["full"]),
        ([], []),
    ],
)
def test_answers_of_baseline_and_headline_are_shown(answered: list[str], shown: list[str]) -> None:
    assert answer_variants(answered, "base", "full") == shown


def test_figures_that_look_alike_are_equally_good() -> None:
    kl = {"base": 2.0, "a": 1.00001, "b": 1.00002, "broken": math.nan}
    table = figure_table({name: {"kl": value} for name, value in kl.items()}, {}, "base")
    assert {name for name, row in table.items() if row["kl"].best} == {"a", "b"}
    assert table["a"]["kl"].change == "-1.0000"
    assert table["broken"]["kl"].text == "nan"


@pytest.mark.parametrize(("high", "best"), [(-0.5, {"full"}), (+0.1, set())])
def test_a_best_figure_is_beyond_noise(high: float, best: set[str]) -> None:
    own = Interval(1.0, 0.5, 1.5)
    change = Interval(-1.0, -1.5, high)
    found = {"kl": {"base": Estimate(own, None), "full": Estimate(own, change)}}
    for kl in ({"base": 2.0, "full": 1.0}, {"base": 1.0, "full": 2.0}):
        table = figure_table({name: {"kl": value} for name, value in kl.items()}, found, "base")
        shown = {name for name, row in table.items() if row["kl"].best}
        assert len(shown) == len(best)
        assert not best or kl[shown.pop()] == 1.0


def test_a_note_of_many_lines_is_a_table_with_a_summary() -> None:
    note = {f"{k} heads": {"ridge": 0.1 * k, "step": 1.0} for k in range(1, 5)}
    assert is_table(note)
    assert not is_table({"1 heads": {"ridge": 3}})
    assert not is_table({f"{k}": 1.0 for k in range(9)})
    assert note_summary(note) == "4 entries; ridge 0.1 to 0.4; step 1"
    assert note_rows(note).lines[0] == ("1 heads", ["0.1", "1"])


def test_figures_without_a_better_direction_have_no_best() -> None:
    table = figure_table({"base": {"seconds": 1.0}, "a": {"seconds": 9.0}}, {}, "base")
    assert not any(row["seconds"].best for row in table.values())
    assert table["a"]["seconds"].change == ""


def test_a_rotation_that_lowers_cosines_is_reported_with_its_worst_layer() -> None:
    layers = {
        0: LayerDiagnostics(cosine_before=1.0, cosine_after=0.8),
        1: LayerDiagnostics(cosine_before=0.9, cosine_after=0.85),
        2: LayerDiagnostics(cosine_before=0.5, cosine_after=0.9),
        3: LayerDiagnostics(cosine_after=0.9),
    }
    (text,) = worse_alignments(layers)
    assert "lowers the cosine" in text
    assert "at 2 of 3 layers, most at layer 0: from 1.000 to 0.800" in text


def test_a_map_worse_than_the_mean_is_reported() -> None:
    layers = {
        0: LayerDiagnostics(cosine_after=0.5, cosine_mean=0.6),
        1: LayerDiagnostics(cosine_after=0.3, cosine_mean=0.7),
        2: LayerDiagnostics(cosine_after=0.7, cosine_mean=0.7),
        3: LayerDiagnostics(cosine_after=0.1),
    }
    (text,) = maps_below_the_mean(layers)
    assert "at 2 of 3 layers, most at layer 1: cosine 0.300, of the mean 0.700" in text
    assert list(maps_below_the_mean({2: layers[2], 3: layers[3]})) == []


def test_a_map_worse_than_the_mean_is_an_issue_unless_it_is_random_on_purpose() -> None:
    layers = {0: LayerDiagnostics(cosine_after=0.5, cosine_mean=0.6)}
    report = replace(bare_report(), diagnostics={"basis": StepDiagnostics("basis", layers)})

    def issues(use: str) -> list[Issue]:
        step = Mock(id="basis", step=step_class(use)[0]())
        recipe = Mock(steps=[step], command=lambda sets: f"rotdistill run r.toml --set {sets[0]}")
        return list(alignment_issues(report, recipe))

    (issue,) = issues("procrustes")
    assert (issue.kind, issue.subject) == (IssueKind.BELOW_MEAN, "basis")
    assert Advice("another aligner") in issue.advice
    assert issues("random-rotation") == []


def test_a_permutation_worse_than_none_is_reported() -> None:
    heads = AssignmentDiagnostics(
        identity=False, moved=2, of=4, score=0.2, identity_score=0.7, random_score=0.1
    )
    (text,) = worse_alignments({4: LayerDiagnostics(heads=heads)})
    assert "permutation of heads" in text
    assert "from 0.700 to 0.200" in text


def test_alignments_that_help_are_no_issue() -> None:
    layers = {0: LayerDiagnostics(cosine_before=0.5, cosine_after=0.9)}
    assert list(worse_alignments(layers)) == []


def test_languages_with_the_largest_and_the_smallest_gain_are_named() -> None:
    def row(**kl: float) -> dict[str, ShownFigure]:
        return {language: ShownFigure(value, f"{value}") for language, value in kl.items()}

    table = {
        "base": row(de=4.0, en=3.0, fr=5.0),
        "rotated": row(de=4.0, en=3.0, fr=5.0),
        "full": row(de=2.0, en=2.5, fr=1.0),
    }
    (line,) = language_summary(table, "base")
    assert line.startswith("`full`: ")
    assert line.index("fr (-4.000)") < line.index("en (-0.500)")
