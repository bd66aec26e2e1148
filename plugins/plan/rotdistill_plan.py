"""What a run would do, from recipe, configs and headers alone: order, reuse, sizes. No weight is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rotdistill_core import hookimpl, recipe
from rotdistill_core.cli import RUNS, Json, RecipePath, Sets
from rotdistill_core.headers import folder_headers
from rotdistill_core.ledger import Store
from rotdistill_core.models import Model, open_pair
from rotdistill_core.recipe import Loaded


@dataclass(frozen=True)
class Planned:
    """One step of one variant, in order."""

    variant: str
    id: str
    stage: str
    plugin: str
    state: str
    """`done` (its newest result is in the run's ledger), or `to do`."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    folder: Path
    steps: tuple[Planned, ...]
    sizes: dict[str, int]
    """What -> bytes."""
    texts: dict[str, int]
    """Split -> number of texts."""


def foresee(loaded: Loaded, root: Path) -> Plan:
    """Return what `run` would do.

    Raises:
        RotdistillError: the recipe's models or texts are not there or do not fit.
    """
    pair = open_pair(loaded.recipe.teacher, loaded.recipe.student, loaded.recipe.anchor)
    from rotdistill_core.samples import read_questions  # keeps torch out of every other command's start

    questions, _ = read_questions(loaded.recipe.samples, loaded.path.parent)
    folder = loaded.folder(root)
    ledgers = [ledger for ledger in Store(root).ledgers() if ledger.folder.name == folder.name]
    done = {record["id"] for ledger in ledgers for record in ledger.records if record["kind"] == "step"}
    steps = []
    for variant in loaded.recipe.variants:
        for placed in loaded.chain(variant):
            name = f"{placed.id} {variant}" if placed.stage == "evaluate" else placed.id
            plugin = f"{placed.origin.distribution} {placed.origin.version}"
            steps.append(Planned(variant, placed.id, placed.stage, plugin, "done" if name in done else "to do"))
    models = {"teacher": pair.teacher, "student": pair.student, "anchor": pair.anchor}
    sizes = {f"{role} {model.ref.model}": _bytes(model) for role, model in models.items() if model}
    splits = [q.split for q in questions]
    return Plan(folder, tuple(steps), sizes, {split: splits.count(split) for split in dict.fromkeys(splits)})


def _bytes(model: Model) -> int:
    return sum(header.bytes for header in folder_headers(model.folder).values())


def rich_plan(planned: Plan) -> Table:
    """Return the plan as a table for the terminal."""
    table = Table("variant", "step", "stage", "plugin", "state", title=str(planned.folder))
    for step in planned.steps:
        table.add_row(step.variant, step.id, step.stage, step.plugin, step.state)
    return table


def plan(path: RecipePath, sets: Sets = None, as_json: Json = False) -> None:
    """Show what `run` would do: order, what is there already, sizes from headers. Loads no weights.

    Examples:

      rotdistill plan recipes/tour_guide.toml

      rotdistill plan recipes/tour_guide.toml --set chop.layers=24 --json
    """
    planned = foresee(recipe.load(path, sets or []), RUNS)
    if as_json:
        steps = [vars(step) for step in planned.steps]
        print(json.dumps({"run_dir": str(planned.folder), "steps": steps, "bytes": planned.sizes, "texts": planned.texts}))
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(rich_plan(planned))
    for what, size in planned.sizes.items():
        console.print(f"{escape(what)}: {size / 1e9:.2f} GB")
    console.print(", ".join(f"{n} {split}" for split, n in planned.texts.items()) + " texts")


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verb."""
    return [plan]
