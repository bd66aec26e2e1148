"""Errors that a user can act on, one class per exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the closest of `words`, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
