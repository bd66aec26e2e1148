"""The lines of a ledger as bytes: each has a mark of its own, and names the lines before it.

A line is a JSON object whose last key is `mark`, the hash of all bytes before that key. `after`
holds the marks of the lines that no line had named when this one was written: one line, or several
if two processes appended at once. So an edited line has a wrong mark, and a line that is lost or
moved is missing in the `after` of a later one. A line that no later one names can be lost unseen:
only the last of the file is.

Lines of processes that a launcher restarts have `launch` and `generation` too: each restart is a
generation, and one that has been replaced commits nothing more.

Lines of schema 3 have no `after`. They count, and their marks are checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from rotdistill_core.store.hashing import digest
from rotdistill_core.store.records import LedgerRecord, record_as_json, record_from_json

SCHEMA = 4
"""Version of the lines. Lines of other versions commit nothing, apart from `UNCHAINED`."""
UNCHAINED = 3
"""The version before lines named those before them."""
MARK_LENGTH = 16
MEND = "mend"
"""Kind of a line that names damage which has been told."""
_SEPARATOR = b', "mark": "'
_ABOUT_THE_LINE = ("schema", "after", "launch", "generation", "mark")


@dataclass(frozen=True)
class Generation:
    """Which processes of a launch write: those of the first start, or of a restart."""

    launch: str
    """Names the launch; no other launch has this name."""
    number: int
    """How many generations of this launch had written to the ledger before."""


@dataclass(frozen=True)
class LedgerFault:
    """A line that counts for nothing, or a place where one is missing."""

    line: int
    """Number of the line, from 1."""
    reason: str
    """What is wrong, as the end of a sentence about the line."""
    id: str
    """By this a later line says that the fault has been told."""
    is_gap: bool = False
    """Whether the line itself is sound, and one before it is missing."""

    def __str__(self) -> str:
        """Return the fault in words."""
        return f"line {self.line} {self.reason}"


class Entry(NamedTuple):
    """A line that counts."""

    record: LedgerRecord
    digest: str
    """Hash of its content; see `content_digest`."""


class Chain:
    """What the lines read so far say about each other."""

    def __init__(self) -> None:
        self.tips: list[str] = []
        """Marks of the lines that no line names yet."""
        self.is_chained = False
        """Whether a line that counts names others."""
        self.generations: dict[str, int] = {}
        """Launch -> the newest generation that wrote a line."""
        self._lines = 0
        self._marks: set[str] = set()
        self._named: set[str] = set()
        self._faults: list[LedgerFault] = []
        self._mended: set[str] = set()

    @property
    def faults(self) -> list[LedgerFault]:
        """The faults that no later line mends."""
        return [fault for fault in self._faults if fault.id not in self._mended]

    def read(self, raw: bytes) -> Entry | None:
        """Take the next line, without its newline; return its record.

        A line that is damaged, mends others or has been read already has none.
        """
        self._lines += 1
        try:
            content, mark, after = _parsed(raw)
            record = None if content.get("kind") == MEND else _record(content)
        except _BadLine as fault:
            self._add(str(fault), hashlib.sha256(raw).hexdigest())
            return None
        if after is None:  # a line of an older version stands after all lines before it
            after = self.tips
        else:
            self.is_chained = True
            if mark in self._marks:
                return None
            self._note_generation(raw)
        for lost in [each for each in after if each not in self._marks]:
            self._add("follows a line that is missing, damaged or moved", lost, is_gap=True)
        self._marks.add(mark)
        self._named.update(after)
        self.tips = [tip for tip in self.tips if tip not in self._named and tip != mark]
        if mark not in self._named:
            self.tips.append(mark)
        if record is None:
            self._mended.update(map(str, content.get("faults", ())))
            return None
        return Entry(record, digest(content))

    def _note_generation(self, raw: bytes) -> None:
        if b'"generation": ' not in raw:  # most lines; some are long
            return
        values = json.loads(raw)
        launch, number = values.get("launch"), values.get("generation")
        if isinstance(launch, str) and isinstance(number, int):
            self.generations[launch] = max(number, self.generations.get(launch, 0))

    def _add(self, reason: str, identity: str, is_gap: bool = False) -> None:
        """Note a fault of the line that was read last. Its number makes its id unique."""
        identity = f"{self._lines}:{identity[:MARK_LENGTH]}"
        self._faults.append(LedgerFault(self._lines, reason, identity, is_gap))

    def torn_fault(self, tail: bytes) -> LedgerFault:
        """Return the fault of bytes after the last newline."""
        return LedgerFault(
            self._lines + 1,
            "has no end: a crash tore it, or bytes are lost",
            hashlib.sha256(tail).hexdigest()[:MARK_LENGTH],
        )


def content_of(record: LedgerRecord) -> dict[str, Any]:
    """Return a record as the JSON values that will be read back.

    Going through JSON and back turns keys into strings and numbers into those that a later process
    will see.
    """
    read_back = record_from_json(json.loads(json.dumps(record_as_json(record))))
    content: dict[str, Any] = json.loads(json.dumps(record_as_json(read_back)))
    return content


def content_digest(record: LedgerRecord) -> str:
    """Return the hash of a record's content, by which an equal one is recognised."""
    return digest(content_of(record))


