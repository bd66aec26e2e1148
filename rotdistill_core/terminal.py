"""The terminal: arguments that verbs share, consoles, the progress of a run, and tables."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from rotdistill_core.characters import visible, visible_json
from rotdistill_core.evaluation.metrics import FAILED, METRICS, UNPROMPTED_TEACHER
from rotdistill_core.evaluation.rows import MetricRow, overall_figures, unprompted_teacher
from rotdistill_core.planning.plan import CHECKPOINTS, Plan
from rotdistill_core.planning.time_left import Count, TimeLeft
from rotdistill_core.planning.times import time_in_words
from rotdistill_core.plugin.markers import hookimpl
from rotdistill_core.plugin.step import options_of
from rotdistill_core.recipe.load import load_recipe

WIDTH_OF_FILES = 160
"""Columns of a table that is written to a file or a pipe, where COLUMNS is not set."""
NARROWEST_TEXT = 16
"""Columns that a column of text keeps when it wraps."""
QUIET_SECONDS = 30.0
"""How long a run may print nothing where no live line is shown: in a file or a pipe."""
SLOW_RATE = 0.1
"""Parts a second below which their seconds say more."""
TABLE_METRICS = (
    "kl",
    "top1",
    "perplexity",
    "guard_kl",
    "guard_perplexity",
    "hidden_cosine",
    "residual_rms_diff",
    "parameters",
    "seconds",
)
"""The metrics that the terminal shows of every variant; the report shows all."""


def complete_set_keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the step options that begin with `incomplete`, for `--set` on the command line.

    click stops parsing at an option without its value, so the recipe is still in `ctx.args`.
    """
    keys = [
        f"{recipe_step.id}.{name}="
        for recipe_step in load_recipe(Path(ctx.args[0])).steps
        for name in options_of(recipe_step.step)
    ]
    return [key for key in keys if key.startswith(incomplete) and not key.endswith(".use=")]


RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A recipe, for example recipes/tour_guide.toml.", show_default=False
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one option of the recipe: step-id.option=value or table.key=value. "
        "May be given several times.",
        autocompletion=complete_set_keys,
    ),
]
Recalibrate = Annotated[
    bool,
    typer.Option("--recalibrate", help="Measure again how fast this machine is, for its times."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


class VisibleConsole(Console):
    """A console on which no text of others steers the terminal.

    Whatever is printed passes `render`. Only rich's own control sequences stay as they are.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments of a renderable with visible characters alone."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)


def stderr_console() -> Console:
    """Return the console for messages (stderr)."""
    return VisibleConsole(stderr=True, highlight=False)


def stdout_console() -> Console:
    """Return the console for results (stdout).

    It is as wide as COLUMNS says, or else as the terminal, or else `WIDTH_OF_FILES`.
    """
    columns = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() else WIDTH_OF_FILES
    if columns.isdecimal() and int(columns) > 0:
        width = int(columns)
    return VisibleConsole(width=width, highlight=False)


def literal(text: object) -> str:
    """Return a text as rich markup that shows it: brackets are no markup, escapes are visible.

    The console would make them visible, too, but only after it has measured the columns of a table.
    """
    return escape(visible(str(text)))


def print_line(text: object) -> None:
    """Print a text on stdout as it is, for other programs: neither wrapped nor marked up."""
    print(visible(str(text)))


def print_json(value: object) -> None:
    """Print a value on stdout as one JSON document."""
    print(visible_json(value))


def program_name() -> str:
    """Return how this program was started, for commands that are to be typed again."""
    program = Path(sys.argv[0])
    return relative_to_cwd(program) if program.name == "rotdistill" else "rotdistill"


def relative_to_cwd(path: Path) -> str:
    """Return a path relative to the current folder, or as it is where it lies outside."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


class ProgressDisplay:
    """Observer that shows the progress of a run, and the time that is left.

    On a terminal one live line for the current step. Elsewhere plain lines: one when a step ends,
    and in a long step one after every `QUIET_SECONDS` at most.

    Args:
        console: where it is shown.
        planned: the plan of the run; without one no time that is left is known.
        now: the clock, seconds.
    """

    def __init__(
        self,
        console: Console,
        planned: Plan | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self.now = now
        self.left = TimeLeft(planned, now) if planned else None
        # FORCE_COLOR makes a file count as a terminal; a live line needs one whose cursor moves.
        is_live = console.is_terminal and console.file.isatty()
        self.status = console.status("") if is_live else None
        self.step = ""
        self.printed = now()
        self.count: Count | None = None
        """How far the work that was last reported has come, to say how fast it is."""
        if self.status:
            self.status.start()

    def log(self, text: str) -> None:
        """Print one line."""
        self._print(literal(text))

    def _print(self, line: str) -> None:
        """Print one line of rich markup."""
        self.printed = self.now()
        self.console.print(line, soft_wrap=True)

    def progress(self, done: int, total: int, note: str) -> None:
        """Show how far the current step has come."""
        if self.left:
            self.left.progresses(done, total)
        if not self.count or not self.count.goes_on(done, total):
            self.count = Count(done, total, self.now())
        self.count.take(done, self.now())
        if self.status:
            self.status.update(self._how_far(done, total, note))
        elif self.now() - self.printed >= QUIET_SECONDS:
            self._print(f"  {self._how_far(done, total, note)}")

    def _how_far(self, done: int, total: int, note: str) -> str:
        """Return how far the current step has come, as rich markup."""
        per_second = self.count.rate if self.count else None
        rate = f", {_rate_in_words(per_second)}" if per_second else ""
        parts = (literal(self.step), f"{done}/{total}{rate}", literal(note), self._time_left())
        return "  ".join(filter(None, parts))

    def _time_left(self) -> str:
        """Return the time that is left of the run in words; empty if it is not known."""
        seconds = self.left.seconds() if self.left else None
        return "" if seconds is None else f"{time_in_words(seconds)} left in all"

    @hookimpl
    def before_step(self, step_id: str, variant: str) -> None:
        """See `HookSpecs.before_step`."""
        self.step = f"{variant}: {step_id}"
        self.count = None
        if self.left:
            self.left.begins(step_id, variant)

    @hookimpl
    def after_step(self, step_id: str, variant: str, seconds: float, reused: bool) -> None:
        """See `HookSpecs.after_step`."""
        if self.left:
            self.left.ends(step_id, variant)
        duration = "[dim]reused[/]" if reused else f"{seconds:6.1f} s"
        left = f"  [dim]{self._time_left()}[/]" if self._time_left() and not reused else ""
        self._print(f"  {padded(variant, 12)} {padded(step_id, 16)} {duration}{left}")

    @hookimpl
    def step_failed(self, step_id: str, variant: str) -> None:
        """See `HookSpecs.step_failed`. The error itself is printed where the program ends."""
        self._print(f"  {padded(variant, 12)} {padded(step_id, 16)} [red]failed[/]")

    @hookimpl
    def variant_saved(self, variant: str, folder: Path) -> None:
        """See `HookSpecs.variant_saved`."""
        if self.left:
            self.left.ends(CHECKPOINTS, variant)
        path = literal(relative_to_cwd(folder))
        self._print(f"  {padded(variant, 12)} saved            {path}")

    def stop(self) -> None:
        """Remove the live line."""
        if self.status:
            self.status.stop()


def _rate_in_words(rate: float) -> str:
    """Return so many parts a second in words: "2.0/s", or "20 s each" where they are slow."""
    return f"{rate:.1f}/s" if rate >= SLOW_RATE else f"{1 / rate:.0f} s each"


class WideTable(Table):
    """A table that is never cut.

    Where it is wider than the terminal, it becomes several tables below each other, each of which
    repeats the first column. Columns with `overflow="fold"` hold text, which may wrap; no other
    column does, so that a name can be copied. Where the first column and another one do not fit
    beside each other, every row becomes a list.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        """Yield as many plain tables as the width needs, or lists."""
        full = [
            max(console.measure(text).maximum for text in (column.header, *column.cells))
            for column in self.columns
        ]
        needed = [
            min(width, NARROWEST_TEXT) if column.overflow == "fold" else width
            for width, column in zip(full, self.columns, strict=True)
        ]
        available = options.max_width
        if _width_of([needed[0], *([max(needed[1:])] if needed[1:] else [])]) > available:
            yield from self._lists()
            return
        groups = _column_groups(needed, available)
        title = self.title
        if title and console.measure(title).maximum > _width_of([needed[k] for k in groups[0]]):
            # Above a table that is narrower than its title, a path would be broken.
            yield Text.from_markup(str(title), style="table.title", overflow="fold")
            title = None
        for number, group in enumerate(groups):
            table = Table(title=title if number == 0 else None)
            # A column of text that had to give up width wraps; rich decides how wide it becomes.
            table.columns = [
                replace(
                    self.columns[k].copy(),
                    width=full[k] if needed[k] == full[k] else None,
                    min_width=needed[k],
                    overflow="fold",
                )
                for k in group
            ]
            cells_of_columns = [self.columns[k].cells for k in group]
            for row, *cells in zip(self.rows, *cells_of_columns, strict=True):
                table.add_row(*cells, style=row.style)
            yield table

    def _lists(self) -> Iterator[Text]:
        """Yield each row as a list: its first cell, and below it a line for each other one."""
        if self.title:
            yield Text.from_markup(str(self.title), style="table.title", overflow="fold")
        first, *others = self.columns
        for number, name in enumerate(first.cells):
            yield Text.from_markup(str(name), style="bold", overflow="fold")
            for column in others:
                cell = list(column.cells)[number]
                header = " ".join(str(column.header).split())
                if cell:
                    yield Text.from_markup(f"  {header}: {cell}", overflow="fold")


def _width_of(columns: Sequence[int]) -> int:
    """Return the width of a table whose columns have these widths."""
    # Each column has a border and two blanks; one border closes the table.
    return sum(columns) + 3 * len(columns) + 1


def padded(text: object, columns: int) -> str:
    """Return a text as rich markup, filled with blanks to so many columns of a terminal."""
    return literal(text) + " " * max(0, columns - cell_len(visible(str(text))))


def _column_groups(widths: Sequence[int], available: int) -> list[list[int]]:
    """Return the column numbers of each table; every group begins with column 0."""
    groups = [[0]]
    for k in range(1, len(widths)):
        total = _width_of([widths[j] for j in [*groups[-1], k]])
        if total > available and len(groups[-1]) > 1:
            groups.append([0])
        groups[-1].append(k)
    return groups


def results_table(rows: Sequence[MetricRow]) -> WideTable:
    """Return the variant x metric table for the terminal, the lowest KL in bold."""
    figures = overall_figures(rows)
    finite_kl = [row["kl"] for row in figures.values() if math.isfinite(row.get("kl", math.nan))]
    lowest_kl = min(finite_kl, default=None)
    table = WideTable("variant", *(METRICS[name].column_header for name in TABLE_METRICS))
    unprompted = unprompted_teacher(figures)
    if unprompted:
        table.add_row(literal(UNPROMPTED_TEACHER), *_figure_cells(unprompted))
    for variant, row in figures.items():
        title = literal(f"{variant} (failed)" if FAILED in row else variant)
        style = "bold" if row.get("kl") == lowest_kl else None
        table.add_row(title, *_figure_cells(row), style=style)
    return table


def _figure_cells(row: Mapping[str, float]) -> list[str]:
    return [
        format(row[name], METRICS[name].format) if name in row else "" for name in TABLE_METRICS
    ]
