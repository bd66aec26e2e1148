"""The command line: messages on stderr, results on stdout."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from rotdistill_core.characters import visible
from rotdistill_core.errors import (
    ModelNotAvailable,
    PluginError,
    RecipeError,
    RotdistillError,
    SetupError,
    shortened,
    suggest,
)
from rotdistill_core.evaluation.rows import rows_as_json
from rotdistill_core.execution.observers import QuietObserver
from rotdistill_core.execution.outcome import RunFailed, RunResult
from rotdistill_core.forward.ranks import Ranks, ToldByLead, start_ranks
from rotdistill_core.planning.calibration import calibrated
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import Plan, build_plan
from rotdistill_core.plugin.registry import COMMANDS, command_function, installed_plugins
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.layout import RUNS_FOLDER, RunLayout
from rotdistill_core.terminal import (
    Json,
    ProgressDisplay,
    Recalibrate,
    RecipePath,
    Sets,
    literal,
    print_json,
    print_line,
    program_name,
    relative_to_cwd,
    results_table,
    stderr_console,
    stdout_console,
)

VERBOSE = ("-v", "--verbose")
FORMAT_OF_WARNINGS = warnings.formatwarning


class Verbs(TyperGroup):
    """The verbs of this module and of installed plugins.

    A plugin is imported when its verb, or the list of all verbs, is asked for.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all verbs."""
        return list(dict.fromkeys([*super().list_commands(ctx), *installed_plugins(COMMANDS)]))

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return one verb. A broken verb fails when it is called, not when all are listed.

        Raises:
            RecipeError: there is no such verb.
        """
        own = super().get_command(ctx, name)
        if own:
            return own
        names = self.list_commands(ctx)
        if name not in names:
            raise RecipeError(f'there is no verb "{name}".{suggest(name, names)}')
        one = typer.Typer(add_completion=False, rich_markup_mode="rich")
        try:
            one.command(name)(command_function(name))
        except PluginError as error:
            _add_broken_verb(one, name, error)
        return typer.main.get_command(one)


def _add_broken_verb(one: typer.Typer, name: str, problem: PluginError) -> None:
    """Add a verb that raises the problem, whatever its arguments."""

    def broken() -> None:
        raise problem

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    one.command(name, help=f"Broken: {problem}", context_settings=settings)(broken)


def _print_version(asked: bool) -> None:
    """Print what an issue about this program should name, and end. Imports none of the libraries.

    Raises:
        typer.Exit: it was asked for.
    """
    if not asked:
        return
    beside = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print_line(f"rotdistill {version('rotdistill')} (Python {platform.python_version()}, {beside})")
    raise typer.Exit


def _options_of_program(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of rotdistill, Python, torch and transformers, and exit.",
        ),
    ] = False,
) -> None:
    """Take the options that stand before a verb."""


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    callback=_options_of_program,
    help=(
        "Surgery on language models: `run` carries out a recipe; "
        "`show`, `chat` and `report` are about what it made."
    ),
    epilog="With -v, anywhere in the line, an error shows its traceback.",
)


@app.command()
def run(
    path: RecipePath,
    sets: Sets = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Make everything again, even the teacher's answers and the captured states. "
            "Old results are replaced as the run goes on.",
        ),
    ] = False,
    unplanned: Annotated[
        bool,
        typer.Option(
            "--no-plan",
            help="Begin at once: do not check first whether memory and disk are enough for what "
            "`plan` estimates.",
        ),
    ] = False,
    recalibrate: Recalibrate = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe. Results that an earlier run made from the same inputs are used again.

    Examples:

      rotdistill run recipes/tour_guide.toml

      rotdistill run recipes/tour_guide.toml --set chop.layers=24
    """
    ranks = start_ranks()
    with ranks.together():
        if ranks.leads:
            loaded = load_recipe(path, sets or [])
            for note in loaded.notes:
                stderr_console().print(literal(note), soft_wrap=True)
            planned = None if unplanned else _plan_here(loaded, fresh, recalibrate)
            _run_here(loaded, planned, fresh, as_json, ranks)
        else:
            _follow(path, sets or [], fresh, ranks)


def _follow(path: Path, sets: Sequence[str], fresh: bool, ranks: Ranks) -> None:
    """Take part in a run that another process leads, and print nothing."""
    from rotdistill_core.execution.executor import Executor  # noqa: PLC0415  loads torch

    watching = QuietObserver()
    loaded = load_recipe(path, sets)
    Executor(loaded, RUNS_FOLDER, watching, watching.progress, fresh, ranks).go()


def _run_here(
    loaded: ResolvedRecipe, planned: Plan | None, fresh: bool, as_json: bool, ranks: Ranks
) -> None:
    """Carry out a recipe, and print how it goes and what came out."""
    screen = ProgressDisplay(stderr_console(), planned)
    try:
        from rotdistill_core.execution.executor import Executor  # noqa: PLC0415  loads torch

        outcome = Executor(loaded, RUNS_FOLDER, screen, screen.progress, fresh, ranks).go()
    except RunFailed as failure:
        _show(failure.outcome, as_json)
        raise
    finally:
        screen.stop()
    _show(outcome, as_json)


def _plan_here(loaded: ResolvedRecipe, fresh: bool, recalibrate: bool) -> Plan | None:
    """Print the plan of a run in one line, and return it.

    Returns:
        None where a model is not here yet, which is no reason to stop.

    Raises:
        SetupError: the machine is too small.
    """
    console = stderr_console()

    def log(text: str) -> None:
        console.print(literal(text), soft_wrap=True)

    machine = replace(this_machine(RUNS_FOLDER), profile=calibrated(log, recalibrate))
    try:
        planned = build_plan(loaded, RUNS_FOLDER, machine, fresh, log)
    except ModelNotAvailable as error:
        log(
            f"plan: not known before {error.model} is here. There is no such folder; if it is the "
            "id of a model on the hub, it is downloaded now."
        )
        return None
    for line in (planned.summary, *planned.time_notes):
        log(line)
    planned.require_resources(loaded.path)
    return planned


def _show(outcome: RunResult, as_json: bool) -> None:
    """Print the results of a run."""
    if as_json:
        document = {"run_dir": str(outcome.folder), "results": rows_as_json(outcome.rows)}
        print_json(document)
        return
    console = stdout_console()
    for summary in (results_table(outcome.rows), *outcome.summaries):
        console.print(summary)
    # After a change of inputs, each variant lies in a folder of its own, beside the older ones.
    saved = list(outcome.checkpoints.values())
    together = {folder.parent for folder in saved}
    shown = [("checkpoints", path) for path in (together if len(together) == 1 else saved)]
    for what, path in (*shown, ("report", RunLayout(outcome.folder).report)):
        if path.exists():
            console.print(f"{what:<12} {literal(relative_to_cwd(path))}", soft_wrap=True)


class Interrupted(BaseException):
    """A signal that ends the run. Typer would turn a KeyboardInterrupt into a quiet return."""


class _Interrupter:
    """Ends the run when a signal arrives, and remembers that one did."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that arrived; None before."""

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Raise `Interrupted`."""
        self.number = number
        raise Interrupted(number)


RESEND_SECONDS = 0.05
"""How long after a signal was swallowed it is sent again."""


def _resend_swallowed_signal(unraisable: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose exception Python ignored, because it came inside a destructor."""
    if isinstance(unraisable.exc_value, Interrupted):
        number = int(unraisable.exc_value.args[0])
        threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), number)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _visible_record(*args: Any, **keys: Any) -> logging.LogRecord:
    """Return a record of a library's log; libraries quote what they find in files."""
    record = logging.LogRecord(*args, **keys)
    record.msg, record.args = visible(record.getMessage()), None
    return record


