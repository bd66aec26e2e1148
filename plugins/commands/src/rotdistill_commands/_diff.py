"""The differences between two runs: keys of their recipes, maps of their aligners, scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Column

from rotdistill_core.evaluation.intervals import Interval, estimates
from rotdistill_core.evaluation.rows import MetricRow, overall_figures
from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.linalg.maps import Map, Permutation, Rotation, restore_maps, tensor_of
from rotdistill_core.store.records import MapsRef
from rotdistill_core.terminal import WideTable, literal


@dataclass(frozen=True, kw_only=True)
class RecipeChange:
    """A key of the recipe with its values in both runs. Field names are keys of `--json`."""

    key: str
    one: Any
    two: Any


@dataclass(frozen=True, kw_only=True)
class MapChange:
    """The distance between two maps of one space. Field names are keys of `--json`.

    Maps of different kinds or shapes have no distance.
    """

    step: str
    space: str
    kind: str
    angle: float | None = None
    """Between rotations, degrees: `cos = <R₁, R₂> / (‖R₁‖ ‖R₂‖)`, 90 for unrelated ones."""
    changed: int | None = None
    """Assignments that differ between permutations."""
    size: int | None = None
    """Assignments in all."""
    distance: float | None = None
    """Between gauges: `‖G₁ - G₂‖ / ‖G₁‖`."""


@dataclass(frozen=True, kw_only=True)
class ScoreChange:
    """A figure of one variant in both runs. Field names are keys of `--json`."""

    variant: str
    metric: str
    one: float
    two: float
    low: float | None = None
    """Lower end of the change's 95 % interval over the texts of both runs; None without one."""
    high: float | None = None
    """Upper end."""


