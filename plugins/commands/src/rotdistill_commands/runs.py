"""The verbs over runs on disk: runs, show, diff, rm, report."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Column

from rotdistill_commands._arguments import RunName, complete_run_names, log, requested_run
from rotdistill_commands._removal import describe_files, files_to_delete, format_size, remove
from rotdistill_core import hookimpl
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.evaluation.rows import overall_figures
from rotdistill_core.execution.run_folder import RunFolder, all_runs, find_run, needed_by
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.terminal import (
    Json,
    WideTable,
    literal,
    print_json,
    print_line,
    results_table,
    stderr_console,
    stdout_console,
)


def runs(as_json: Json = False) -> None:
    """List the runs in runs/: state, variants, lowest KL, size, and bytes that other runs need.

    Examples:

      rotdistill runs

      rotdistill runs --json
    """
    found = all_runs(RUNS_FOLDER)
    for problem in filter(None, map(_unreadable, found)):
        log(problem)
    every_run = [run for run in found if not _unreadable(run)]
    rows = [_listing(run, every_run) for run in every_run]
    if as_json:
        print_json(rows)
    elif rows:
        stdout_console().print(_listing_table(rows))
        for problem in (problem for row in rows for problem in row["damage"]):
            log(problem)
    else:
        log(f"no runs in {RUNS_FOLDER}/; `rotdistill run RECIPE` makes one.")


def _unreadable(run: RunFolder) -> str:
    """Return why the ledger of a run cannot be read; empty if it can."""
    try:
        _ = run.ledger
    except SetupError as error:
        return str(error)
    return ""


def _listing(run: RunFolder, every_run: Sequence[RunFolder]) -> dict[str, Any]:
    """Return a run as JSON values. What is described by a damaged document is left out."""
    needed = [RUNS_FOLDER / path for path in needed_by(run, every_run)]
    damage = run.damage
    failures = [] if damage else [asdict(failure) for failure in run.failures]
    failed = dict.fromkeys(f"{failure['id']} failed" for failure in failures)
    return {
        "run": run.path.name,
        "state": ", ".join([run.state, *failed, *(["damaged"] if damage else [])]),
        "damage": damage,
        "failures": failures,
        "variants": [] if damage else list(run.recipe.get("variants", {})),
        "best": None if damage else _lowest_kl(run),
        "bytes": run.bytes,
        "shared_bytes": sum(path.stat().st_size for path in needed if path.is_file()),
        "changed": run.changed,
    }


def _lowest_kl(run: RunFolder) -> tuple[str, float] | None:
    """Return the variant with the lowest held-out KL, and the KL."""
    scores = [
        (figures["kl"], variant)
        for variant, figures in overall_figures(run.rows()).items()
        if math.isfinite(figures.get("kl", math.nan))
    ]
    if not scores:
        return None
    kl, variant = min(scores)
    return variant, kl


def _listing_table(rows: Sequence[Mapping[str, Any]]) -> WideTable:
    variants = Column("variants", overflow="fold")
    table = WideTable("run", "state", variants, "lowest KL", "size", "shared", "changed")
    for row in rows:
        best = "{} {:.4f}".format(*row["best"]) if row["best"] else ""
        shared = format_size(row["shared_bytes"]) if row["shared_bytes"] else ""
        cells = (
            row["run"],
            row["state"],
            ", ".join(row["variants"]),
            best,
            format_size(row["bytes"]),
            shared,
            row["changed"],
        )
        table.add_row(*map(literal, cells))
    return table


def show(run: RunName, as_json: Json = False) -> None:
    """Show one run: models, steps with keys, times, sizes and places, and the variants' scores.

    Examples:

      rotdistill show tour-guide

      rotdistill show tour-guide --json
    """
    folder = requested_run(run)
    others = [run for run in all_runs(folder.path.parent) if not _unreadable(run)]
    needed = needed_by(folder, others)
    users = sorted({user for users in needed.values() for user in users})
    steps = _steps(folder)
    rows = folder.rows()
    if as_json:
        document = {
            "run": folder.path.name,
            "path": str(folder.path),
            "state": folder.state,
            "bytes": folder.bytes,
            "needed_by": users,
            "recipe": folder.recipe,
            "steps": steps,
            "failures": [asdict(failure) for failure in folder.failures],
            "figures": overall_figures(rows),
        }
        print_json(document)
        return
    console = stdout_console()
    size = format_size(folder.bytes)
    console.print(f"{literal(str(folder.path))}: {folder.state}, {size}, {folder.changed}")
    for role in ("teacher", "student", "anchor"):
        model = folder.recipe.get(role)
        if model:
            console.print(f"{role:<8} {literal(model['model'])}")
    if users:
        names = literal(", ".join(users))
        console.print(f"{len(needed)} of its files are part of {names}; `rm` leaves those.")
    console.print(_step_table(folder, steps) if steps else "No step is finished yet.")
    for failure in folder.failures:
        console.print(literal(failure), soft_wrap=True)
    for step_id, refusal in _refusals(folder).items():
        said = f"{literal(step_id)} left the student as it was: {literal(refusal)}"
        console.print(said, soft_wrap=True)
    for step_id, cautions in _cautions(folder).items():
        console.print(f"{literal(step_id)}: {literal(' '.join(cautions))}", soft_wrap=True)
    if rows:
        console.print(results_table(rows))


def _steps(run: RunFolder) -> list[dict[str, Any]]:
    """Return the results that a run consists of as JSON values, in order, each once."""
    steps: dict[str, dict[str, Any]] = {}
    for variant, chain in run.chains().items():
        for step, record in chain.items():
            owners = sorted({file.path.partition("/")[0] for file in record.files})
            description = {
                "id": step,
                "use": record.use,
                "plugin": record.plugin,
                "key": record.key,
                "seconds": record.seconds,
                "bytes": sum(file.bytes for file in record.files),
                "lies_in": ", ".join(owners) or run.path.name,
                "variants": [],
                "options": record.options,
                "notes": record.notes,
                "refused": record.report.refused,
                "remedies": [remedy.text for remedy in record.report.remedies],
                "cautions": [caution.text for caution in record.report.cautions],
            }
            steps.setdefault(record.key, description)["variants"].append(variant)
    return list(steps.values())


def _refusals(run: RunFolder) -> dict[str, str]:
    """Return step id, with its variant -> why it did not apply its edit, and what to try next."""
    found: dict[str, tuple[str, str]] = {}
    for variant, chain in run.chains().items():
        for step, record in chain.items():
            if record.report.refused:
                found.setdefault(record.key, (f"{variant}: {step}", record.report.refusal))
    return dict(found.values())


def _cautions(run: RunFolder) -> dict[str, list[str]]:
    """Return step id, with its variant -> what speaks against the edit that it applied."""
    found: dict[str, tuple[str, list[str]]] = {}
    for variant, chain in run.chains().items():
        for step, record in chain.items():
            if record.report.cautions:
                texts = [caution.text for caution in record.report.cautions]
                found.setdefault(record.key, (f"{variant}: {step}", texts))
    return dict(found.values())


def _step_table(run: RunFolder, steps: Sequence[Mapping[str, Any]]) -> WideTable:
    """Return the steps as a table, with their places if one is in another run's folder."""
    has_places = any(step["lies_in"] != run.path.name for step in steps)
    table = WideTable(
        "step",
        "use",
        Column("variants", overflow="fold"),
        "key",
        "seconds",
        "size",
        *(["lies in"] if has_places else []),
    )
    for step in steps:
        cells = [
            step["id"],
            step["use"],
            ", ".join(step["variants"]),
            step["key"][:10],
            f"{step['seconds']:.1f}",
            format_size(step["bytes"]),
        ]
        if has_places:
            cells.append(step["lies_in"])
        table.add_row(*map(literal, cells))
    return table


