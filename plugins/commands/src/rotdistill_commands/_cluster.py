"""A plan for several machines: what each process needs, and what goes between machines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rotdistill_core.planning.cluster import Cluster
from rotdistill_core.planning.cost import Cost
from rotdistill_core.planning.plan import Plan, PlanLine, format_bytes
from rotdistill_core.terminal import WideTable, literal


def cluster_document(planned: Plan, cluster: Cluster) -> dict[str, Any]:
    """Return the plan for several machines as JSON values."""
    steps = [_step(line, cost, cluster) for line, cost in _todo(planned)]
    return {
        "nodes": cluster.nodes,
        "gpus": cluster.gpus,
        "gpu": cluster.name,
        "ranks": cluster.ranks,
        "constants": cluster.constants(),
        "steps": steps,
        "seconds": sum(step["seconds"] for step in steps),
        "traffic_bytes": sum(step["traffic_bytes"] for step in steps),
        "disk_bytes": planned.totals.disk_bytes,
    }


def cluster_table(planned: Plan, cluster: Cluster) -> WideTable:
    """Return the plan for several machines as a table, a row for each result that is made."""
    table = WideTable(
        "step",
        "seconds",
        "dealt",
        "memory of a process",
        "between machines",
        title=literal(f"{cluster.nodes} x {cluster.gpus} {cluster.name}"),
    )
    for line, cost in _todo(planned):
        step = _step(line, cost, cluster)
        table.add_row(
            literal(f"{line.id} {', '.join(line.variants)}".strip()),
            f"{step['seconds']:.3g}",
            f"{step['dealt']:.0%}",
            f"{format_bytes(step['gpu_bytes'])} + {format_bytes(step['ram_bytes'])} on the host",
            format_bytes(step["traffic_bytes"]) if step["traffic_bytes"] else "",
        )
    return table


def cluster_notes(cluster: Cluster) -> Iterator[str]:
    """Yield what the figures come from."""
    yield f"{cluster.name}: {', '.join(cluster.constants())}"
    yield (
        "What is not dealt is computed by the first process alone, while the others wait. The time "
        "of reading weights and of copies is not in it; traffic is what each machine sends."
    )


def _todo(planned: Plan) -> Iterator[tuple[PlanLine, Cost]]:
    """Yield the results that have to be made, each with its cost."""
    for line, cost in zip(planned.lines, planned.costs, strict=True):
        if not line.reused:
            yield line, cost


def _step(line: PlanLine, cost: Cost, cluster: Cluster) -> dict[str, Any]:
    """Return what one result takes."""
    return {
        "id": line.id,
        "variants": line.variants,
        "seconds": cluster.seconds(cost),
        "dealt": cost.dealt_operations / cost.operations if cost.operations else 0.0,
        "ram_bytes": line.ram_bytes,
        "gpu_bytes": line.gpu_bytes,
        "disk_bytes": line.disk_bytes,
        "traffic_bytes": round(cluster.traffic_bytes(cost)),
    }
