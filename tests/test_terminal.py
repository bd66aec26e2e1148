"""Tables on the terminal."""

from __future__ import annotations

import io
import math

from rich.console import Console

from rotdistill_core.evaluation.rows import MetricRow, failure_row
from rotdistill_core.terminal import WideTable, results_table

ROWS = [
    MetricRow("base", "kl", 4.23689),
    MetricRow("base", "kl", 9.0, layer=3),
    MetricRow("base", "parameters", 106194240.0),
    MetricRow("base", "seconds", 90.4),
    MetricRow("full", "kl", 0.5924),
    MetricRow("full", "top1", 0.6731),
    MetricRow("broken", "kl", math.nan),
    failure_row("broken", ["kl is not a number."]),
]
HEADERS = [
    "variant",
    "held-out KL,\nnats/token",
    "top-1",
    "perplexity",
    "guard KL",
    "guard\nperplexity",
    "hidden\ncosine",
    "residual\nRMS diff",
    "parameters",
    "seconds",
]


def lines(table: WideTable, width: int) -> list[str]:
    output = io.StringIO()
    Console(width=width, file=output).print(table)
    return output.getvalue().splitlines()


def test_the_results_table_has_one_row_per_variant() -> None:
    table = results_table(ROWS)
    assert [column.header for column in table.columns] == HEADERS
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["base", "full", "broken (failed)"]
    assert cells[1] == ["4.2369", "0.5924", "nan"]
    assert cells[2] == ["", "0.673", ""]
    assert cells[8] == ["106,194,240", "", ""]
    assert cells[9] == ["90", "", ""]


def test_a_baked_prompt_adds_the_teacher_without_it() -> None:
    teacher = [MetricRow("base", "kl_teacher", 0.1239), MetricRow("full", "kl_teacher", 0.1239)]
    cells = [list(column.cells) for column in results_table([*ROWS, *teacher]).columns]
    assert cells[0] == ["teacher, no prompt", "base", "full", "broken (failed)"]
    assert cells[1][:2] == ["0.1239", "4.2369"]


def test_the_lowest_finite_kl_is_bold() -> None:
    assert [row.style for row in results_table(ROWS).rows] == [None, "bold", None]


def test_a_table_that_is_too_wide_continues_below_with_its_first_column() -> None:
    table = WideTable("variant", "x" * 20, "y" * 20)
    table.add_row("base", "1", "2")
    wide, narrow = lines(table, 80), lines(table, 40)
    assert len(narrow) == 2 * len(wide)
    assert sum("base" in line for line in narrow) == 2
    assert any("y" * 20 in line for line in narrow)