def _visible_warning(*args: Any, **keys: Any) -> str:
    """Return a library's warning as Python shows it, without what would steer the terminal."""
    return visible(FORMAT_OF_WARNINGS(*args, **keys))


def main() -> None:
    """Run the command line and leave with the exit code that the error asks for."""
    logging.setLogRecordFactory(_visible_record)
    warnings.formatwarning = _visible_warning
    interrupter = _Interrupter()
    signal.signal(signal.SIGTERM, interrupter)
    signal.signal(signal.SIGINT, interrupter)
    sys.unraisablehook = _resend_swallowed_signal
    words = [word for word in sys.argv[1:] if word not in VERBOSE]
    verbose = len(words) < len(sys.argv) - 1
    try:
        app(words, prog_name="rotdistill", standalone_mode=False)
    except Interrupted as stop:
        _end_by_signal(int(stop.args[0]))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except ToldByLead as stop:
        sys.exit(stop.exit_code)  # the process that leads the run says why
    except Exception as error:
        if interrupter.number is not None:
            # Code of libraries in C may turn the exception of a signal into one of its own.
            _end_by_signal(interrupter.number)
        if "_ROTDISTILL_COMPLETE" in os.environ:
            sys.exit(1)  # the shell completes an unfinished line: say nothing
        if verbose:
            stderr_console().print(literal(traceback.format_exc()), soft_wrap=True)
        sys.exit(_report_error(error))


def _end_by_signal(number: int) -> NoReturn:
    """Say how the run goes on, and leave with the exit code of a signal."""
    again = literal(_command_line())
    stderr_console().print(
        f"interrupted; what was finished is kept. Go on with:\n{again}", soft_wrap=True
    )
    sys.exit(128 + number)


def _command_line() -> str:
    """Return the line that was typed, which resumes the run."""
    return shlex.join([program_name(), *sys.argv[1:]])


def _report_error(error: Exception) -> int:
    """Print what went wrong, one paragraph for each problem; return the exit code."""
    if machine := _fault_of_the_machine(error):
        error = SetupError(machine)
    usage = getattr(error, "format_message", None)  # typer's errors have it
    expected = usage is not None or isinstance(error, RotdistillError)
    kind = "error" if expected else "unexpected"
    for problem in _usage_problems(error) if usage else _problems(error):
        stderr_console().print(f"[red]{kind}[/] {literal(shortened(problem))}", soft_wrap=True)
    return int(getattr(error, "exit_code", 1))


def _usage_problems(error: Any) -> Sequence[str]:
    """Return what typer says about a command line; the error about no verb has shown the help."""
    message = error.format_message()
    if not message:
        return []
    verb = getattr(getattr(error, "ctx", None), "command_path", "rotdistill")
    return [f"{message.rstrip('.')}. `{verb} --help` shows how."]


def _problems(error: Exception) -> Sequence[str]:
    """Return the paragraphs of an error that is not typer's."""
    if isinstance(error, RecipeError):
        return error.problems
    if isinstance(error, RotdistillError):
        return [str(error)]
    return [
        f"{type(error).__name__}: {error}\n"
        f"That should not happen; -v shows where it did. Go on with:\n{_command_line()}"
    ]


def _fault_of_the_machine(error: Exception) -> str:
    """Return what is wrong if the machine failed: no memory, or a file that it refuses."""
    # torch is not imported here, so its error goes by its name; on CPU it is a RuntimeError.
    out_of_memory = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in str(error)
    )
    if out_of_memory:
        reason = str(error) or "none is left"
        return f"memory is not enough: {reason}. `rotdistill plan` states what each step needs."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}."
    return ""
