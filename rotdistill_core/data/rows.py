"""Rows of the files that hold texts, whatever their form: where each stands, and its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KEYS = frozenset(
    {
        "id",
        "language",
        "topic",
        "place",
        "country",
        "kind",
        "system",
        "messages",
        "conversations",
        "question",
        "answer",
        "blurb",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "text",
        "facts",
        "falsehoods",
    }
)
"""Columns that are read. Tables have no others; of the rows of other forms, others are ignored."""


@dataclass(frozen=True)
class Row:
    """One row of a file of texts."""

    where: str
    """File and line, or file and row, for messages: `texts.tsv: line 3`."""
    values: Mapping[str, Any]
    """Column -> value; no null."""
    others: tuple[str, ...] = ()
    """Columns that are not read."""

    def has(self, *keys: str) -> bool:
        """Return whether the row has all of these columns."""
        return all(key in self.values for key in keys)


def known_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under the columns that are read, without nulls."""
    return {key: value for key, value in values.items() if key in KEYS and value is not None}


def ignored_keys(keys: Iterable[str]) -> list[str]:
    """Return those of some columns that are not read."""
    return sorted({*keys} - KEYS)
