"""What differs between two runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column

from rotdistill_core.evaluation.rows import overall_figures
from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.store.records import MapsRef
from rotdistill_core.terminal import WideTable

if TYPE_CHECKING:
    from rotdistill_core.linalg.maps import Map


TITLE_OF_MISSING = "-"


@dataclass(frozen=True)
class Changed:
    """A key of the recipe with its two values."""

    key: str
    one: Any
    two: Any


@dataclass(frozen=True)
class MapChange:
    """How far two maps of one space are apart.

    `angle` in degrees for rotations: `cos = <R₁, R₂> / (‖R₁‖ ‖R₂‖)`, 0 for equal ones and 90 for unrelated ones. `changed` of `size`
    assignments for permutations. `distance = ‖G₁ - G₂‖ / ‖G₁‖` for gauges.
    """

    step: str
    space: str
    kind: str
    angle: float | None = None
    changed: int | None = None
    size: int | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Score:
    """A figure of one variant in both runs, and its change with a 95 % interval over the texts of both; None where there are none."""

    variant: str
    metric: str
    one: float
    two: float
    low: float | None = None
    high: float | None = None


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a resolved recipe by their dotted key; steps go by their id."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else name)
    elif key == "step":
        for step in value:
            yield from flat(step, f"step {step['id']}")
    else:
        yield key, value


def recipe_changes(a: RunFolder, b: RunFolder) -> list[Changed]:
    """Return the keys whose values differ."""
    one, two = dict(flat(a.recipe)), dict(flat(b.recipe))
    keys = dict.fromkeys([*one, *two])
    return [
        Changed(key, one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)
    ]


def map_changes(a: RunFolder, b: RunFolder) -> list[MapChange]:
    """Compare what the steps of one id found in both runs, in the first variant that has them."""
    from rotdistill_core.linalg.maps import restore_maps

    found: list[MapChange] = []
    one, two = _stored_maps(a), _stored_maps(b)
    for step in [s for s in one if s in two]:
        (key_one, maps_one), (key_two, maps_two) = one[step], two[step]
        if key_one == key_two:
            continue
        A = restore_maps(maps_one.as_dict(), a.path.resolve().parent)
        B = restore_maps(maps_two.as_dict(), b.path.resolve().parent)
        found += [compare(step, space, A[space], B[space]) for space in A if space in B]
    return found


def _stored_maps(run: RunFolder) -> dict[str, tuple[str, MapsRef]]:
    """Return step id -> key and maps, of the first variant that has the step."""
    return {
        step: (record.key, record.result)
        for chain in reversed(run.chains().values())
        for step, record in chain.items()
        if isinstance(record.result, MapsRef)
    }


def compare(step: str, space: str, one: Map, two: Map) -> MapChange:
    """Return how far two maps of one space are apart; without figures where they have nothing in common."""
    from rotdistill_core.linalg.maps import Permutation, Rotation, tensor_of

    kind, S, T = type(one).__name__, tensor_of(one), tensor_of(two)
    if type(one) is not type(two) or S.shape != T.shape:
        return MapChange(
            step, space, f"{kind} {list(S.shape)}, {type(two).__name__} {list(T.shape)}"
        )
    if isinstance(one, Permutation):
        return MapChange(step, space, kind, changed=int((S != T).sum()), size=len(S))
    S, T = S.double(), T.double()
    if isinstance(one, Rotation):
        cosine = float((S * T).sum() / (S.norm() * T.norm()))
        return MapChange(
            step, space, kind, angle=math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        )
    return MapChange(step, space, kind, distance=float((S - T).norm() / S.norm()))


def score_changes(a: RunFolder, b: RunFolder) -> list[Score]:
    """Return every figure that both runs have, with the interval of its change where it is a mean over texts."""
    from rotdistill_core.evaluation.intervals import estimates

    one, two = a.rows(), b.rows()
    here, there = overall_figures(one), overall_figures(two)
    made = []
    for variant in [v for v in here if v in there]:
        both = [
            row._replace(variant=which)
            for which, rows in (("one", one), ("two", two))
            for row in rows
            if row.variant == variant
        ]
        found = estimates(both, "one")
        for metric in [m for m in here[variant] if m in there[variant]]:
            estimate = found.get(metric, {}).get("two")
            change = (
                estimate.change
                if estimate and estimate.change and not math.isnan(estimate.change.low)
                else None
            )
            ends = (change.low, change.high) if change else (None, None)
            made.append(
                Score(variant, metric, here[variant][metric], there[variant][metric], *ends)
            )
    return made


def recipe_table(found: list[Changed]) -> WideTable | None:
    """Return the changed keys for the terminal."""
    table = WideTable("recipe", Column("one", overflow="fold"), Column("two", overflow="fold"))
    for each in found:
        table.add_row(
            escape(each.key), *(escape("" if v is None else str(v)) for v in (each.one, each.two))
        )
    return table if found else None


def map_table(found: list[MapChange]) -> WideTable | None:
    """Return the maps for the terminal; a step's spaces of one kind in one line, with the least and the most."""
    table = WideTable("maps", "spaces", "kind", "apart")
    groups: dict[tuple[str, str, str], list[MapChange]] = {}
    for each in found:
        groups.setdefault((each.step, each.space.split(".")[0], each.kind), []).append(each)
    for (step, space, kind), some in groups.items():
        spaces = some[0].space if len(some) == 1 else f"{space} of {len(some)} places"
        table.add_row(escape(step), escape(spaces), escape(kind), _apart(some))
    return table if found else None


def _apart(some: list[MapChange]) -> str:
    if angles := [m.angle for m in some if m.angle is not None]:
        return (
            f"{min(angles):.2f}°"
            if len(angles) == 1
            else f"{min(angles):.2f}° to {max(angles):.2f}°"
        )
    if some[0].size is not None:
        return f"{sum(m.changed or 0 for m in some)} of {sum(m.size or 0 for m in some)} assignments differ"
    distances = [m.distance for m in some if m.distance is not None]
    return (
        f"{min(distances):.2g} to {max(distances):.2g}, relative"
        if distances
        else "not to be compared"
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def score_table(found: list[Score]) -> WideTable | None:
    """Return the figures that differ, for the terminal."""
    table = WideTable("figure", "one", "two", "change", "95 % interval")
    for s in [s for s in found if s.one != s.two]:
        ends = f"[{s.low:+.4g}, {s.high:+.4g}]" if s.low is not None else ""
        cells = (
            f"{s.variant}: {s.metric}",
            _figure(s.one),
            _figure(s.two),
            f"{s.two - s.one:+.4g}",
            ends,
        )
        table.add_row(*map(escape, cells))
    return table if table.row_count else None