def recipe_changes(one: RunFolder, two: RunFolder) -> list[RecipeChange]:
    """Return the keys of the resolved recipes whose values differ."""
    first, second = dict(_leaves(one.recipe)), dict(_leaves(two.recipe))
    return [
        RecipeChange(key=key, one=first.get(key), two=second.get(key))
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a resolved recipe with their dotted keys; steps go by their id."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else name)
    elif key == "step":
        for step in value:
            yield from _leaves(step, f"step {step['id']}")
    else:
        yield key, value


def map_changes(one: RunFolder, two: RunFolder) -> list[MapChange]:
    """Compare the maps of steps with one id, in the first variant that has the step."""
    first, second = _stored_maps(one), _stored_maps(two)
    changes: list[MapChange] = []
    for step, stored in first.items():
        if step not in second or stored.key == second[step].key:
            continue
        A = restore_maps(stored.maps.as_dict(), one.path.resolve().parent)
        B = restore_maps(second[step].maps.as_dict(), two.path.resolve().parent)
        changes += [compare_maps(step, space, A[space], B[space]) for space in A if space in B]
    return changes


class StoredMaps(NamedTuple):
    """The maps of one step on disk."""

    key: str
    """Key of the step."""
    maps: MapsRef


def _stored_maps(run: RunFolder) -> dict[str, StoredMaps]:
    """Return step id -> its maps, in the first variant that has the step."""
    stored: dict[str, StoredMaps] = {}
    for chain in reversed(run.chains().values()):
        for step, record in chain.items():
            if isinstance(record.result, MapsRef):
                stored[step] = StoredMaps(record.key, record.result)
    return stored


def compare_maps(step: str, space: str, one: Map, two: Map) -> MapChange:
    """Return the distance between two maps of one space."""
    kind, S, T = type(one).__name__, tensor_of(one), tensor_of(two)
    if type(one) is not type(two) or S.shape != T.shape:
        kinds = f"{kind} {list(S.shape)}, {type(two).__name__} {list(T.shape)}"
        return MapChange(step=step, space=space, kind=kinds)
    if isinstance(one, Permutation):
        changed = int((S != T).sum())
        return MapChange(step=step, space=space, kind=kind, changed=changed, size=len(S))
    S, T = S.double(), T.double()
    if isinstance(one, Rotation):
        cosine = float((S * T).sum() / (S.norm() * T.norm()))
        angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        return MapChange(step=step, space=space, kind=kind, angle=angle)
    distance = float((S - T).norm() / S.norm())
    return MapChange(step=step, space=space, kind=kind, distance=distance)


def score_changes(one: RunFolder, two: RunFolder) -> list[ScoreChange]:
    """Return the figures that both runs have.

    A figure that is a mean over texts has the interval of its change, by the paired bootstrap.
    """
    rows_one, rows_two = one.rows(), two.rows()
    first, second = overall_figures(rows_one), overall_figures(rows_two)
    changes = []
    for variant in first:
        if variant not in second:
            continue
        intervals = _change_intervals(rows_one, rows_two, variant)
        for metric, value in first[variant].items():
            if metric not in second[variant]:
                continue
            interval = intervals.get(metric)
            changes.append(
                ScoreChange(
                    variant=variant,
                    metric=metric,
                    one=value,
                    two=second[variant][metric],
                    low=interval.low if interval else None,
                    high=interval.high if interval else None,
                )
            )
    return changes


def _change_intervals(
    rows_one: Sequence[MetricRow], rows_two: Sequence[MetricRow], variant: str
) -> dict[str, Interval]:
    """Return metric -> interval of a variant's change between two runs, where there is one."""
    # Two variants of one run are compared by the same function, so the runs pose as variants.
    both = [row._replace(variant="one") for row in rows_one if row.variant == variant]
    both += [row._replace(variant="two") for row in rows_two if row.variant == variant]
    intervals = {}
    for metric, by_variant in estimates(both, "one").items():
        change = by_variant["two"].change if "two" in by_variant else None
        if change and not math.isnan(change.low):
            intervals[metric] = change
    return intervals


def recipe_table(changes: Sequence[RecipeChange]) -> WideTable | None:
    """Return the changed keys as a table; None if there are none."""
    if not changes:
        return None
    table = WideTable("recipe", Column("one", overflow="fold"), Column("two", overflow="fold"))
    for change in changes:
        table.add_row(literal(change.key), _value(change.one), _value(change.two))
    return table


def _value(value: Any) -> str:
    return "" if value is None else literal(value)


def map_table(changes: Sequence[MapChange]) -> WideTable | None:
    """Return the maps as a table, with the spaces of one kind in one row; None without maps."""
    if not changes:
        return None
    table = WideTable("maps", "spaces", "kind", "apart")
    groups: dict[tuple[str, str, str], list[MapChange]] = {}
    for change in changes:
        kind_of_space = change.space.partition(".")[0]
        groups.setdefault((change.step, kind_of_space, change.kind), []).append(change)
    for (step, kind_of_space, kind), group in groups.items():
        spaces = f"{kind_of_space} of {len(group)} places" if len(group) > 1 else group[0].space
        table.add_row(literal(step), literal(spaces), literal(kind), _distances(group))
    return table


def _distances(group: Sequence[MapChange]) -> str:
    """Return the smallest and the largest distance of maps of one kind."""
    angles = [change.angle for change in group if change.angle is not None]
    if len(angles) == 1:
        return f"{angles[0]:.2f}°"
    if angles:
        return f"{min(angles):.2f}° to {max(angles):.2f}°"
    if group[0].size is not None:
        changed = sum(change.changed or 0 for change in group)
        size = sum(change.size or 0 for change in group)
        return f"{changed} of {size} assignments differ"
    distances = [change.distance for change in group if change.distance is not None]
    if distances:
        return f"{min(distances):.2g} to {max(distances):.2g}, relative"
    return "not comparable"


def score_table(changes: Sequence[ScoreChange]) -> WideTable | None:
    """Return the figures that differ as a table; None if none does."""
    table = WideTable("figure", "one", "two", "change", "95 % interval")
    for change in changes:
        if change.one == change.two:
            continue
        has_interval = change.low is not None and change.high is not None
        interval = f"[{change.low:+.4g}, {change.high:+.4g}]" if has_interval else ""
        cells = (
            f"{change.variant}: {change.metric}",
            _figure(change.one),
            _figure(change.two),
            f"{change.two - change.one:+.4g}",
            interval,
        )
        table.add_row(*map(literal, cells))
    return table if table.row_count else None


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
