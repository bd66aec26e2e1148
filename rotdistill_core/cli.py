"""The command line: words on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from rotdistill_core import plugins, recipe
from rotdistill_core.errors import CheckFailed, RecipeError, RotdistillError
from rotdistill_core.hookspecs import hookimpl
from rotdistill_core.step import stage_of

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
RUNS = Path("runs")

RecipePath = Annotated[Path, typer.Argument(help="A recipe, for example recipes/tour_guide.toml.", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override one key: step-id.field=value or table.key=value.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def words() -> Console:
    """Return the console for people (stderr)."""
    return Console(stderr=True, highlight=False)


class Screen:
    """Shows what a run does: one live line per step on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("") if console.is_terminal else None
        self.step, self.started = "", time.monotonic()
        if self.status:
            self.status.start()

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(escape(text))

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
        self.console.print(f"  {escape(variant):<12} {escape(step_id):<16} " + ("[dim]reused[/]" if reused else f"{seconds:6.1f} s"))

    @hookimpl
    def variant_saved(self, variant: str, folder: Path) -> None:
        """See `Specs.variant_saved`."""
        self.console.print(f"  {escape(variant):<12} saved            {escape(_here(folder))}")

    def stop(self) -> None:
        """Take the live line away."""
        if self.status:
            self.status.stop()


def _here(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@app.command()
def run(
    path: RecipePath,
    sets: Sets = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Use nothing that an earlier run made.")] = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe; whatever an earlier run made with the same inputs is reused.

    Examples:

      rotdistill run recipes/tour_guide.toml

      rotdistill run recipes/tour_guide.toml --set chop.layers=24
    """
    loaded = recipe.load(path, sets or [])
    console = words()
    screen = Screen(console)
    try:
        from rotdistill_core import pipeline, report  # torch and transformers load here, after the recipe is known to be good

        outcome = pipeline.Run(loaded, RUNS, screen, screen.progress, fresh).go()
    finally:
        screen.stop()
    if as_json:
        print(json.dumps({"run_dir": str(outcome.folder), "results": report.as_json(outcome.rows)}, ensure_ascii=False))
        return
    wide = Console(width=None if sys.stdout.isatty() else 140)
    for told in (report.rich_table(outcome.rows), *outcome.told):
        wide.print(told)
    for path in (outcome.folder / name for name in ("checkpoints", "report.md")):
        if path.exists():
            wide.print(f"{path.stem:<12} {escape(_here(path))}")


@app.command()
def plan(path: RecipePath, sets: Sets = None, as_json: Json = False) -> None:
    """Show what `run` would do: order, what is there already, sizes from headers. Loads no weights.

    Examples:

      rotdistill plan recipes/tour_guide.toml

      rotdistill plan recipes/tour_guide.toml --set chop.layers=24 --json
    """
    loaded = recipe.load(path, sets or [])
    from rotdistill_core import plan as plans

    planned = plans.plan(loaded, RUNS)
    if as_json:
        steps = [vars(step) for step in planned.steps]
        print(json.dumps({"run_dir": str(planned.folder), "steps": steps, "bytes": planned.sizes, "texts": planned.texts}))
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(plans.rich_plan(planned))
    for what, size in planned.sizes.items():
        console.print(f"{escape(what)}: {size / 1e9:.2f} GB")
    console.print(", ".join(f"{n} {split}" for split, n in planned.texts.items()) + " texts")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A recipe, or the folder of a run.", show_default=False)], as_json: Json = False
) -> None:
    """Check a recipe without running it, or recompute from disk what a run claims: hashes, maps, ways back.

    Examples:

      rotdistill check recipes/tour_guide.toml

      rotdistill check runs/tour-guide-1a2b3c4d
    """
    if path.is_dir():
        from rotdistill_core import check as checks

        found = checks.check_run(path)
        print(json.dumps(found)) if as_json else words().print(
            f"{found['files']} files, {found['maps']} maps, {len(found['unfolded'])} folds taken back, {len(found['problems'])} problems"
        )
        if found["problems"]:
            raise CheckFailed("\n".join(found["problems"]))
        return
    loaded = recipe.load(path)
    print(json.dumps(loaded.resolved())) if as_json else words().print(
        f"{escape(str(path))}: fine, {len(loaded.steps)} steps, variants {', '.join(loaded.recipe.variants)}"
    )


@app.command("plugins")
def list_plugins(as_json: Json = False) -> None:
    """List installed steps, adapters, sources and observers, broken ones too.

    Examples:

      rotdistill plugins

      rotdistill plugins --json
    """
    rows: list[dict[str, Any]] = []
    for kind, origin, what in plugins.everything():
        broken = kind == "step" and isinstance(what, str)
        about = what if isinstance(what, str) else (what.__doc__ or "").strip().splitlines()[0]
        stage = stage_of(what) if isinstance(what, type) else ("broken" if broken else kind)
        rows.append({"name": origin.name, "stage": stage, "distribution": origin.distribution, "version": origin.version, "about": about})
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        Console(highlight=False, soft_wrap=True).print(
            f"{row['name']:<18} {row['stage']:<9} {row['distribution']} {row['version']}  {escape(row['about'])}"
        )


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes for the plugins installed here.

    Examples:

      rotdistill schema > recipes/recipe.schema.json

      rotdistill schema | python -m json.tool
    """
    print(json.dumps(recipe.schema(), indent=1))


class Interrupted(BaseException):
    """A signal that ends the run. Not a KeyboardInterrupt, which typer would turn into a quiet return."""


def _interrupted(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def main() -> None:
    """Run the command line and leave with the exit code that the error asks for."""
    signal.signal(signal.SIGTERM, _interrupted)
    signal.signal(signal.SIGINT, _interrupted)
    again = "rotdistill " + " ".join(sys.argv[1:])
    verbose = bool(os.environ.get("ROTDISTILL_TRACEBACK"))
    try:
        app(standalone_mode=False)
    except Interrupted as stop:
        words().print(f"interrupted; what was finished is kept. Go on with:\n{escape(again)}")
        sys.exit(128 + int(stop.args[0]))
    except RotdistillError as error:
        for problem in error.problems if isinstance(error, RecipeError) else [str(error)]:
            words().print(f"[red]error[/] {escape(problem)}", soft_wrap=True)
        if verbose:
            raise
        sys.exit(error.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        usage = getattr(error, "exit_code", None)
        if usage == 2 and hasattr(error, "format_message"):
            words().print(f"[red]error[/] {escape(error.format_message())}", soft_wrap=True)
            sys.exit(2)
        words().print(f"[red]unexpected[/] {type(error).__name__}: {escape(str(error))}", soft_wrap=True)
        words().print(f"Set ROTDISTILL_TRACEBACK=1 for the traceback. Go on with:\n{escape(again)}", soft_wrap=True)
        if verbose:
            raise
        sys.exit(1)