def diff(one: RunName, two: RunName, as_json: Json = False) -> None:
    """Compare two runs: recipes, maps of their aligners, and scores with intervals over texts.

    Examples:

      rotdistill diff tour-guide swap-aligner

      rotdistill diff tour-guide swap-aligner --json
    """
    from rotdistill_commands import _diff  # noqa: PLC0415  loads torch

    first, second = requested_run(one), requested_run(two)
    recipes = _diff.recipe_changes(first, second)
    maps = _diff.map_changes(first, second)
    scores = _diff.score_changes(first, second)
    if as_json:
        document = {
            "runs": [first.path.name, second.path.name],
            "recipes": [asdict(change) for change in recipes],
            "maps": [asdict(change) for change in maps],
            "scores": [asdict(change) for change in scores],
        }
        print_json(document)
        return
    console = stdout_console()
    console.print(f"{literal(first.path.name)} → {literal(second.path.name)}")
    tables = (_diff.recipe_table(recipes), _diff.map_table(maps), _diff.score_table(scores))
    for table in tables:
        if table:
            console.print(table)
    equal = sum(score.one == score.two for score in scores)
    if equal:
        console.print(f"{equal} of {len(scores)} figures are the same.")
    if not recipes and not maps:
        console.print("The recipes and the maps of their aligners are the same.")


