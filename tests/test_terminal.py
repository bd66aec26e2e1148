"""Tables on the terminal."""

from __future__ import annotations

import io
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column

from rotdistill_core.evaluation.rows import MetricRow, failure_row
from rotdistill_core.terminal import (
    QUIET_SECONDS,
    ProgressDisplay,
    VisibleConsole,
    WideTable,
    literal,
    padded,
    program_name,
    results_table,
)

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


SCRIPTS = (
    "base",
    "transport-students-9bf783fa",
    "مرحبا-تجربة",
    "שלום",
    "模型蒸馏",
    "실험",
    "e\u0301te\u0301",
    "👩\u200d💻",
    "[bold]",
    "\x1b[2J",
    "x" * 45,
)
BORDERS = "│┃┏┡└"


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


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from(SCRIPTS), min_size=4, max_size=4), min_size=1, max_size=4
    ),
    width=st.sampled_from([24, 40, 80, 140, 160]),
)
def test_tables_of_any_script_are_whole_at_any_width(rows: list[list[str]], width: int) -> None:
    table = WideTable("name", "state", Column("variants", overflow="fold"), "KL", title="runs/a-1")
    for name, state, variants, kl in rows:
        table.add_row(
            literal(name), literal(state), literal(f"{variants}, {variants}"), literal(kl)
        )
    output = io.StringIO()
    VisibleConsole(file=output, width=width).print(table)
    shown = output.getvalue().splitlines()
    assert all(cell_len(line) <= width for line in shown)
    # Lines between two borders are of one width: no script moves a column.
    for above, line in pairwise(shown):
        if above[:1] in BORDERS and line[:1] in BORDERS and above[:1] and line[:1] != "┏":
            assert cell_len(above) == cell_len(line)
    # Nothing is lost, and what may be copied stands on one line if a line holds it.
    printed = Counter("".join(shown))
    for row in rows:
        for cell in row:
            assert not Counter("".join(literal(cell).replace("\\[", "[").split())) - printed
        for cell in (row[0], row[1], row[3]):
            text = literal(cell).replace("\\[", "[")
            if cell_len(text) <= width - len("  state: "):
                assert any(text in line for line in shown), text
    assert "\x1b" not in output.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("base", "base  |"),
        ("漢字", "漢字  |"),
        ("e\u0301", "e\u0301     |"),
        ("long-one", "long-one|"),
    ],
)
def test_progress_is_padded_by_columns_and_not_by_characters(text: str, shown: str) -> None:
    assert padded(text, 6) + "|" == shown


def test_a_title_that_is_wider_than_its_table_is_not_broken() -> None:
    table = WideTable("a", "b", title="runs/transport-students-9bf783fa")
    table.add_row("1", "2")
    assert "runs/transport-students-9bf783fa" in lines(table, 40)


@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_no_live_line_goes_to_a_file(colours: str | None) -> None:
    """FORCE_COLOR makes rich take a file for a terminal: colours may go there, no spinner."""
    output = io.StringIO()
    console = VisibleConsole(file=output, force_terminal=True, color_system=colours)
    display = ProgressDisplay(console)
    display.before_step("refit", "full")
    display.progress(1, 2, "layer 1")
    display.after_step("refit", "full", 1.5, reused=True)
    display.stop()
    assert "\x1b[?25l" not in output.getvalue()  # hides the cursor
    assert "\r" not in output.getvalue()
    assert len(output.getvalue().splitlines()) == 1


def test_a_long_step_prints_a_plain_line_now_and_then_into_a_file() -> None:
    output, clock = io.StringIO(), [0.0]
    display = ProgressDisplay(VisibleConsole(file=output), now=lambda: clock[0])
    display.before_step("refit", "full")
    for layer in range(60):  # a layer takes 4 seconds
        clock[0] += 4.0
        display.progress(layer + 1, 60, "refitted [o] and down")
    display.after_step("refit", "full", 240.0, reused=False)
    *lines, end = output.getvalue().splitlines()
    assert len(lines) == 240 // 32  # the first layer that ends after every 30 seconds
    assert lines[0] == "  full: refit  8/60, 0.2/s  refitted [o] and down"
    assert end == "  full         refit             240.0 s"
    assert "\x1b" not in output.getvalue()


def test_a_short_step_prints_its_end_alone_into_a_file() -> None:
    output, clock = io.StringIO(), [0.0]
    display = ProgressDisplay(VisibleConsole(file=output), now=lambda: clock[0])
    for step in range(20):  # ten minutes, and a line every 20 seconds
        display.before_step(f"step-{step}", "full")
        clock[0] += QUIET_SECONDS - 10
        display.progress(1, 2, "half")
        clock[0] += 10
        display.after_step(f"step-{step}", "full", 30.0, reused=False)
    assert len(output.getvalue().splitlines()) == 20


def shown(*reports: tuple[float, int, int]) -> list[str]:
    """Return the lines of a file after reports of (seconds, done, total) before any step."""
    output, clock = io.StringIO(), [0.0]
    display = ProgressDisplay(VisibleConsole(file=output), now=lambda: clock[0])
    for clock[0], done, total in reports:
        display.progress(done, total, "questions are answered")
    return output.getvalue().splitlines()


def test_the_time_before_the_first_step_prints_lines_too() -> None:
    """The teacher's answers may take longer than all steps."""
    assert shown((0.0, 0, 200), (32.0, 16, 200)) == ["  16/200, 0.5/s  questions are answered"]


def test_slow_parts_are_counted_in_seconds_each() -> None:
    assert shown((0.0, 0, 8), (100.0, 4, 8)) == ["  4/8, 25 s each  questions are answered"]


def test_the_rate_leaves_out_what_an_earlier_run_did() -> None:
    assert shown((10.0, 577, 2000), (50.0, 617, 2000)) == [
        "  617/2000, 1.0/s  questions are answered"
    ]


def test_the_rate_is_that_of_the_work_at_hand() -> None:
    """A batch of questions that follows others has its own pace."""
    lines = shown((0.0, 0, 100), (100.0, 100, 100), (105.0, 0, 50), (145.0, 20, 50))
    assert lines == [
        "  100/100, 1.0/s  questions are answered",
        "  20/50, 0.5/s  questions are answered",
    ]


def test_commands_to_type_name_the_program_as_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell whose PATH lacks the environment finds it so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / ".venv" / "bin" / "rotdistill"), "run"])
    assert program_name() == ".venv/bin/rotdistill"
    monkeypatch.setattr("sys.argv", ["/usr/lib/python3/pytest/__main__.py"])
    assert program_name() == "rotdistill"