def mending(faults: Iterable[LedgerFault]) -> dict[str, Any]:
    """Return the content of a line that says of faults that they have been told."""
    return {"kind": MEND, "faults": [fault.id for fault in faults]}


def chained_lines(
    contents: Iterable[Mapping[str, Any]],
    tips: Sequence[str],
    generation: Generation | None = None,
) -> bytes:
    """Return lines, each after the one before it; the first comes after `tips`."""
    lines = []
    after = list(tips)
    writer: dict[str, Any] = {}
    if generation:
        writer = {"launch": generation.launch, "generation": generation.number}
    for content in contents:
        about = {"schema": SCHEMA, "after": after, **writer}
        text = json.dumps({**about, **content}, ensure_ascii=False)
        body = text.encode()[:-1]  # without the brace, which comes after the mark
        mark = _mark(body)
        lines.append(body + _SEPARATOR + mark.encode() + b'"}\n')
        after = [mark]
    return b"".join(lines)


class _BadLine(Exception):
    """What is wrong with a line."""


def _parsed(raw: bytes) -> tuple[dict[str, Any], str, list[str] | None]:
    """Return the content of a line, its mark, and the marks that it names.

    Raises:
        _BadLine: it commits nothing.
    """
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _BadLine("is not JSON") from error
    if not isinstance(values, dict) or not isinstance(values.get("mark"), str):
        raise _BadLine("has no mark")
    mark, schema = values["mark"], values.get("schema")
    content = {key: value for key, value in values.items() if key not in _ABOUT_THE_LINE}
    if raw == _with_mark(raw.rpartition(_SEPARATOR)[0]):
        after = values.get("after")
        if schema == SCHEMA and isinstance(after, list):
            return content, mark, [str(each) for each in after]
    elif not _is_unchained(values, raw):
        raise _BadLine("was changed: its mark is not that of its content")
    elif schema == UNCHAINED:
        return content, mark, None
    raise _BadLine(f"is of version {schema!r}, and this program reads {UNCHAINED} and {SCHEMA}")


def _record(content: Mapping[str, Any]) -> LedgerRecord:
    """Return the record of a line's content.

    Raises:
        _BadLine: it is none.
    """
    try:
        return record_from_json(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        message = f"is no record that this program knows ({where}: {error.errors()[0]['msg']})"
        raise _BadLine(message) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise _BadLine("is no record that this program knows") from error


def _mark(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:MARK_LENGTH]


def _with_mark(body: bytes) -> bytes:
    return body + _SEPARATOR + _mark(body).encode() + b'"}'


def _is_unchained(values: Mapping[str, Any], raw: bytes) -> bool:
    """Return whether a line is as older versions wrote it, with a mark that holds."""
    content = {key: value for key, value in values.items() if key != "mark"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    written = json.dumps({**content, "mark": values["mark"]}, ensure_ascii=False)
    try:
        return values["mark"] == _mark(text.encode()) and written.encode() == raw
    except UnicodeEncodeError:  # half a pair of surrogates
        return False
