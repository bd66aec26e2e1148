"""`extends`: a recipe that changes another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REPLACED_WHOLE = ("variants",)
"""Tables that a child replaces whole; it merges the others with its parent's, key by key."""


ENGINE = "engine"
"""The table whose keys are options of what its `use` names, as those of a step are."""


@dataclass(frozen=True)
class Inherited:
    """What the tables of a recipe no longer show about the recipe that it extends."""

    toggles: frozenset[str] = frozenset()
    """Ids of the steps that its variants name."""
    mixed_steps: frozenset[str] = frozenset()
    """Ids of the steps that have options of both recipes."""


def inherited(
    child_steps: Sequence[Mapping[str, Any]],
    parent: Mapping[str, Any],
    parent_steps: Sequence[Mapping[str, Any]],
) -> Inherited:
    """Return what a recipe takes over without showing it, given its parent and both lists of
    steps."""
    by_id = _by_id(parent_steps)
    mixed = {
        str(step_id(table))
        for table in child_steps
        for changed in by_id.get(str(step_id(table)), [])[:1]
        if table.get("inherit") is not False and _same_method(table, changed)
    }
    return Inherited(named_steps(parent), frozenset(mixed))


def step_id(table: Mapping[str, Any]) -> Any:
    """Return the id of a step: as written, else the name of its method."""
    return table.get("id", table.get("use"))


def named_steps(tables: Mapping[str, Any]) -> frozenset[str]:
    """Return the ids of the steps that variants name: the toggles of a recipe."""
    variants = tables.get("variants")
    lists = list(variants.values()) if isinstance(variants, dict) else []
    # A mistake in the table is reported when it is validated.
    return frozenset(
        name
        for names in lists
        if isinstance(names, list)
        for name in names
        if isinstance(name, str)
    )


def extended(child: Mapping[str, Any], parent: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of a recipe that extends another one, steps apart.

    Tables merge by key, one level deep: a key's value is taken whole, whether it is a number, a
    list or a table.
    """
    merged = {**parent, **child}
    for key in parent.keys() & child.keys() - {*REPLACED_WHOLE}:
        own, other = child[key], parent[key]
        if isinstance(other, dict) and isinstance(own, dict):
            # Options of one engine mean nothing to another.
            merged[key] = own if key == ENGINE and not _same_method(own, other) else other | own
    return merged


def extended_steps(
    child: Sequence[Mapping[str, Any]], parent: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the steps of a recipe that extends another one.

    A step with the id of a parent's step changes that step in its place; see `_extended_step`. A
    step with another id is added at the end. Two steps of one id in one recipe stay two, so that
    they are reported.
    """
    by_id = _by_id(parent)
    for name, tables in _by_id(child).items():
        parents = by_id.get(name)
        changed = parents[0] if parents else None
        by_id[name] = [_extended_step(table, changed) for table in tables]
    return [dict(table) for same_id in by_id.values() for table in same_id]


def _extended_step(table: Mapping[str, Any], parent: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a child's step with the options of the parent's step of its id.

    Options merge by key, and each value is taken whole, a table too. A step with another `use`
    takes over nothing, because options of one method mean nothing to another. A step with
    `inherit = false` takes over the method alone: TOML has no value for "not set".

    Where there is nothing to inherit, or it is no boolean, `inherit` stays in the table and is
    reported as unknown.
    """
    if parent is None:
        return table
    own = dict(table)
    inherit = own.pop("inherit", True)
    if not isinstance(inherit, bool):
        return {**parent, **table}
    if not _same_method(own, parent):
        return own
    return {**(parent if inherit else {"use": parent.get("use")}), **own}


def _same_method(table: Mapping[str, Any], parent: Mapping[str, Any]) -> bool:
    return bool(table.get("use", parent.get("use")) == parent.get("use"))


def _by_id(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    by_id: dict[str, list[Mapping[str, Any]]] = {}
    for table in steps:
        by_id.setdefault(str(step_id(table)), []).append(table)
    return by_id
