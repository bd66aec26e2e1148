"""What a run would do, from recipe, configs and headers alone: order, reuse, sizes. No weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from rotdistill_core.headers import folder_headers
from rotdistill_core.ledger import Store
from rotdistill_core.models import Model, open_pair
from rotdistill_core.recipe import Loaded
from rotdistill_core.samples import read_questions


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


def plan(loaded: Loaded, root: Path) -> Plan:
    """Return what `run` would do.

    Raises:
        RotdistillError: the recipe's models or texts are not there or do not fit.
    """
    from rotdistill_core.pipeline import run_folder  # keeps `torch` out of every other command's start

    pair = open_pair(loaded.recipe.teacher, loaded.recipe.student, loaded.recipe.anchor)
    questions, _ = read_questions(loaded.recipe.samples, loaded.path.parent)
    folder = run_folder(loaded, root)
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
