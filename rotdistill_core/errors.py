"""Errors that a user can act on, one class per exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails


class RotdistillError(Exception):
    """An unexpected failure inside rotdistill (exit code 1)."""

    exit_code = 1


class RecipeError(RotdistillError):
    """A recipe, option or command that must be edited (exit code 2). `problems` holds one paragraph each."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class PluginError(RotdistillError):
    """A plugin that is missing, broken, or clashes with another (exit code 2)."""

    exit_code = 2


class SetupError(RotdistillError):
    """The environment says no: missing or unsuitable model, memory, disk (exit code 3)."""

    exit_code = 3


class CheckFailed(RotdistillError):
    """A certificate, hash or quality gate that does not hold (exit code 4)."""

    exit_code = 4
    outcome: object = None
    """The finished run, where it is one of its variants that failed."""


class SingularError(RotdistillError):
    """Normal equations that have no solution at the ridge asked for."""


def suggest(word: str, words: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the closest of `words`; where none is close, all of them, or nothing where they are many."""
    close = difflib.get_close_matches(word, every := list(words), n=1, cutoff=0.5)
    return (
        f' Did you mean "{close[0]}"?'
        if close
        else f" There is: {', '.join(every)}."
        if 0 < len(every) <= 24
        else ""
    )


def format_validation_errors(
    error: ValidationError, document: object, known: Mapping[tuple[str, ...], Sequence[str]]
) -> list[str]:
    """Turn pydantic's errors into 'key.path: what is wrong, what was meant', one for each place in the document."""
    found: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in error.errors():
        found.setdefault(_path_of(detail, document), []).append(detail)
    problems: list[str] = []
    for path, details in found.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in found):
            continue  # one branch of a union fails here and another further in, which says more
        first, where = details[0], ".".join(path) or "options"
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(f"{where}: unknown key.{suggest(path[-1], known.get(path[:-1], ()))}")
        else:
            value = "" if first["type"] == "missing" else f" (it is {first['input']!r:.80})"
            messages = " or ".join(dict.fromkeys(detail["msg"] for detail in details))
            problems.append(f"{where}: {messages}{value}.")
    return problems


def _path_of(detail: ErrorDetails, document: Any) -> tuple[str, ...]:
    """Return the keys that lead to an error. What else pydantic puts into its location names branches of unions."""
    path: list[str] = []
    for part in detail["loc"]:
        is_key = isinstance(document, dict) and part in document
        is_index = isinstance(document, list) and isinstance(part, int)
        if is_key or is_index:
            path.append(str(part))
            document = document[part]
    return (*path, str(detail["loc"][-1])) if detail["type"] == "missing" else tuple(path)
