"""Verbs over the runs on disk: runs, show, diff, rm, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column

from rotdistill_commands._arguments import RunName, _complete_run_names, requested_run
from rotdistill_commands._diff import (
    map_changes,
    map_table,
    recipe_changes,
    recipe_table,
    score_changes,
    score_table,
)
from rotdistill_commands._removal import files_to_delete, format_size, remove, shares
from rotdistill_core import hookimpl
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.rows import overall_figures
from rotdistill_core.execution.run_folder import RunFolder, all_runs, find_run, needed_by
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.store.records import StepRecord
from rotdistill_core.terminal import (
    Json,
    WideTable,
    results_table,
    stderr_console,
    stdout_console,
)


def runs(as_json: Json = False) -> None:
    """List the runs in runs/: state, variants, the lowest KL, size, and how much of it other runs stand on.

    Examples:

      rotdistill runs

      rotdistill runs --json
    """
    found = all_runs(RUNS_FOLDER)
    rows: list[dict[str, Any]] = []
    for run in found:
        shared = sum(
            (RUNS_FOLDER / path).stat().st_size
            for path in needed_by(run, found)
            if (RUNS_FOLDER / path).is_file()
        )
        rows.append({
            "run": run.path.name, "state": run.state, "variants": list(run.recipe.get("variants", {})), "best": _best(run),
            "bytes": run.bytes, "shared_bytes": shared, "changed": run.changed,
        })  # fmt: skip
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    if not rows:
        stderr_console().print(f"no runs in {RUNS_FOLDER}/; `rotdistill run RECIPE` makes one.")
        return
    table = WideTable(
        "run",
        "state",
        Column("variants", overflow="fold"),
        "lowest KL",
        "size",
        "shared",
        "changed",
    )
    for row in rows:
        best = f"{row['best'][0]} {row['best'][1]:.4f}" if row["best"] else ""
        sizes = (
            format_size(row["bytes"]),
            format_size(row["shared_bytes"]) if row["shared_bytes"] else "",
        )
        table.add_row(
            *map(
                escape,
                (
                    row["run"],
                    row["state"],
                    ", ".join(row["variants"]),
                    best,
                    *sizes,
                    row["changed"],
                ),
            )
        )
    stdout_console().print(table)


def _best(run: RunFolder) -> tuple[str, float] | None:
    scored = [(v["kl"], name) for name, v in overall_figures(run.rows()).items() if "kl" in v]
    return (min(scored)[1], min(scored)[0]) if scored else None


def show(run: RunName, as_json: Json = False) -> None:
    """Show one run: models, steps with keys, times and sizes, where each result lies, and what the variants scored.

    Examples:

      rotdistill show tour-guide

      rotdistill show tour-guide --json
    """
    found = requested_run(run)
    rows, recipe, needed = found.rows(), found.recipe, needed_by(found, all_runs(found.path.parent))
    steps = list(_steps(found))
    others = sorted({name for names in needed.values() for name in names})
    if as_json:
        about = {
            "run": found.path.name,
            "path": str(found.path),
            "state": found.state,
            "bytes": found.bytes,
            "needed_by": others,
        }
        print(
            json.dumps(
                {**about, "recipe": recipe, "steps": steps, "figures": overall_figures(rows)},
                ensure_ascii=False,
            )
        )
        return
    console = stdout_console()
    console.print(
        f"{escape(str(found.path))}: {found.state}, {format_size(found.bytes)}, {found.changed}"
    )
    for role in ("teacher", "student", "anchor"):
        if model := recipe.get(role):
            console.print(f"{role:<8} {escape(model['model'])}")
    if others:
        console.print(
            f"{len(needed)} of its files are part of {escape(', '.join(others))}; `rm` leaves those."
        )
    elsewhere = any(step["lies_in"] != found.path.name for step in steps)
    table = WideTable(
        "step",
        "use",
        Column("variants", overflow="fold"),
        "key",
        "seconds",
        "size",
        *(["lies in"] if elsewhere else []),
    )
    for step in steps:
        cells = (
            step["id"],
            step["use"],
            ", ".join(step["variants"]),
            step["key"][:10],
            f"{step['seconds']:.1f}",
            format_size(step["bytes"]),
        )
        table.add_row(*map(escape, (*cells, *([step["lies_in"]] if elsewhere else []))))
    console.print(table if steps else "No step is finished yet.")
    if rows:
        console.print(results_table(rows))


def _steps(run: RunFolder) -> list[dict[str, Any]]:
    """Return each result that the run stands on, in order, with the variants that share it."""
    made: dict[str, dict[str, Any]] = {}
    for variant, chain in run.chains().items():
        for step, record in chain.items():
            owners = {file.path.split("/")[0] for file in record.files}
            about = {
                "id": step, "use": record.use, "plugin": record.plugin, "key": record.key, "seconds": record.seconds,
                "bytes": sum(file.bytes for file in record.files), "lies_in": ", ".join(sorted(owners)) or run.path.name,
                "variants": [], "options": record.options, "notes": record.notes,
            }  # fmt: skip
            made.setdefault(record.key, about)["variants"].append(variant)
    return list(made.values())


def diff(one: RunName, two: RunName, as_json: Json = False) -> None:
    """Compare two runs: recipes, what their aligners found, and scores with intervals over the texts that both have.

    Examples:

      rotdistill diff tour-guide swap-aligner

      rotdistill diff tour-guide swap-aligner --json
    """

    a, b = requested_run(one), requested_run(two)
    recipes, maps, scores = recipe_changes(a, b), map_changes(a, b), score_changes(a, b)
    if as_json:
        names = {"runs": [a.path.name, b.path.name], "recipes": [vars(r) for r in recipes]}
        print(
            json.dumps(
                {**names, "maps": [vars(m) for m in maps], "scores": [vars(s) for s in scores]},
                ensure_ascii=False,
            )
        )
        return
    console = stdout_console()
    console.print(f"{escape(a.path.name)} → {escape(b.path.name)}")
    for told in (recipe_table(recipes), map_table(maps), score_table(scores)):
        if told:
            console.print(told)
    if same := sum(score.one == score.two for score in scores):
        console.print(f"{same} of {len(scores)} figures are the same.")
    if not recipes and not maps:
        console.print("The recipes are the same, and so is what aligners found.")


def rm(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Runs, as for `show`.", autocompletion=_complete_run_names
        ),
    ],
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep checkpoints, scores and report.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask, which it does on a terminal only.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove runs, for good. Files that results of other runs consist of stay, and are found again from there.

    Examples:

      rotdistill rm tour-guide --keep-checkpoints

      rotdistill rm tour-guide
    """
    there = {(run := find_run(name, RUNS_FOLDER)).path.resolve(): run for name in names}
    others = {
        run: [each for each in all_runs(run.path.parent) if each.path.resolve() not in there]
        for run in there.values()
    }
    needs = {run: needed_by(run, rest) for run, rest in others.items()}
    if sys.stdin.isatty() and not yes:
        for run, needed in needs.items():
            what = shares(run, files_to_delete(run, set(needed), keep_checkpoints))
            stderr_console().print(
                f"{escape(run.path.name)}: {run.state}, of {run.changed}, frees {what}",
                soft_wrap=True,
            )
        stderr_console().print("Remove for good? y/N ", end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            needs = {}
            stderr_console().print("nothing is removed.")
    told = []
    for run, needed in needs.items():
        freed = remove(run, set(needed), keep_checkpoints)
        kept = sorted(path for path in needed if (run.path.parent / path).is_file())
        told.append({"run": run.path.name, "freed_bytes": freed, "kept": kept})
        if not as_json:
            users = ", ".join(sorted({name for names in needed.values() for name in names}))
            left = f"; {len(kept)} files stay, they are part of {users}" if kept else ""
            stderr_console().print(
                f"{escape(run.path.name)}: {format_size(freed)} freed{escape(left)}", soft_wrap=True
            )
    if as_json:
        print(json.dumps(told, ensure_ascii=False))


def report(run: RunName, as_json: Json = False) -> None:
    """Write the report of a finished run anew, from its ledger, and say where it is. Its models must still be there.

    Examples:

      rotdistill report tour-guide

      rotdistill report tour-guide --json
    """
    from rotdistill_core.checkpoint.open import open_pair
    from rotdistill_core.evaluation.gates import broken_gates
    from rotdistill_core.execution.outcome import RunResult, StepResult
    from rotdistill_core.plugin.registry import OBSERVERS, load_plugin, plugin_manager
    from rotdistill_core.recipe.load import resolve_recipe
    from rotdistill_core.store.ledger import ArtifactStore
    from rotdistill_core.store.output import StepOutput

    found = requested_run(run)
    if found.state != "done":
        raise RecipeError(
            f"{found.path}: is {found.state}; there is a report when its recipe has run to the end."
        )
    path = found.path / "recipe.toml"
    loaded = resolve_recipe(path, path.read_text(encoding="utf-8"), {**found.recipe})
    chains = found.chains()
    steps = {
        (v, s): StepResult(
            r.key,
            _elsewhere(found, r),
            r.seconds,
            r.notes,
            r.report,
        )
        for v, c in chains.items()
        for s, r in c.items()
    }
    checkpoints = {name: found.path / "checkpoints" / name for name in chains}
    rows, pair = (
        found.rows(),
        open_pair(
            loaded.recipe.teacher,
            loaded.recipe.student,
            loaded.recipe.anchor,
            stderr_console().print,
        ),
    )
    failed = broken_gates([row for row in rows if row.metric != "failed"], loaded.recipe.check)
    unmade = {row.variant for row in rows if row.metric == "failed"} - failed.keys()
    failed |= {
        variant: ["it broke a check when it was made; its recipe, run again, says which."]
        for variant in unmade
    }
    outcome = RunResult(found.path, rows, steps, checkpoints, [], pair, failed)
    pm = plugin_manager()
    pm.register(load_plugin(OBSERVERS, "report")[0])
    pm.hook.run_ended(
        loaded=loaded,
        outcome=outcome,
        out=StepOutput(ArtifactStore(found.path.resolve().parent), found.ledger, "report"),
        log=stderr_console().print,
    )
    where = found.path / "report.html"
    print(json.dumps({"run": found.path.name, "report": str(where)}) if as_json else where)


def _elsewhere(run: RunFolder, record: StepRecord) -> bool:
    return any(not run.owns(file.path) for file in record.files)


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verbs."""
    return [runs, show, diff, rm, report]
