"""A new table as Python source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rotdistill_scaffold._lookup import QUERY_KEY, QueryHeads
from rotdistill_scaffold._new_table import NewTable

LONGEST = 68
"""Characters of a tuple that is not broken: it stands after a name, in lines of 100."""
STEP = "    "


def table_source(table: NewTable) -> str:
    """Return the call of `rope_decoder` as it stands in a module."""
    lines = [
        f'("{table.model_type}",)',
        *(f"{key}={literal(value, 1)}" for key, value in table.arguments.items()),
        "defaults=defaults",
    ]
    return "rope_decoder(\n" + "".join(f"{STEP}{line},\n" for line in lines) + ")"


def defaults_source(table: NewTable) -> str:
    """Return the values of the function `defaults`, one a line."""
    return "".join(
        f"{STEP}{STEP}{literal(key)}: {literal(value)},\n" for key, value in table.defaults.items()
    )


def config_name(table: NewTable) -> str:
    """Return the name of the parameter of the function `defaults`, which may not need it."""
    return "config" if QueryHeads in table.defaults.values() else "_"


def cases_source(table: NewTable) -> str:
    """Return the cases of the test, one a line."""
    return "".join(f"{STEP}{_on_one_line(case)},\n" for case in table.cases)


def literal(value: Any, depth: int = 0) -> str:
    """Return a value as Python with double quotes; what is long has a line for each item.

    Args:
        value: text, a number, a truth value, None, a tuple or a mapping.
        depth: how many times the line that it stands in is indented.
    """
    if value is QueryHeads:
        return f'config["{QUERY_KEY}"]'
    if isinstance(value, str):
        return json.dumps(value)
    if not isinstance(value, Mapping | tuple):
        return repr(value)
    line = _on_one_line(value)
    if len(line) <= LONGEST:
        return line
    inner = STEP * (depth + 1)
    if isinstance(value, Mapping):
        items = [f"{literal(key)}: {literal(v, depth + 1)}" for key, v in value.items()]
    else:
        items = [literal(item, depth + 1) for item in value]
    first, last = line[0], line[-1]
    return f"{first}\n" + "".join(f"{inner}{item},\n" for item in items) + STEP * depth + last


def _on_one_line(value: Mapping[str, Any] | tuple[Any, ...]) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(v)}" for key, v in value.items()) + "}"
    inner = ", ".join(map(literal, value))
    return f"({inner},)" if len(value) == 1 else f"({inner})"
