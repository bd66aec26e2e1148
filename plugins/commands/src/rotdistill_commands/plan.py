"""The verb `plan`: what a run would make or reuse, and what each step needs.

Everything comes from configs, file headers and ledgers; no weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from rich.table import Column

from rotdistill_commands._arguments import log
from rotdistill_commands._cluster import cluster_document, cluster_notes, cluster_table
from rotdistill_core import hookimpl
from rotdistill_core.checkpoint.open import without_downloads
from rotdistill_core.errors import ModelNotAvailable
from rotdistill_core.planning.calibration import calibrated
from rotdistill_core.planning.cluster import cluster_of
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import (
    Plan,
    PlanLine,
    build_plan,
    format_bytes,
    free_disk,
)
from rotdistill_core.planning.times import added_seconds, time_in_words
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.terminal import (
    Json,
    Recalibrate,
    RecipePath,
    Sets,
    WideTable,
    literal,
    print_json,
    stdout_console,
)


def plan(  # noqa: PLR0913  each is an option of the command line
    path: RecipePath,
    sets: Sets = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Plan for `run --fresh`, which reuses nothing.")
    ] = False,
    short: Annotated[
        bool, typer.Option("--short", help="Print only one line, on stderr, as `run` does first.")
    ] = False,
    nodes: Annotated[
        int | None, typer.Option("--nodes", help="Number of machines, all alike.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", help="Number of GPUs in each machine; each has a process of its own."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Kind of these GPUs: h100, h200, a100, l40s, rtx4090, or here."),
    ] = None,
    recalibrate: Recalibrate = False,
    as_json: Json = False,
) -> None:
    """Estimate memory, disk and time of a run, and list the results that it reuses.

    With --nodes, --gpus or --gpu, other machines take the place of this one. The free space
    on their disk is not known, so it is not compared with what the run writes.

    The first plan measures how fast this machine is, for about ten seconds, and keeps that.

    Exits with code 3 if the machine is too small.

    Examples:

      rotdistill plan recipes/tour_guide.toml --set chop.layers=24 --json

      rotdistill plan recipes/tour_guide.toml --nodes 4 --gpus 8 --gpu h100
    """
    here = replace(this_machine(RUNS_FOLDER), profile=calibrated(log, recalibrate))
    cluster = None
    if (nodes, gpus, gpu) != (None, None, None):
        cluster = cluster_of(nodes, gpus, gpu, here)
    loaded = load_recipe(path, sets or [])
    for note in loaded.notes:
        log(note)
    try:
        machine = cluster.machine(here) if cluster else here
        with without_downloads():
            planned = build_plan(loaded, RUNS_FOLDER, machine, fresh, log)
    except ModelNotAvailable as error:
        # `run` can go on without a plan, because it downloads the model.
        if not short:
            raise
        log(f"plan: {error}")
        return
    if as_json:
        more = {"cluster": cluster_document(planned, cluster)} if cluster else {}
        print_json({**_document(planned), **more})
    elif short:
        log(planned.summary)
    else:
        console = stdout_console()
        console.print(_table(planned))
        if cluster:
            console.print(cluster_table(planned, cluster))
        for line in (*_notes(planned), *(cluster_notes(cluster) if cluster else ())):
            console.print(literal(line), soft_wrap=True)
    planned.require_resources(path)


def _document(planned: Plan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    totals, texts = planned.totals, planned.texts
    models = {
        role: {
            "parameters": info.shape.parameters(),
            "bytes": info.shape.bytes,
            "source": str(info.source),
        }
        for role, info in planned.models.items()
    }
    return {
        "run_dir": str(planned.folder),
        "steps": [asdict(line) for line in planned.lines],
        "models": models,
        "texts": {
            "rows": texts.rows,
            "texts": texts.texts,
            "own answers": texts.own_answers,
            "lessons": texts.lessons,
            "shared prompt": texts.prefix,
        },
        **asdict(totals),
        "loading": planned.loading,
        "time": planned.time,
        "machine": asdict(planned.machine),
        "shortfalls": planned.shortfalls,
    }


def _notes(planned: Plan) -> Iterator[str]:
    """Yield the lines below the table."""
    for role, info in planned.models.items():
        billions = info.shape.parameters() / 1e9
        size = format_bytes(info.shape.bytes)
        yield f"{role}: {billions:.2f} billion parameters, {size}, according to {info.source}"
    yield f"texts: {planned.texts.total} tokens; {planned.counted}"
    yield from planned.notes
    totals, machine = planned.totals, planned.machine
    needs = [
        f"peak memory about {format_bytes(totals.ram_bytes)}, {format_bytes(machine.ram)} are free"
    ]
    for gpu, needed in totals.by_gpu.items():
        there = format_bytes(machine.gpu_memory(gpu))
        needs.append(f"{gpu} about {format_bytes(needed)}, {there} are there")
    needs.append(f"disk about {format_bytes(totals.disk_bytes)}{free_disk(machine)}")
    yield "; ".join([*needs, planned.time])
    yield from planned.time_notes


def _table(planned: Plan) -> WideTable:
    """Return the plan as a table. Results of one step with one fate share a row."""
    has_gpu = any(line.gpu_bytes for line in planned.lines)
    table = WideTable(
        "step",
        Column("variants", overflow="fold"),
        "memory",
        *(["GPU"] if has_gpu else []),
        "disk",
        Column("time", overflow="fold"),
        Column("result", overflow="fold"),
        title=literal(planned.folder),
    )
    groups: dict[tuple[str, bool, str], list[PlanLine]] = {}
    for line in planned.lines:
        groups.setdefault((line.id, line.reused, line.why), []).append(line)
    for lines in groups.values():
        table.add_row(*_cells(lines, has_gpu))
    return table


def _cells(lines: list[PlanLine], has_gpu: bool) -> list[str]:
    """Return the row of results of one step with one fate."""
    first = lines[0]
    step = first.id if first.use in ("", first.id) else f"{first.id} ({first.use})"
    variants = dict.fromkeys(variant for line in lines for variant in line.variants)
    sizes = [max(line.ram_bytes for line in lines)]
    if has_gpu:
        sizes.append(max(line.gpu_bytes for line in lines))
    sizes.append(sum(line.disk_bytes for line in lines))
    if first.reused:
        took = added_seconds(line.reused_seconds for line in lines)
        time = "" if took is None else f"[dim]({time_in_words(took)})[/]"
        result = f"[dim]reused: {literal(first.why)}[/]"
    else:
        takes = added_seconds(line.seconds for line in lines)
        time = "not known" if takes is None else time_in_words(takes)
        note = f"; {literal(first.note)}" if first.note else ""
        result = f"to do: {literal(first.why)}{note}"
    return [
        literal(step),
        literal(", ".join(variants)),
        *(format_bytes(size) if size else "" for size in sizes),
        time,
        result,
    ]


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verb."""
    return [plan]