def rm(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs, as for `show`; a name that several have is refused.",
            autocompletion=complete_run_names,
        ),
    ],
    keep_checkpoints: Annotated[
        bool,
        typer.Option("--keep-checkpoints", help="Remove all but checkpoints, scores and report."),
    ] = False,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Do not ask first. Where there is no terminal to ask on, --yes is needed."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove runs for good. Files that other runs need stay where they are.

    Examples:

      rotdistill rm tour-guide --keep-checkpoints

      rotdistill rm tour-guide
    """
    chosen = {run.path.resolve(): run for run in (find_run(name, RUNS_FOLDER) for name in names)}
    needs = {}
    for run in chosen.values():
        staying = [
            other for other in all_runs(run.path.parent) if other.path.resolve() not in chosen
        ]
        needs[run] = needed_by(run, staying)
    if not yes and not _confirmed(needs, keep_checkpoints):
        needs = {}
    removed = []
    for run, needed in needs.items():
        freed = remove(run, needed, keep_checkpoints)
        kept = sorted(path for path in needed if (run.path.parent / path).is_file())
        removed.append({"run": run.path.name, "freed_bytes": freed, "kept": kept})
        if not as_json:
            log(f"{run.path.name}: {format_size(freed)} freed{_kept_files(kept, needed)}")
    if as_json:
        print_json(removed)


def _confirmed(needs: Mapping[RunFolder, Mapping[str, list[str]]], keep_checkpoints: bool) -> bool:
    """List what a removal frees, and return whether the user agrees.

    Raises:
        RecipeError: there is no terminal to ask on.
    """
    lines = []
    for run, needed in needs.items():
        files = describe_files(run, files_to_delete(run, needed, keep_checkpoints))
        lines.append(f"{run.path.name}: {run.state}, of {run.changed}, frees {files}")
    if not sys.stdin.isatty():
        raise RecipeError(
            "rm asks before it removes, and there is no terminal to ask on. Nothing is removed; "
            f"--yes removes without asking ({'; '.join(lines)})."
        )
    for line in lines:
        log(line)
    stderr_console().print("Remove for good? y/N ", end="")
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    log("nothing is removed.")
    return False


def _kept_files(kept: Sequence[str], needed: Mapping[str, list[str]]) -> str:
    """Return the end of the line about a removed run: the files that stay, and their users."""
    if not kept:
        return ""
    users = sorted({user for users in needed.values() for user in users})
    return f"; {len(kept)} files stay, they are part of {', '.join(users)}"


def report(run: RunName, as_json: Json = False) -> None:
    """Write the report of a finished run again from its ledger. Its models must still be there.

    Examples:

      rotdistill report tour-guide

      rotdistill report tour-guide --json
    """
    from rotdistill_commands._rewrite_report import rewrite_report  # noqa: PLC0415  loads torch

    folder = requested_run(run)
    page = rewrite_report(folder, log)
    if as_json:
        print_json({"run": folder.path.name, "report": str(page)})
    else:
        print_line(page)


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verbs."""
    return [runs, show, diff, rm, report]
