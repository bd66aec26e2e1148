"""The command line: words on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from rotdistill_core.errors import (
    CheckFailed,
    PluginError,
    RecipeError,
    RotdistillError,
    SetupError,
    suggest,
)
from rotdistill_core.evaluation.rows import rows_as_json
from rotdistill_core.plugin.registry import COMMANDS, command_function, installed_plugins
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.terminal import (
    RUNS_FOLDER,
    Json,
    ProgressDisplay,
    RecipePath,
    Sets,
    relative_to_cwd,
    results_table,
    stderr_console,
    stdout_console,
)

if TYPE_CHECKING:
    from rotdistill_core.execution.outcome import RunResult


class Verbs(TyperGroup):
    """The verbs of this module and of installed plugins, which are imported when their verb, or the list of all, is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all verbs."""
        return list(dict.fromkeys([*super().list_commands(ctx), *installed_plugins(COMMANDS)]))

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return one verb; a broken one fails when it is called, not when all are listed."""
        if found := super().get_command(ctx, name):
            return found
        if name not in (every := self.list_commands(ctx)):
            raise RecipeError(f'there is no verb "{name}".{suggest(name, every)}')
        one = typer.Typer(add_completion=False, rich_markup_mode="rich")
        try:
            one.command(name)(command_function(name))
        except PluginError as error:
            problem = error

            def broken() -> None:
                raise problem

            one.command(
                name,
                help=f"Broken: {error}",
                context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
            )(broken)
        return typer.main.get_command(one)


app = typer.Typer(cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", callback=lambda: None,
                  help="Surgery on language models: `run` carries out a recipe; `show`, `chat` and `report` are about what it made.",
                  epilog="With -v, anywhere in the line, an error shows its traceback.")  # fmt: skip


@app.command()
def run(
    path: RecipePath,
    sets: Sets = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Use nothing that an earlier run made.")
    ] = False,
    unplanned: Annotated[
        bool, typer.Option("--no-plan", help="Begin without `plan`, and whatever it would say.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe; whatever an earlier run made with the same inputs is reused.

    Examples:

      rotdistill run recipes/tour_guide.toml

      rotdistill run recipes/tour_guide.toml --set chop.layers=24
    """
    loaded = load_recipe(path, sets or [])
    if not unplanned and "plan" in installed_plugins(COMMANDS):
        command_function("plan")(
            path, sets, fresh, short=True
        )  # stops here where the machine does not suffice
    # They load torch, which `--help` and other verbs do without.
    from rotdistill_core.execution.executor import Executor  # noqa: PLC0415
    from rotdistill_core.execution.outcome import RunResult  # noqa: PLC0415

    screen = ProgressDisplay(stderr_console())
    try:
        outcome = Executor(loaded, RUNS_FOLDER, screen, screen.progress, fresh).go()
    except CheckFailed as failure:
        if not isinstance(failure.outcome, RunResult):
            raise
        _show(failure.outcome, as_json)
        raise
    finally:
        screen.stop()
    _show(outcome, as_json)


def _show(outcome: RunResult, as_json: bool) -> None:
    """Print the results of a run."""

    if as_json:
        print(
            json.dumps(
                {"run_dir": str(outcome.folder), "results": rows_as_json(outcome.rows)},
                ensure_ascii=False,
            )
        )
        return
    for told in (results_table(outcome.rows), *outcome.told):
        stdout_console().print(told)
    for path in filter(
        Path.exists, (outcome.folder / name for name in ("checkpoints", "report.html"))
    ):
        stdout_console().print(f"{path.stem:<12} {escape(relative_to_cwd(path))}", soft_wrap=True)


class Interrupted(BaseException):
    """A signal that ends the run. Not a KeyboardInterrupt, which typer would turn into a quiet return."""


def _interrupted(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def _of_the_machine(error: Exception) -> str:
    """Return what is wrong with the machine, where that is what failed: memory, or a file that cannot be read or written."""
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in str(error)
    ):
        return f"the memory does not suffice: {error or 'none is left'}. `rotdistill plan` says what each step needs."
    return (
        f"{error.filename or 'a file'}: {error.strerror}."
        if isinstance(error, OSError) and error.strerror
        else ""
    )


def main() -> None:
    """Run the command line and leave with the exit code that the error asks for."""
    signal.signal(signal.SIGTERM, _interrupted)
    signal.signal(signal.SIGINT, _interrupted)
    again = shlex.join(
        [
            relative_to_cwd(Path(sys.argv[0]))
            if sys.argv[0].endswith("rotdistill")
            else "rotdistill",
            *sys.argv[1:],
        ]
    )
    given = [word for word in sys.argv[1:] if word not in ("-v", "--verbose")]
    try:
        app(given, prog_name="rotdistill", standalone_mode=False)
    except Interrupted as stop:
        stderr_console().print(
            f"interrupted; what was finished is kept. Go on with:\n{escape(again)}", soft_wrap=True
        )
        sys.exit(128 + int(stop.args[0]))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        if (
            "_ROTDISTILL_COMPLETE" in os.environ
        ):  # a line that is not finished: nothing to complete, and nothing to say
            sys.exit(1)
        if len(given) < len(sys.argv) - 1:
            traceback.print_exc()
        sys.exit(_tell(error, again))


def _tell(error: Exception, again: str) -> int:
    """Say what went wrong, one paragraph a problem, and return the exit code."""
    error = SetupError(machine) if (machine := _of_the_machine(error)) else error
    problems = error.problems if isinstance(error, RecipeError) else [str(error)]
    if usage := getattr(
        error, "format_message", None
    ):  # typer's own errors; the one about no verb at all has shown the help
        verb = getattr(getattr(error, "ctx", None), "command_path", "rotdistill")
        problems = (
            [f"{message.rstrip('.')}. `{verb} --help` shows how."] if (message := usage()) else []
        )
    elif not isinstance(error, RotdistillError):
        problems = [
            f"{type(error).__name__}: {error}\nThat should not happen; -v shows where it did. Go on with:\n{again}"
        ]
    kind = "error" if usage or isinstance(error, RotdistillError) else "unexpected"
    for problem in problems:
        stderr_console().print(f"[red]{kind}[/] {escape(problem)}", soft_wrap=True)
    return int(getattr(error, "exit_code", 1))
