"""Which line of a recipe a key is on, for messages: `tomllib` does not keep that.

A key is found by trial. Where its name occurs in the text, another one takes its place; the
occurrence after which the parsed document has that other name instead is the key. So comments,
texts of several lines, quoted and dotted keys and inline tables need no rules here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from rotdistill_core.recipe.extends import step_id

MAX_LETTERS = 30_000
"""Longest text that is searched. Each trial parses all of it."""
MAX_TRIALS = 10
STAND_IN = "rotdistill-stand-in"
"""The other name."""


class _Absent:
    """What a document has where a key is not: equal to nothing that it may hold."""


ABSENT = _Absent()


@dataclass(frozen=True)
class Source:
    """A TOML file that a recipe is made from. It has been parsed before: it is valid."""

    path: Path
    text: str

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The document as it was written, before overrides."""
        return tomllib.loads(self.text)

    def line_of(self, keys: Sequence[str]) -> int | None:
        """Return the line of a key, or None where it cannot be told.

        Args:
            keys: path of the key in the document; places in lists as digits.
        """
        # A place in a list is on the line of the key that has the list.
        while keys and not isinstance(value_at(self.tables, keys[:-1]), dict):
            keys = keys[:-1]
        if not keys or len(self.text) > MAX_LETTERS or STAND_IN in self.text:
            return None
        name = re.compile(rf"(?<![\w-]){re.escape(keys[-1])}(?![\w-])")
        for found in islice(name.finditer(self.text), MAX_TRIALS):
            before, after = self.text[: found.start()], self.text[found.end() :]
            try:
                tried = tomllib.loads(f"{before}{STAND_IN}{after}")
            except (ValueError, RecursionError):
                continue
            if value_at(tried, (*keys[:-1], STAND_IN)) is not ABSENT:
                return before.count("\n") + 1
        return None


@dataclass(frozen=True)
class Places:
    """Where the keys of a recipe are written: in its own file, or in that which it extends."""

    own: Source
    extended: Source | None = None

    def of_key(self, tables: Mapping[str, Any], keys: Sequence[str]) -> str:
        """Return the beginning of a message about a key: `line 12: `, or nothing.

        Args:
            tables: the document after `extends` and overrides. A key that no file has as it is
                there has no line: an override has set it.
            keys: path of the key. Of one that is missing the line is that of its table.
        """
        while keys and value_at(tables, keys) is ABSENT:
            keys = keys[:-1]
        return self._at(value_at(tables, keys), dict.fromkeys(self._sources, keys))

    def of_option(self, number: int, table: Mapping[str, Any], keys: Sequence[str]) -> str:
        """Return the same for an option of a step; without one, of its method.

        Args:
            number: place of the step in the recipe, from 0.
            table: the step after `extends` and overrides.
            keys: path of the option in the step.
        """
        while keys and value_at(table, keys) is ABSENT:
            keys = keys[:-1]
        keys = keys or ("use",)
        paths: dict[Source, Sequence[str]] = {}
        for source in self._sources:
            ids = [step_id(each) for each in source.tables.get("step", [])]
            wanted = step_id(table)
            if wanted in ids:
                same = number < len(ids) and ids[number] == wanted
                place = number if same else ids.index(wanted)
                paths[source] = ("step", str(place), *keys)
        return self._at(value_at(table, keys), paths)

    @property
    def _sources(self) -> list[Source]:
        return [self.own, *([self.extended] if self.extended else [])]

    def _at(self, value: object, paths: Mapping[Source, Sequence[str]]) -> str:
        """Return where the first source has this value at its path."""
        for source, keys in paths.items():
            if keys and value_at(source.tables, keys) == value:
                line = source.line_of(keys)
                where = "" if source is self.own else f"in {source.path}, "
                return f"{where}line {line}: " if line else ""
        return ""


def value_at(document: object, keys: Sequence[str]) -> Any:
    """Return what a document has at a path of keys and places in lists, or `ABSENT`."""
    for key in keys:
        if isinstance(document, Mapping) and key in document:
            document = document[key]
        elif isinstance(document, list) and key.isdecimal() and int(key) < len(document):
            document = document[int(key)]
        else:
            return ABSENT
    return document
