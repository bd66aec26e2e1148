"""Rows of the files that hold texts, whatever their form: where each stands, and its values."""

from __future__ import annotations

import difflib
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
GUESSED = sorted(KEYS - {"id", "country", "kind"})
"""Columns that a misspelt name may stand for: not the shortest, nor those that decide nothing."""
LIKENESS = 0.8
"""Similarity of a misspelt name to the right one: `anwser` has 0.83."""
LONGEST_GUESSED = 40
"""Characters of a name beyond which it is no misspelling."""


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


def misspelt(others: Iterable[str], has: Iterable[str]) -> dict[str, str]:
    """Return columns that are not read -> the column that each seems to be meant for.

    Args:
        others: columns of a row that are not read.
        has: columns that it has; what is there is not looked for under another name.
    """
    lacking = [key for key in GUESSED if key not in {*has}]
    found = {}
    for name in others:
        if len(name) <= LONGEST_GUESSED:
            word = name.strip().lower()
            for key in difflib.get_close_matches(word, lacking, n=1, cutoff=LIKENESS):
                found[name] = key
    return found
