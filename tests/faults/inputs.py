"""One hostile input: how it changes a sound workspace, and how calls on it may end."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFUSED = frozenset({2, 3, 4})
ANY = frozenset({0, 2, 3, 4})
CHECK_RECIPE = ("check", "trial.toml")
PLAN = ("plan", "trial.toml")
RUN = ("run", "trial.toml", "--no-plan")


@dataclass(frozen=True)
class Input:
    """A hostile input."""

    kind: str
    """Its class in the table."""
    name: str
    change: Callable[[Path], object]
    """Changes a workspace with `model/`, `texts/` and `trial.toml`."""
    codes: Collection[int]
    """The exit codes that are right."""
    calls: Sequence[Sequence[str]] = (PLAN, RUN)
    """What is called, one after the other."""
    early: bool = False
    """Whether the first call has to refuse what the last one refuses."""
    tells: str = ""
    """What a refusal has to say."""


def edit_json(path: Path, drop: Sequence[str] = (), **changes: Any) -> None:
    """Change keys of a JSON document."""
    document = json.loads(path.read_text(encoding="utf-8"))
    document.update(changes)
    for key in drop:
        document.pop(key, None)
    path.write_text(json.dumps(document), encoding="utf-8")


def replace_in(path: Path, old: str, new: str) -> None:
    """Replace words of a text file; they must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old} is not in {path}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def write_bytes(work: Path, file: str, data: bytes) -> None:
    """Write a file of a workspace."""
    (work / file).parent.mkdir(parents=True, exist_ok=True)
    (work / file).write_bytes(data)
