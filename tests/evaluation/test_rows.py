"""Metric rows: JSON, the overall figures, failed variants."""

from __future__ import annotations

import json
import math

import pytest

from rotdistill_core.evaluation.rows import (
    MetricRow,
    failed_variants,
    failure_row,
    overall_figures,
    row_from_json,
    rows_as_json,
)


@pytest.mark.parametrize("value", [0.5, math.inf, -math.inf])
def test_a_row_reads_back_from_json(value: float) -> None:
    row = MetricRow("a", "kl", value, "heldout", layer=3, language="en", n=7, text="t1")
    (document,) = rows_as_json([row])
    text = json.dumps(document, allow_nan=False)
    assert row_from_json(json.loads(text)) == row


def test_nan_reads_back_from_json() -> None:
    (document,) = rows_as_json([MetricRow("a", "kl", math.nan)])
    assert document["value"] == "nan"
    assert math.isnan(row_from_json(document).value)


def test_overall_figures_leave_out_layers_languages_and_texts() -> None:
    rows = [
        MetricRow("a", "kl", 1.0),
        MetricRow("a", "kl", 2.0, layer=0),
        MetricRow("a", "kl", 3.0, language="en"),
        MetricRow("a", "kl", 4.0, language="en", text="t1"),
        MetricRow("b", "top1", 0.5),
    ]
    assert overall_figures(rows) == {"a": {"kl": 1.0}, "b": {"top1": 0.5}}


def test_failed_variants_are_marked_by_a_row() -> None:
    row = failure_row("cut", ["kl is too high.", "facts are too low."])
    assert (row.metric, row.value) == ("failed", 2.0)
    assert failed_variants([MetricRow("base", "kl", 1.0), row]) == ["cut"]
