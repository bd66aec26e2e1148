"""What a case says: one row for each thing that was tried, and what every call has to keep to."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.child import Ended
from tests.faults.workshop import Workshop

BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn what follows around."""
MOST_PRINTED = 20_000
"""Characters that a call which ends with an error may print."""
SLOW_SECONDS = 40.0
"""A refusal that takes longer, on a busy machine, is no refusal."""


@dataclass(frozen=True)
class Row:
    """One thing that was tried."""

    kind: str
    """The class of the fault."""
    name: str
    wrong: str
    """What is wrong; empty if it is right."""
    code: int | None = None
    words: str = ""
    """The end of what was printed."""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """Something to try. It may give several rows."""

    kind: str
    name: str
    trial: Callable[[Workshop, Path], Sequence[Row]]
    """Takes the workshop and an empty folder."""


def row(kind: str, name: str, ended: Ended, *faults: str) -> Row:
    """Return the row of a call; `faults` are what is wrong, empty ones aside."""
    wrong = "; ".join(fault for fault in faults if fault)
    return Row(kind, name, wrong, ended.code, ended.text[-600:] if wrong else "")


def unsound(ended: Ended, codes: Collection[int]) -> str:
    """Return what is wrong with how a call ended: code, words, time; empty if nothing is.

    Args:
        ended: the call.
        codes: the exit codes that are right.
    """
    if ended.hung:
        return f"no end after {ended.seconds:.0f} s"
    faults = []
    if ended.code not in codes:
        faults.append(f"exit code {ended.code}, not {' or '.join(map(str, sorted(codes)))}")
    if "Traceback (most recent" in ended.text:
        faults.append("a traceback")
    if "should not happen" in ended.text or "unexpected " in ended.err[:40]:
        faults.append("told as an error of ours")
    raw = sorted({f"U+{ord(c):04X}" for c in ended.text if _is_raw(c)})
    if raw:
        faults.append(f"raw control characters: {', '.join(raw)}")
    if ended.code and len(ended.text) > MOST_PRINTED:
        faults.append(f"{len(ended.text)} characters of message")
    if ended.code in (2, 3, 4) and not ended.text.strip():
        faults.append("no message")
    if ended.code and ended.seconds > SLOW_SECONDS:
        faults.append(f"refused after {ended.seconds:.0f} s")
    return "; ".join(faults)


def _is_raw(character: str) -> bool:
    return character not in "\n\t" and (
        unicodedata.category(character) in ("Cc", "Cs") or character in BIDI
    )
