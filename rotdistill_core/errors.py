"""Errors that a user can act on, one class for each exit code."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

FEW = 24
"""So many names, or problems of one kind, or fewer, are listed in an error."""
LONGEST_NAME = 200
"""Characters of a name that an error shows. Nothing is called so; it is a mistake."""

LONGEST_PROBLEM = 2000
"""Characters of one problem that are shown."""


SHOWN_PROBLEMS = 8
"""So many problems of one checkpoint are listed in an error."""


class RotdistillError(Exception):
    """An unexpected failure inside rotdistill (exit code 1)."""

    exit_code = 1


class RecipeError(RotdistillError):
    """A recipe, option or command that must be edited (exit code 2).

    `problems` holds one paragraph for each mistake.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class PluginError(RotdistillError):
    """A plugin that is missing, is broken, or clashes with another (exit code 2)."""

    exit_code = 2


class SetupError(RotdistillError):
    """A missing or unsuitable model, too little memory, a full disk (exit code 3)."""

    exit_code = 3


class ModelNotAvailable(SetupError):
    """A model that is not here, where nothing may be downloaded (exit code 3).

    Args:
        model: how the recipe names it.
        found: what was looked for in vain; by default only that it is not here.
    """

    def __init__(self, model: str, found: str = "it is not here.") -> None:
        super().__init__(f"{model}: {found}")
        self.model = model


class CheckFailed(RotdistillError):
    """A certificate, hash or quality gate that does not hold (exit code 4).

    A finished run whose variants fail raises `rotdistill_core.RunFailed`, which has the result.
    """

    exit_code = 4


class SingularError(RotdistillError):
    """Normal equations that have no solution at the ridge asked for."""


def shortened(problem: str) -> str:
    """Return a problem with its middle left out, if it is longer than two of `LONGEST_PROBLEM`.

    Names of tensors and texts of others may have any length; what to do stands at the end.
    """
    left_out = len(problem) - 2 * LONGEST_PROBLEM
    if left_out <= 0:
        return problem
    start, end = problem[:LONGEST_PROBLEM], problem[-LONGEST_PROBLEM:]
    return f"{start} [... {left_out} characters ...] {end}"


def listed(problems: Sequence[str]) -> str:
    """Return the first `SHOWN_PROBLEMS` problems in one line, and how many more there are."""
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    return f"{shown}; and {more} more" if more > 0 else shown


def suggest(word: str, words: Iterable[str]) -> str:
    """Return a hint that follows an unknown word: ' Did you mean "x"?' with the closest of `words`.

    If none is close, the hint lists all words; if they are many, it is empty.
    """
    if len(word) > LONGEST_NAME:
        return ""
    known = list(words)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" There is: {', '.join(known)}." if 0 < len(known) <= FEW else ""


def first_few(problems: Iterable[str]) -> list[str]:
    """Return the first problems of many alike, and a line that there are more.

    A generator is not asked for the others, so the suggestions in them cost nothing.
    """
    listed = [f"{problem:.{LONGEST_PROBLEM}}" for problem in islice(problems, FEW + 1)]
    return listed if len(listed) <= FEW else [*listed[:FEW], "there are more problems like these."]


def _nowhere(_: Sequence[str]) -> str:
    return ""


def format_validation_errors(
    error: ValidationError,
    document: object,
    known: Mapping[tuple[str, ...], Sequence[str]],
    at: Callable[[Sequence[str]], str] = _nowhere,
) -> list[str]:
    """Turn pydantic's errors into one sentence for each place in a document.

    Args:
        error: what pydantic raised.
        document: the tables that it validated.
        known: path of a table -> the keys that it may have, for suggestions.
        at: path of a key -> the beginning of a sentence about it, such as `line 12: `.

    Returns:
        `key.path: what is wrong`, with the nearest known key or the value found there.
    """
    by_path: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in error.errors():
        by_path.setdefault(_path_of(detail, document), []).append(detail)
    # One branch of a union may fail at a path, and another further in, which says more.
    outer = {path[:k] for path in by_path for k in range(len(path))}
    return first_few(
        f"{at(path)}{_problem(path, details, known)}"
        for path, details in by_path.items()
        if path not in outer
    )


def _problem(
    path: tuple[str, ...],
    details: Sequence[ErrorDetails],
    known: Mapping[tuple[str, ...], Sequence[str]],
) -> str:
    """Return the sentence about what is wrong at a path."""
    first = details[0]
    where = f"{'.'.join(path) or 'options':.{LONGEST_NAME}}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: unknown key.{suggest(path[-1], known.get(path[:-1], ()))}"
    value = "" if first["type"] == "missing" else f" (it is {first['input']!r:.80})"
    # What a validator of ours says is a sentence without pydantic's word for it.
    texts = (detail["msg"].removeprefix("Value error, ") for detail in details)
    messages = " or ".join(dict.fromkeys(texts))
    return f"{where}: {messages}{value}."


def _path_of(detail: ErrorDetails, document: Any) -> tuple[str, ...]:
    """Return the keys that lead to an error.

    Pydantic's location also names branches of unions, which are no keys of the document.
    """
    path: list[str] = []
    for part in detail["loc"]:
        is_key = isinstance(document, dict) and part in document
        is_index = isinstance(document, list) and isinstance(part, int)
        if is_key or is_index:
            path.append(str(part))
            document = document[part]
    if detail["type"] == "missing":
        return (*path, str(detail["loc"][-1]))
    return tuple(path)
