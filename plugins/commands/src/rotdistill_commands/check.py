"""The verb `check`: whether a recipe is valid, and whether a run is what it claims to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from rotdistill_commands._arguments import requested_run
from rotdistill_core import hookimpl
from rotdistill_core.errors import CheckFailed
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.terminal import Json, stderr_console


def check(
    path: Annotated[
        Path,
        typer.Argument(
            help="A recipe, or a run: its name, the beginning of it, or its folder.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Check a recipe without running it, or recompute from disk what a run claims: hashes, maps, ways back.

    Examples:

      rotdistill check recipes/tour_guide.toml

      rotdistill check tour-guide
    """
    if path.is_dir() or not (path.is_file() or path.suffix):
        from rotdistill_commands._check_run import check_run

        found = check_run(path if path.is_dir() else requested_run(str(path)).path)
        print(json.dumps(found)) if as_json else stderr_console().print(
            f"{found['files']} files, {found['maps']} maps, {len(found['unfolded'])} folds taken back, {len(found['problems'])} problems"
        )
        if found["problems"]:
            raise CheckFailed("\n".join(found["problems"]))
        return
    loaded = load_recipe(path)
    print(json.dumps(loaded.resolved())) if as_json else stderr_console().print(
        f"{escape(str(path))}: fine, {len(loaded.steps)} steps, variants {', '.join(loaded.recipe.variants)}"
    )


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verb."""
    return [check]
