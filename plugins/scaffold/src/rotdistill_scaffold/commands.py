"""Verbs of authors: `new` writes a step, an adapter or a recipe; `plugins` and `schema` list what
is installed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column

from rotdistill_core import hookimpl
from rotdistill_core.errors import PluginError, RecipeError
from rotdistill_core.plugin.registry import InstalledPlugin, command_function, iter_plugins
from rotdistill_core.plugin.step import STAGES, stage_of
from rotdistill_core.recipe.schema import recipe_schema
from rotdistill_core.store.files import write_file
from rotdistill_core.terminal import (
    Json,
    WideTable,
    literal,
    print_json,
    print_line,
    stderr_console,
    stdout_console,
)
from rotdistill_scaffold._recipe import Wanted, recipe_files
from rotdistill_scaffold._templates import adapter_files, require_no_adapter, step_files

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
TRY_PLUGIN = ("pip install --no-build-isolation --no-deps -e", "python -m pytest")
TRY_RECIPE = ("rotdistill check", "rotdistill plan", "rotdistill run")


class Kind(StrEnum):
    """What `new` can write."""

    step = "step"
    adapter = "adapter"
    recipe = "recipe"


def new(  # noqa: PLR0913  an option each
    kind: Annotated[
        Kind,
        typer.Argument(help="What to write: a step, an adapter or a recipe.", show_default=False),
    ],
    name: Annotated[
        str,
        typer.Argument(
            help="The name of a step or recipe; for an adapter, the model type of config.json.",
            show_default=False,
        ),
    ],
    stage: Annotated[
        str,
        typer.Option(
            "--stage",
            help=f"Of a step: its stage; one of {', '.join(STAGES)}.",
            autocompletion=lambda: list(STAGES),
        ),
    ] = "align",
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="Of a recipe: the large model.", show_default=False),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            help="Of a recipe: the small model. Without it, the teacher with fewer layers.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            "--texts",
            help="Of a recipe: a file of conversations; see docs/texts.md.",
            show_default=False,
        ),
    ] = None,
    heldout: Annotated[
        str | None,
        typer.Option(
            "--heldout", help="Of a recipe: a file of held-out questions.", show_default=False
        ),
    ] = None,
    guard: Annotated[
        str | None,
        typer.Option(
            "--guard", help="Of a recipe: a file of texts outside the domain.", show_default=False
        ),
    ] = None,
    system: Annotated[
        Path | None,
        typer.Option(
            "--system", help="Of a recipe: a file with the system prompt.", show_default=False
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            "--domain",
            help="Of a recipe: what answers are about. Writes a system prompt that you can edit.",
            show_default=False,
        ),
    ] = None,
    into: Annotated[Path, typer.Option("--in", help="The folder to write into.")] = Path(),
    as_json: Json = False,
) -> None:
    """Write a step or an adapter, which installs and passes its own tests, or a recipe for your
    models, your texts and this machine. Nothing is overwritten.

    Examples:

      rotdistill new step my-aligner --stage align

      rotdistill new adapter mistral

      rotdistill new recipe mine --texts texts/faq.jsonl --teacher models/big --student models/small
    """
    if not NAME.fullmatch(name):
        raise RecipeError(
            f'"{name}": a name is lower-case letters, digits and dashes, and begins with a letter.'
        )
    wanted = Wanted(
        name=name,
        teacher=teacher,
        student=student,
        texts=texts,
        heldout=heldout,
        guard=guard,
        system=system,
        domain=domain,
    )
    if kind is not Kind.recipe and wanted.options:
        raise RecipeError(f"{', '.join(wanted.options)}: for a recipe, and not for {kind}s.")
    if kind is Kind.step:
        files = step_files(name, stage)
    elif kind is Kind.adapter:
        require_no_adapter(name)
        _require_free([into / f"{name}-adapter"])  # before the table is tried
        files = adapter_files(name)
    else:
        _require_free([into / f"{name}.toml"])  # before models are opened
        files = recipe_files(wanted, into, _log)
    written = _write(files, into)
    if as_json:
        print_json([str(into / file) for file in files])
        return
    print_line("\n".join(map(str, written)))
    commands = TRY_RECIPE if kind is Kind.recipe else TRY_PLUGIN
    lines = ["try it:", *(f"{command} {literal(str(written[0]))}" for command in commands)]
    stderr_console().print("\n".join(lines), soft_wrap=True)


def _log(line: str) -> None:
    stderr_console().print(literal(line), soft_wrap=True)


def _write(files: Mapping[str, str], into: Path) -> list[Path]:
    """Write files below a folder; return the topmost paths.

    Raises:
        RecipeError: one of them is there already. Nothing is written then.
    """
    tops = list(dict.fromkeys(into / Path(file).parts[0] for file in files))
    _require_free(tops)
    for file, text in files.items():
        write_file(into / file, [text.encode()])
    return tops


def _require_free(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            raise RecipeError(
                f"{path}: is there already; choose another name, or another folder with --in."
            )


def plugins(as_json: Json = False) -> None:
    """List installed steps, adapters, sources, engines, observers and verbs, broken ones too.

    Examples:

      rotdistill plugins

      rotdistill plugins --json
    """
    rows = [_row(plugin) for plugin in iter_plugins()]
    if as_json:
        print_json(rows)
    elif not sys.stdout.isatty():  # a line each, for grep
        for row in rows:
            print_line("{name:<22} {stage:<9} {distribution} {version}  {about}".format_map(row))
    else:
        table = WideTable("name", "stage", Column("about", overflow="fold"))
        for row in rows:
            table.add_row(*(literal(row[key]) for key in ("name", "stage", "about")))
        stdout_console().print(table)


def _row(plugin: InstalledPlugin) -> dict[str, str]:
    """Return one line of the list of plugins."""
    content = plugin.content
    if isinstance(content, type):
        stage = stage_of(content) if plugin.kind == "step" else plugin.kind
        about = (content.__doc__ or "").strip().splitlines()[0]
    else:
        stage = "broken" if plugin.kind == "step" else plugin.kind
        about = content
    if plugin.kind == "verb":  # one module may offer several, each with its own help
        try:
            about = (command_function(plugin.origin.name).__doc__ or about).strip().splitlines()[0]
        except PluginError as error:
            about = str(error)
    return {
        "name": plugin.origin.name,
        "stage": stage,
        "distribution": plugin.origin.distribution,
        "version": plugin.origin.version,
        "about": about,
    }


def schema() -> None:
    """Print the JSON schema of recipes for the plugins installed here.

    Examples:

      rotdistill schema > recipes/recipe.schema.json

      rotdistill schema | python -m json.tool
    """
    print_line(json.dumps(recipe_schema(), indent=1))


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verbs."""
    return [new, plugins, schema]
