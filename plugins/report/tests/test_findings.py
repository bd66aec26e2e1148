"""What the figures of a run mean, in words."""

from __future__ import annotations

import math

import pytest
from rotdistill_report._answer_summary import answer_summary
from rotdistill_report._data import ShownFigure, answer_variants, figure_table
from rotdistill_report._findings import language_summary, worse_alignments

from rotdistill_core.evaluation.intervals import Estimate, Interval
from rotdistill_core.linalg.diagnostics import AssignmentDiagnostics, LayerDiagnostics

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
    assert subjects == ["Length", "Language", "chrF against the teacher's answers"]
    assert all(words in line for line in lines)


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
