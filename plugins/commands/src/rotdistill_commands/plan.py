"""The verb `plan`: what a run would do, what each step needs, and what is there already, from configs and headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column

from rotdistill_core import hookimpl
from rotdistill_core.errors import SetupError
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.models import ModelNotAvailable
from rotdistill_core.planning.plan import Plan, PlanLine, build_plan, format_bytes, time_class
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.store.layout import RUNS_FOLDER
from rotdistill_core.terminal import (
    Json,
    RecipePath,
    Sets,
    WideTable,
    stderr_console,
    stdout_console,
)


def plan(
    path: RecipePath,
    sets: Sets = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="As for `run --fresh`: nothing is reused.")
    ] = False,
    short: Annotated[
        bool, typer.Option("--short", help="One line on stderr, as `run` begins with.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what `run` would do: what is there already and why not, memory, disk and time. Ends with 3 where this machine does not suffice.

    Examples:

      rotdistill plan recipes/tour_guide.toml

      rotdistill plan recipes/tour_guide.toml --set chop.layers=24 --json
    """
    loaded = load_recipe(path, sets or [])
    try:
        planned = build_plan(
            loaded,
            RUNS_FOLDER,
            this_machine(RUNS_FOLDER),
            fresh,
            lambda text: stderr_console().print(escape(text)),
        )
    except ModelNotAvailable as error:
        if not short:
            raise
        stderr_console().print(f"plan: {escape(str(error))}", soft_wrap=True)
        return
    seconds, reused = (
        sum(line.seconds for line in planned.todo),
        len(planned.lines) - len(planned.todo),
    )
    if as_json:
        print(json.dumps(_document(planned, seconds), ensure_ascii=False))
    elif short:
        need, here = planned.peak, planned.machine
        memory = (
            f"memory about {format_bytes(need['ram_bytes'])}, {format_bytes(here.ram)} are free"
            if planned.todo
            else "nothing to make"
        )
        stderr_console().print(f"plan: {reused} of {len(planned.lines)} results are there; {memory}; disk {format_bytes(need['disk_bytes'])}, "
                      f"{format_bytes(here.disk)} are free; takes {time_class(seconds)}", soft_wrap=True)  # fmt: skip
    else:
        console = stdout_console()
        console.print(_table(planned))
        for text in _notes(planned, seconds):
            console.print(escape(text), soft_wrap=True)
    if planned.shortfalls:
        raise SetupError(
            f"{path}: does not fit here: {'; '.join(planned.shortfalls)}. Nothing was loaded."
        )


def _document(planned: Plan, seconds: float) -> dict[str, Any]:
    models = {
        role: {"parameters": m.shape.parameters(), "bytes": m.shape.bytes, "source": str(m.source)}
        for role, m in planned.models.items()
    }
    texts = {
        "rows": planned.texts.rows,
        "texts": planned.texts.texts,
        "shared prompt": planned.texts.prefix,
    }
    about = {
        "run_dir": str(planned.folder),
        "steps": [vars(line) for line in planned.lines],
        "models": models,
        "texts": texts,
    }
    here = vars(planned.machine)
    return (
        about
        | planned.peak
        | {
            "seconds": seconds,
            "time": time_class(seconds),
            "machine": here,
            "shortfalls": planned.shortfalls,
        }
    )


def _notes(planned: Plan, seconds: float) -> Iterator[str]:
    """Yield the lines below the table."""
    for role, m in planned.models.items():
        yield f"{role}: {m.shape.parameters() / 1e9:.2f} billion parameters, {format_bytes(m.shape.bytes)}, according to {m.source}"
    yield (
        f"texts: {planned.texts.total} tokens in "
        + ", ".join(f"{n} {split}" for split, n in planned.texts.texts.items())
        + " texts"
    )
    need, here = planned.peak, planned.machine
    gpu = (
        f"; GPU about {format_bytes(need['gpu_bytes'])}, {format_bytes(here.gpu)} are there"
        if here.gpu
        else ""
    )
    yield (f"peak memory about {format_bytes(need['ram_bytes'])}, {format_bytes(here.ram)} are free{gpu}; "
           f"disk about {format_bytes(need['disk_bytes'])}, {format_bytes(here.disk)} are free; takes {time_class(seconds)}")  # fmt: skip


def _table(planned: Plan) -> WideTable:
    """Return the plan as a table for the terminal; results of one step with one fate share a line."""
    gpu = planned.machine.gpu
    who, fate = (Column(title, overflow="fold") for title in ("variants", "result"))
    table = WideTable(
        "step", who, "memory", *(["GPU"] if gpu else []), "disk", fate, title=str(planned.folder)
    )
    groups: dict[tuple[str, bool, str], list[PlanLine]] = {}
    for line in planned.lines:
        groups.setdefault((line.id, line.reused, line.why), []).append(line)
    for (name, reused, why), some in groups.items():
        sizes = [
            max(line.ram_bytes for line in some),
            *([max(line.gpu_bytes for line in some)] if gpu else []),
        ]
        cells = [
            format_bytes(size) if size else ""
            for size in (*sizes, sum(line.disk_bytes for line in some))
        ]
        names = ", ".join(dict.fromkeys(v for line in some for v in line.variants))
        took = time_class(sum(line.seconds for line in some))
        result = f"[dim]reused: {escape(why)}[/]" if reused else f"to do, {took}: {escape(why)}"
        step = name if some[0].use in ("", name) else f"{name} ({some[0].use})"
        table.add_row(escape(step), escape(names), *cells, result)
    return table


@hookimpl
def commands() -> list[Callable[..., None]]:
    """Offer the verb."""
    return [plan]
