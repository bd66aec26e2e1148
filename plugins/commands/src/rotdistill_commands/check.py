"""The verb `check`: whether a recipe is valid, or whether a run is what its ledger claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rotdistill_commands._arguments import log, requested_run
from rotdistill_core import hookimpl
from rotdistill_core.errors import CheckFailed
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.terminal import Json


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
    """Check a recipe without running it, or recompute the claims of a run from its files.

    Examples:

      rotdistill check recipes/tour_guide.toml

      rotdistill check tour-guide
    """
    is_recipe = path.is_file() or (path.suffix and not path.is_dir())
    if is_recipe:
        _check_recipe(path, as_json)
    else:
        _check_run(path if path.is_dir() else requested_run(str(path)).path, as_json)


def _check_recipe(path: Path, as_json: bool) -> None:
    loaded = load_recipe(path)
    for note in loaded.notes:
        log(note)
    if as_json:
        print(json.dumps(loaded.resolved()))
        return
    variants = ", ".join(loaded.recipe.variants)
    log(f"{path}: fine, {len(loaded.steps)} steps, variants {variants}")


def _check_run(folder: Path, as_json: bool) -> None:
    """Check a run's folder.

    Raises:
        CheckFailed: something in it is not as the ledger claims.
    """
    from rotdistill_commands._check_run import check_run  # noqa: PLC0415  loads torch

    outcome = check_run(folder)
    if as_json:
        print(json.dumps(outcome.as_dict()))
    else:
        for line in outcome.models_not_here:
            log(line)
        log(
            f"{outcome.files} files, {outcome.models} models, {outcome.maps} maps, "
            f"{len(outcome.unfolded)} folds undone, {len(outcome.problems)} problems"
        )
    if outcome.problems:
        raise CheckFailed("\n".join(outcome.problems))


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verb."""
    return [check]
