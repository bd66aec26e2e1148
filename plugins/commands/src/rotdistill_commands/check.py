"""The verb `check`: whether a recipe is valid, or whether a run is what its ledger claims."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rotdistill_commands._arguments import log, requested_run
from rotdistill_core import hookimpl
from rotdistill_core.data.lessons import checked_lesson_texts, lesson_notes
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.summary import text_notes, texts_in_words
from rotdistill_core.errors import CheckFailed, RecipeError
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import check_against_models, device_warnings
from rotdistill_core.recipe.as_toml import resolved_toml
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.terminal import Json, Sets, print_json, print_line


def check(
    path: Annotated[
        Path,
        typer.Argument(
            help="A recipe, or a run: its name, the beginning of it, or its folder.",
            show_default=False,
        ),
    ],
    sets: Sets = None,
    resolved: Annotated[
        bool,
        typer.Option(
            "--resolved",
            help="Print the whole recipe as TOML: `extends`, --set and all defaults filled in.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a recipe and its texts, or recompute the claims of a run from its files.

    Examples:

      rotdistill check recipes/tour_guide.toml --set chop.layers=24 --resolved

      rotdistill check tour-guide
    """
    # A name of a run may have a dot.
    is_recipe = path.is_file() or (path.suffix == ".toml" and not path.is_dir())
    if is_recipe:
        _check_recipe(load_recipe(path, sets or []), resolved, as_json)
    elif sets or resolved:
        raise RecipeError(
            f"{path}: is not a recipe. --set and --resolved are for the TOML file of a recipe; "
            "leave them out to check a run."
        )
    else:
        _check_run(path if path.is_dir() else requested_run(str(path)).path, as_json)


def _check_recipe(loaded: ResolvedRecipe, resolved: bool, as_json: bool) -> None:
    """Print what there is to say about a valid recipe, and read its texts.

    Raises:
        RecipeError: naming file, line and column of what is wrong with the texts.
        RotdistillError: a model is missing, or a step does not fit the models.
    """
    for note in loaded.notes:
        log(note)
    if as_json:
        print_json(loaded.resolved())
    elif resolved:
        print_line(resolved_toml(loaded).removesuffix("\n"))
    recipe = loaded.recipe
    conversations, style = read_conversations(recipe.samples, loaded.path.parent, log)
    lesson_texts = checked_lesson_texts(recipe, loaded.path.parent, conversations)
    if not as_json and not resolved:  # a recipe is printed where its models are not here, too
        for note in check_against_models(loaded, conversations, style):
            log(note)
    for note in (
        *device_warnings(recipe, this_machine(RUNS_FOLDER)),
        *lesson_notes(recipe, conversations, lesson_texts),
        *text_notes(conversations, recipe.samples, recipe.teacher.model, loaded.judged),
    ):
        log(note)
    if not as_json and not resolved:
        log(f"texts: {texts_in_words(conversations, recipe.samples, recipe.lessons.count)}")
        log(
            f"{loaded.path}: fine, {len(loaded.steps)} steps, variants {', '.join(recipe.variants)}"
        )


def _check_run(folder: Path, as_json: bool) -> None:
    """Check a run's folder.

    Raises:
        CheckFailed: something in it is not as the ledger claims.
    """
    from rotdistill_commands._check_run import check_run  # noqa: PLC0415  loads torch

    outcome = check_run(folder)
    if as_json:
        print_json(outcome.as_dict())
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
