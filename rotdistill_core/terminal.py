"""Results as objects, what they break, and a table on the terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table

from rotdistill_core.evaluation.rows import MetricRow, overall_figures
from rotdistill_core.plugin.markers import hookimpl
from rotdistill_core.plugin.step import options_of
from rotdistill_core.recipe.load import load_recipe

RUNS_FOLDER = Path("runs")


def complete_set_keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the options of the recipe's steps that begin so. An option without its value ends the parsing: the recipe is in `args`."""
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
        help="Override: step-id.field=value or table.key=value.",
        autocompletion=complete_set_keys,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def stderr_console() -> Console:
    """Return the console for people (stderr)."""
    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """Return the console for results (stdout): as wide as the terminal, or wide enough for tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


class ProgressDisplay:
    """Shows what a run does: one live line per step on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("") if console.is_terminal else None
        self.step, self.started = "", time.monotonic()
        if self.status:
            self.status.start()

    def log(self, text: str) -> None:
        """Print one line."""
        self.console.print(escape(text), soft_wrap=True)

    def progress(self, done: int, total: int, note: str) -> None:
        """Show how far a step is."""
        seconds = time.monotonic() - self.started
        if self.status:
            rate = f", {done / seconds:.1f}/s" if done and seconds > 0.5 else ""
            self.status.update(f"{escape(self.step)}  {done}/{total}{rate}  {escape(note)}")

    @hookimpl
    def before_step(self, step_id: str, variant: str) -> None:
        """See `Specs.before_step`."""
        self.step, self.started = f"{variant}: {step_id}", time.monotonic()

    @hookimpl
    def after_step(self, step_id: str, variant: str, seconds: float, reused: bool) -> None:
        """See `Specs.after_step`."""
        self.console.print(
            f"  {escape(variant):<12} {escape(step_id):<16} "
            + ("[dim]reused[/]" if reused else f"{seconds:6.1f} s")
        )

    @hookimpl
    def variant_saved(self, variant: str, folder: Path) -> None:
        """See `Specs.variant_saved`."""
        self.console.print(
            f"  {escape(variant):<12} saved            {escape(relative_to_cwd(folder))}",
            soft_wrap=True,
        )

    def stop(self) -> None:
        """Take the live line away."""
        if self.status:
            self.status.stop()


def relative_to_cwd(path: Path) -> str:
    return str(path.relative_to(here) if path.is_relative_to(here := Path.cwd()) else path)


COLUMNS = (
    ("kl", "held-out KL,\nnats/token", "{:.4f}"), ("top1", "top-1", "{:.3f}"), ("perplexity", "perplexity", "{:.2f}"),
    ("guard_kl", "guard KL", "{:.4f}"), ("guard_perplexity", "guard\nperplexity", "{:.2f}"),
    ("hidden_cosine", "hidden\ncosine", "{:.4f}"), ("residual_rms_diff", "residual\nRMS diff", "{:.4f}"),
    ("parameters", "parameters", "{:,.0f}"), ("seconds", "seconds", "{:.0f}"),
)  # fmt: skip


class WideTable(Table):
    """A table that is never cut: wider than the terminal, its columns come below each other, each time behind the first.

    Columns with `overflow="fold"` hold text, which may wrap.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Yield as many plain tables as the width needs."""
        most = [
            max(console.measure(text).maximum for text in (c.header, *c.cells))
            for c in self.columns
        ]
        least = [
            min(size, 16) if c.overflow == "fold" else size
            for size, c in zip(most, self.columns, strict=True)
        ]
        parts = [[0]]
        for k in range(1, len(least)):
            if (
                len(parts[-1]) > 1
                and sum(least[j] + 3 for j in [*parts[-1], k]) + 1 > options.max_width
            ):
                parts.append([0])
            parts[-1].append(k)
        for part in parts:
            table = Table(title=self.title if part is parts[0] else None)
            widths = {k: size if size == most[k] else None for k, size in enumerate(least)}
            table.columns = [
                replace(self.columns[k].copy(), width=widths[k], overflow="fold") for k in part
            ]
            for row, *cells in zip(self.rows, *(self.columns[k].cells for k in part), strict=True):
                table.add_row(*cells, style=row.style)
            yield table


def results_table(rows: Sequence[MetricRow]) -> WideTable:
    """Return the variant x metric table for the terminal, the lowest KL in bold."""
    values = overall_figures(rows)
    best = min(
        (v["kl"] for v in values.values() if "kl" in v and math.isfinite(v["kl"])), default=None
    )
    table = WideTable("variant", *(title for _, title, _ in COLUMNS))
    for variant, metrics in values.items():
        cells = [form.format(metrics[name]) if name in metrics else "" for name, _, form in COLUMNS]
        name = f"{variant} (failed)" if "failed" in metrics else variant
        table.add_row(name, *cells, style="bold" if metrics.get("kl") == best else None)
    return table


RUNS_FOLDER = Path("runs")
