"""The verb `chat`: ask variants of a run and read their answers side by side."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from rotdistill_commands._arguments import RunNameIfAny, log, requested_run
from rotdistill_core import hookimpl
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError, RotdistillError, suggest
from rotdistill_core.execution.run_folder import RunFolder, find_run
from rotdistill_core.planning.chats import DATE
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import DEFAULT_ENGINE, engine_of_run
from rotdistill_core.store.layout import RUNS_FOLDER, RunLayout
from rotdistill_core.store.plain import read_text
from rotdistill_core.terminal import (
    Json,
    literal,
    print_json,
    print_line,
    stderr_console,
    stdout_console,
)

if TYPE_CHECKING:
    from rotdistill_commands._session import ChatSession

TEACHER = "teacher"
"""Name of the teacher among those that are asked."""


def complete_variants(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the variants of the run that begin with `incomplete`.

    The run is in `args` and not in `params`, because an option without a value ends the parsing.
    """
    saved = _saved_variants(find_run(ctx.args[0], RUNS_FOLDER))
    return [name for name in saved if name.startswith(incomplete)]


def chat(  # noqa: PLR0913  an option each
    run: RunNameIfAny = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            help="A variant to ask; may be given several times.",
            show_default=False,
            autocompletion=complete_variants,
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="Ask this question and end; may be given several times.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Let the teacher answer, too.")
    ] = False,
    system: Annotated[
        Path | None,
        typer.Option(
            "--system",
            help="A file with a system prompt in place of the run's own.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Ask this model in place of a run: a folder, or whatever else recipes name.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Longest answer, in tokens.")
    ] = 160,
    device: Annotated[
        str,
        typer.Option("--device", help="Where the models compute: auto, cpu, cuda, cuda:1 or mps."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Ask variants of a run and read their answers side by side. An empty line ends the chat.

    Answers are greedy and follow the system prompt of the run. Variants of a run that bakes the
    prompt in are asked without it. The teacher answers through the engine of the run's recipe.
    With --model, a model answers before there is any run: whether a teacher does the job well.

    Examples:

      rotdistill chat tour-guide --variant base --variant full --prompt "What makes Angkor Wat so special?"

      rotdistill chat tour-guide --prompt "Wo liegt Lissabon?" --tokens 40 --json

      rotdistill chat --model model --prompt "Do you sell tea?" --tokens 40
    """  # noqa: E501  an example is one line
    _require_device(device)
    if model is not None:
        if run or variants or teacher:
            raise RecipeError("--model: asks that model alone; leave out RUN and its variants.")
        session = _session_of_model(model, tokens, device)
        _talk([session], {model: _given_prompt(system) if system else ""}, prompts, as_json)
        return
    if run is None:
        raise RecipeError("name a run, or a model with --model. `rotdistill runs` lists the runs.")
    folder = requested_run(run)
    chosen = _chosen(folder, variants or [])
    prompts_of = _system_prompts(folder, system, chosen)
    folders = {variant: folder.require_checkpoint(variant) for variant in chosen}
    # Variants are asked on the day that their texts name.
    date = next((start.inputs.get(DATE, "") for start in folder.ledger.starts[::-1]), "")
    thinking = bool(folder.recipe.get("samples", {}).get("thinking"))
    asked = (tokens, device, date, thinking)
    writers = [_teacher(folder, *asked)] if teacher else []
    from rotdistill_commands._session import load_session  # noqa: PLC0415  loads transformers

    sessions = [load_session(name, path, *asked) for name, path in folders.items()]
    sessions += [connect() for connect in writers]
    _talk(sessions, prompts_of, prompts, as_json)


def _require_device(name: str) -> None:
    """Look for a device before models are opened, which takes longer.

    Raises:
        RecipeError: it is no name of a device.
        SetupError: this machine has no such device.
    """
    if name in ("auto", "cpu"):
        return
    from rotdistill_core.checkpoint.devices import resolve_device  # noqa: PLC0415  loads torch

    resolve_device(name)


def _talk(
    sessions: Sequence[ChatSession],
    systems: Mapping[str, str],
    prompts: Sequence[str] | None,
    as_json: bool,
) -> None:
    """Ask all sessions each prompt, or what is typed where there is none."""
    dialogue: list[dict[str, Any]] = []
    try:
        for question in prompts or _typed_questions():
            answers = dict.fromkeys([session.name for session in sessions], "")
            dialogue.append({"prompt": question, "answers": answers})
            _ask(sessions, systems, question, answers, show=not as_json)
    finally:
        # What was answered before somebody failed is not lost.
        if as_json and dialogue:
            print_json(dialogue)


def _session_of_model(name: str, tokens: int, device: str) -> ChatSession:
    """Return a model of no run, ready to be asked.

    Raises:
        RotdistillError: there is no such model, or it cannot be loaded.
    """
    model = open_model(ModelRef(model=name), log)
    from rotdistill_commands._session import load_session  # noqa: PLC0415  loads transformers

    return load_session(name, model.folder, tokens, device)


def _teacher(
    run: RunFolder, tokens: int, device: str, date: str, thinking: bool
) -> Callable[[], ChatSession]:
    """Return what connects the engine of a run's recipe, which answers for the teacher.

    Everything that needs no weights is looked at before variants are loaded.

    Raises:
        RotdistillError: the teacher is not here, or the engine cannot work.
    """
    recipe = next((start.recipe for start in run.ledger.starts[::-1]), "")
    folder = Path(os.path.normpath(run.store.root / recipe)).parent
    engine = engine_of_run(run.recipe.get("engine", {}), folder)
    model = open_model(ModelRef(**run.recipe["teacher"]), log)
    from rotdistill_commands._session import (  # noqa: PLC0415  loads transformers
        engine_session,
        load_session,
    )

    if engine.origin.name == DEFAULT_ENGINE:  # it answers here, word by word, as variants do
        return partial(load_session, TEACHER, model.folder, tokens, device, date, thinking)
    return partial(engine_session, TEACHER, engine, model, tokens, log, date, thinking)


def _saved_variants(run: RunFolder) -> list[str]:
    """Return the variants that have a checkpoint, those of the recipe first and in its order."""
    saved = {variant for variant, each in run.checkpoints.items() if run.folder_of(each).is_dir()}
    named = [name for name in run.recipe.get("variants", {}) if name in saved]
    return named + sorted(saved - {*named})


def _chosen(run: RunFolder, wanted: Sequence[str]) -> list[str]:
    """Return the variants to ask: those wanted, else baseline and headline of the recipe.

    Raises:
        RecipeError: a wanted variant has no checkpoint, or no variant has one.
    """
    saved = _saved_variants(run)
    if not saved:
        raise RecipeError(f"{run.path}: has no checkpoint yet; carry out its recipe first.")
    for name in wanted:
        if name not in saved:
            raise RecipeError(f'{run.path}: has no variant "{name}".{suggest(name, saved)}')
    marked = [run.recipe.get(key) for key in ("baseline", "headline")]
    default = [name for name in marked if name in saved] or [saved[0], saved[-1]]
    return list(dict.fromkeys(wanted or default))


def _system_prompts(run: RunFolder, given: Path | None, variants: Sequence[str]) -> dict[str, str]:
    """Return the system prompt of each variant and of the teacher.

    Raises:
        RecipeError: the file `given` cannot be read.
        CheckFailed: the run's own prompt is not what was committed.
    """
    prompt = _system_prompt(run, given)
    is_baked = given is None and run.recipe.get("samples", {}).get("bake_prompt", False)
    if is_baked:
        log(
            f"{run.path}: its system prompt is baked in: {', '.join(variants)} are asked without "
            "one, a teacher with it. --system FILE asks all with the prompt in the file."
        )
    return {TEACHER: prompt} | dict.fromkeys(variants, "" if is_baked else prompt)


def _system_prompt(run: RunFolder, given: Path | None) -> str:
    """Return the system prompt in the file `given`, else the one that the run was made with.

    Raises:
        RecipeError: the file cannot be read.
        CheckFailed: the run's own is not what was committed.
    """
    if given is None:
        content = run.read(RunLayout.SYSTEM_PROMPT)
        if content is None:
            log(f"{run.path}: keeps no system prompt, so none is used. --system FILE sets one.")
        prompt = (content or b"").decode().strip()
        if not prompt and _has_own_prompts(run):
            log(
                f"{run.path}: its texts have system prompts of their own, which differ, so none is "
                "used here. --system FILE sets one."
            )
        return prompt
    return _given_prompt(given)


def _has_own_prompts(run: RunFolder) -> bool:
    """Return whether some texts of the domain have a system prompt of their own."""
    lines = (run.read(RunLayout.TEXTS) or b"").decode().splitlines()
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    # Tables of older versions have no such column.
    return any(row.get("system") and not Split(row["split"]).outside_domain for row in rows)


def _given_prompt(given: Path) -> str:
    """Return the system prompt in a file.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        return read_text(given).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{given}: the system prompt cannot be read: {error.args[-1]}."
        ) from error


def _typed_questions() -> Iterator[str]:
    """Yield the lines of stdin until an empty one, or until its end."""
    while True:
        if sys.stdin.isatty():
            stderr_console().print("> ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _ask(
    sessions: Sequence[ChatSession],
    systems: Mapping[str, str],
    question: str,
    answers: dict[str, str],
    show: bool,
) -> None:
    """Ask every session, and write what it answers into `answers`.

    With `show`, answers appear as they come on a terminal, and at the end elsewhere. The answer of
    one that fails is taken out.

    Raises:
        RotdistillError: one has failed; the others have answered.
    """
    console = stdout_console()
    is_live = show and console.is_terminal and console.file.isatty()
    live = Live(_columns(answers), console=console, refresh_per_second=8) if is_live else None
    failures: list[RotdistillError] = []
    with live or nullcontext():
        for name, piece in _pieces(sessions, systems, question):
            if isinstance(piece, RotdistillError):
                del answers[name]
                failures.append(piece)
            else:
                answers[name] += piece
            if live:
                live.update(_columns(answers))
    answers.update({name: text.strip() for name, text in answers.items()})
    if show and not live:
        for name, text in answers.items():
            print_line(f"{name}: {' '.join(text.split())}")
    if failures:
        raise failures[0]


def _pieces(
    sessions: Sequence[ChatSession], systems: Mapping[str, str], question: str
) -> Iterator[tuple[str, str | RotdistillError]]:
    """Yield (name, piece of its answer), one piece of each in turn; at last why one has failed."""
    streams = {each.name: each.ask(systems[each.name], question) for each in sessions}
    while streams:
        for name in list(streams):
            try:
                yield name, next(streams[name])
            except StopIteration:
                del streams[name]
            except RotdistillError as error:
                del streams[name]
                yield name, error


def _columns(answers: Mapping[str, str]) -> Table:
    """Return the answers side by side."""
    table = Table(*map(literal, answers), expand=True)
    table.add_row(*map(literal, answers.values()))
    return table


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verb."""
    return [chat]
