"""The verb `chat`: ask variants of a run, side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rotdistill_commands._arguments import RunName, requested_run
from rotdistill_core import hookimpl
from rotdistill_core.errors import RecipeError, suggest
from rotdistill_core.execution.run_folder import RunFolder, find_run
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.terminal import Json, stderr_console

if TYPE_CHECKING:
    from rotdistill_commands._session import ChatSession


def _begun(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the variants of the run that begin so; it is in `args`, because an option without its value ends the parsing."""
    return [
        name for name in _saved(find_run(ctx.args[0], RUNS_FOLDER)) if name.startswith(incomplete)
    ]


Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        help="A variant; give it several times.",
        show_default=False,
        autocompletion=_begun,
    ),
]


def chat(
    run: RunName,
    variants: Variants = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Ask this and end; may be given again.", show_default=False),
    ] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="The teacher answers too.")] = False,
    system: Annotated[
        Path | None,
        typer.Option("--system", help="A file with another system prompt.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Longest answer.")] = 160,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Ask variants of a run and read their answers side by side. Greedy, behind the system prompt of the run; an empty line ends it.

    Examples:

      rotdistill chat tour-guide --variant base --variant full --prompt "What makes Angkor Wat so special?"

      rotdistill chat tour-guide --prompt "Wo liegt Lissabon?" --tokens 40 --json
    """
    found = requested_run(run)
    chosen = _variants(found, variants or [])
    told = _system(found, system)
    folders = {name: found.path / "checkpoints" / name for name in chosen}
    if teacher:
        from rotdistill_core.checkpoint.open import open_model
        from rotdistill_core.recipe.document import ModelRef

        folders["teacher"] = open_model(
            ModelRef(**found.recipe["teacher"]), lambda text: stderr_console().print(escape(text))
        ).folder
    from rotdistill_commands._session import load_session

    speakers = [load_session(name, folder, tokens, device) for name, folder in folders.items()]
    answers = [_answered(speakers, told, prompt, as_json) for prompt in (prompts or _typed())]
    if as_json:
        print(json.dumps(answers, ensure_ascii=False))


def _saved(run: RunFolder) -> list[str]:
    """Return the variants that have a checkpoint, those of the recipe first and in its order."""
    there = [
        path.name
        for path in (run.path / "checkpoints").glob("*")
        if (path / "config.json").is_file()
    ]
    named = [name for name in run.recipe.get("variants", {}) if name in there]
    return named + sorted({*there} - {*named})


def _variants(run: RunFolder, wanted: list[str]) -> list[str]:
    """Return the variants to ask: those named, else `base` and `full` or the first and the last that are saved.

    Raises:
        RecipeError: one is not saved, or none is.
    """
    saved = _saved(run)
    if not saved:
        raise RecipeError(f"{run.path}: has no checkpoint yet; carry out its recipe first.")
    for name in wanted:
        if name not in saved:
            raise RecipeError(f'{run.path}: has no variant "{name}".{suggest(name, saved)}')
    ends = ["base" if "base" in saved else saved[0], "full" if "full" in saved else saved[-1]]
    return list(dict.fromkeys(wanted or ends))


def _system(run: RunFolder, given: Path | None) -> str:
    path = given or run.path / "system.md"
    if given is None and not path.is_file():
        stderr_console().print(
            f"{escape(str(run.path))}: keeps no system prompt; none is given. Name one with --system."
        )
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the system prompt cannot be read: {error}.") from error


def _typed() -> Iterator[str]:
    """Yield what is typed, or piped in, line by line; an empty line or the end of it ends."""
    while True:
        if sys.stdin.isatty():
            stderr_console().print("> ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _answered(
    speakers: Iterable[ChatSession], system: str, prompt: str, quiet: bool
) -> dict[str, object]:
    """Ask everyone, show the answers as they come where there is a terminal, and return them."""
    said = {speaker.name: "" for speaker in speakers}
    console = Console(highlight=False)
    live = (
        Live(_beside(said), console=console, refresh_per_second=8)
        if console.is_terminal and not quiet
        else None
    )
    if live:
        live.start()
    try:
        streams = {speaker.name: speaker.ask(system, prompt) for speaker in speakers}
        while streams:  # one piece of each in turn
            for name in list(streams):
                piece = next(streams[name], None)
                if piece is None:
                    del streams[name]
                    continue
                said[name] += piece
                if live:
                    live.update(_beside(said))
    finally:
        if live:
            live.stop()
    if not (live or quiet):
        for name, text in said.items():
            print(f"{name}: {' '.join(text.split())}")
    return {"prompt": prompt, "answers": {name: text.strip() for name, text in said.items()}}


def _beside(said: dict[str, str]) -> Table:
    table = Table(*map(escape, said), expand=True)
    table.add_row(*map(Text, said.values()))
    return table


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verb."""
    return [chat]
