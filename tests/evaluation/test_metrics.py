"""The table of metrics, and how metric names are classified."""

from __future__ import annotations

import pytest

from rotdistill_core.evaluation.metrics import (
    METRICS,
    Direction,
    Metric,
    in_table_order,
    is_answer_metric,
    is_teacher_metric,
    metric_named,
    teacher_metric,
)


@pytest.mark.parametrize("name", METRICS)
def test_a_column_header_has_the_words_of_the_title(name: str) -> None:
    metric = METRICS[name]
    assert metric.column_header.split() == metric.title.split()


def test_an_unknown_metric_goes_by_its_own_name() -> None:
    assert metric_named("exact_match") == Metric("exact match", ".4g", Direction.NEITHER)


def test_the_teachers_own_figures_are_recognised() -> None:
    assert teacher_metric("hallucination_rate") == "hallucination_rate_teacher"
    assert is_teacher_metric("hallucination_rate_teacher")
    assert not is_teacher_metric("hallucination_rate")
    # Whether the variant answers in the teacher's language is a figure of the variant.
    assert not is_teacher_metric("answer_language_teacher")


def test_answer_metrics_are_recognised() -> None:
    assert is_answer_metric("answer_chrf")
    assert not is_answer_metric("kl")


def test_tables_list_known_metrics_first_and_others_as_they_come() -> None:
    names = ["zeta", "top1", "alpha", "kl", "zeta"]
    assert in_table_order(names) == ["kl", "top1", "zeta", "alpha"]
