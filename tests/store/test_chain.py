"""The lines of a ledger vouch for each other: edited, lost and moved lines are named."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.errors import SetupError
from rotdistill_core.store.chain import Chain, content_of
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import FileRecord, LedgerRecord, StartRecord

LINES = 6


def record(number: int) -> LedgerRecord:
    """Return records of two kinds in turn."""
    if number % 2:
        return FileRecord(key="k", name="größer", path=f"run/{number}", bytes=number, sha256="ab")
    return StartRecord(key=str(number), inputs={"seed": str(number)})


def write_ledger(folder: Path, count: int = LINES) -> Ledger:
    ledger = Ledger(folder)
    for number in range(count):
        ledger.append(record(number))
    assert ledger.faults == []
    return ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return write_ledger(tmp_path)


def lines_of(ledger: Ledger) -> list[bytes]:
    return ledger.path.read_bytes().splitlines(keepends=True)


def faults_of(data: bytes) -> list[str]:
    """Return the faults of a ledger of these bytes."""
    chain = Chain()
    *lines, tail = data.split(b"\n")
    for line in lines:
        chain.read(line)
    found = list(chain.faults) + ([chain.torn_fault(tail)] if tail else [])
    return [str(fault) for fault in found]


def test_a_flipped_bit_is_named_wherever_it_is(tmp_path: Path) -> None:
    data = write_ledger(tmp_path, 3).path.read_bytes()
    picker = random.Random(3)
    for place in range(len(data)):
        # every bit of the bytes that part lines, and one of each other byte
        bits = range(8) if data[place : place + 1] in (b"\n", b"{", b"}") else [picker.randrange(8)]
        for bit in bits:
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            line = data[:place].count(b"\n") + 1
            assert faults_of(bytes(changed))[0].startswith(f"line {line} "), (place, bit)


@pytest.mark.parametrize("number", range(LINES - 1))
def test_a_lost_line_is_seen_in_the_next(ledger: Ledger, number: int) -> None:
    lines = lines_of(ledger)
    del lines[number]
    assert faults_of(b"".join(lines)) == [
        f"line {number + 1} follows a line that is missing, damaged or moved"
    ]


def test_two_lost_lines_are_one_gap_and_the_last_is_not_seen(ledger: Ledger) -> None:
    lines = lines_of(ledger)
    assert len(faults_of(b"".join(lines[:2] + lines[4:]))) == 1
    assert faults_of(b"".join(lines[:-1])) == []


@pytest.mark.parametrize("number", range(LINES - 1))
def test_lines_that_changed_places_are_named(ledger: Ledger, number: int) -> None:
    lines = lines_of(ledger)
    lines[number], lines[number + 1] = lines[number + 1], lines[number]
    assert faults_of(b"".join(lines))


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "BOM": (lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]], "line 1 "),
    "CRLF": (lambda lines: [line.replace(b"\n", b"\r\n") for line in lines], "line 1 was changed"),
    "NUL": (lambda lines: [*lines[:2], b"\x00" * 20 + b"\n", *lines[2:]], "line 3 is not JSON"),
    "NUL at the end": (lambda lines: [*lines, b"\x00" * 20], "line 7 has no end"),
    "an empty line": (lambda lines: [*lines[:2], b"\n", *lines[2:]], "line 3 is not JSON"),
    "reversed": (lambda lines: lines[::-1], "line 1 follows"),
    "a space": (lambda lines: [lines[0].replace(b": ", b":  ", 1), *lines[1:]], "line 1 was"),
    "other order of keys": (
        lambda lines: [
            (json.dumps(dict(reversed(json.loads(lines[0]).items()))) + "\n").encode(),
            *lines[1:],
        ],
        "line 1 was changed",
    ),
    "no newline": (lambda lines: [*lines[:-1], lines[-1][:-1]], "line 6 has no end"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES.keys())
def test_other_damage_is_named(
    ledger: Ledger, change: Callable[[list[bytes]], list[bytes]], said: str
) -> None:
    assert faults_of(b"".join(change(lines_of(ledger))))[0].startswith(said)


def test_a_line_that_is_there_twice_counts_once(ledger: Ledger) -> None:
    lines = lines_of(ledger)
    ledger.path.write_bytes(b"".join([*lines, lines[1]]))
    assert len(Ledger(ledger.folder).records) == LINES
    assert Ledger(ledger.folder).faults == []


def forged(line: bytes, **changes: object) -> bytes:
    """Return a line with other content, and with a mark that fits it."""
    values = json.loads(line) | changes
    for key in [key for key, value in changes.items() if value is None]:
        del values[key]
    body = json.dumps(values, ensure_ascii=False).rpartition(', "mark": "')[0]
    return f'{body}, "mark": "{hashlib.sha256(body.encode()).hexdigest()[:16]}"}}\n'.encode()


@pytest.mark.parametrize(
    "changes",
    [{"bytes": None}, {"kind": "wish"}, {"bytes": "many"}, {"after": "nothing"}, {"schema": 9}],
    ids=["a field less", "kind", "type", "after", "version"],
)
def test_a_forged_line_is_named(ledger: Ledger, changes: dict[str, Any]) -> None:
    lines = lines_of(ledger)
    lines[1] = forged(lines[1], **changes)
    ledger.path.write_bytes(b"".join(lines))
    later = Ledger(ledger.folder)
    assert str(later.faults[0]).startswith("line 2 is ")
    assert len(later.records) == LINES - 1


def test_what_was_told_is_not_told_again(ledger: Ledger) -> None:
    lines = lines_of(ledger)
    damaged = [lines[0], b"noise\n", lines[1].replace(b"run", b"sun"), *lines[3:]]
    ledger.path.write_bytes(b"".join(damaged))
    resumed = Ledger(ledger.folder)
    assert len(resumed.faults) == 3
    resumed.append(record(7))
    assert len(Ledger(ledger.folder).faults) == 3  # a line more mends nothing
    resumed.mend()
    assert resumed.faults == []
    assert Ledger(ledger.folder).faults == []
    assert Ledger(ledger.folder).records == [record(n) for n in (0, 3, 4, 5, 7)]
    resumed.append(record(8))
    new = lines_of(resumed)
    resumed.path.write_bytes(b"".join([*new[:3], *new[4:]]))  # more damage is told
    assert Ledger(ledger.folder).faults


@pytest.mark.parametrize("keep", [1, 5, -1])
def test_a_torn_last_line_is_mended_by_the_next(ledger: Ledger, keep: int) -> None:
    lines = lines_of(ledger)
    ledger.path.write_bytes(b"".join([*lines[:-1], lines[-1][:keep]]))
    torn = Ledger(ledger.folder)
    assert [str(fault) for fault in torn.faults] == [
        "line 6 has no end: a crash tore it, or bytes are lost"
    ]
    assert torn.faults == torn.torn
    torn.append(record(8))
    assert torn.faults == Ledger(ledger.folder).faults == []
    assert record(8) in Ledger(ledger.folder)


def test_a_torn_line_after_damage_leaves_the_damage_to_be_told(ledger: Ledger) -> None:
    lines = lines_of(ledger)
    ledger.path.write_bytes(b"".join([lines[0], *lines[2:-1], lines[-1][:20]]))
    torn = Ledger(ledger.folder)
    torn.append(record(8))
    assert [str(fault) for fault in torn.faults] == [
        "line 2 follows a line that is missing, damaged or moved"
    ]


def test_a_line_of_another_process_is_read_before_the_next(tmp_path: Path) -> None:
    one, two = Ledger(tmp_path), Ledger(tmp_path)
    for number in range(4):
        (one, two)[number % 2].append(record(number))
    assert one.faults == two.faults == Ledger(tmp_path).faults == []
    one.refresh()
    assert one.records == two.records == [record(number) for number in range(4)]


def test_a_ledger_that_another_process_rewrote_is_read_again(ledger: Ledger) -> None:
    other = Ledger(ledger.folder)
    other.rewrite([record(0), record(5)])
    ledger.append(record(9))
    assert ledger.records == [record(0), record(5), record(9)]
    assert ledger.faults == Ledger(ledger.folder).faults == []


APPENDER = """
import fcntl, sys
from pathlib import Path
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import StartRecord

def no_lock(*_):
    raise OSError

fcntl.flock = no_lock
folder, first = Path(sys.argv[1]), int(sys.argv[2])
ledger = Ledger(folder)
for number in range(first, first + 40):
    ledger.append(StartRecord(key=str(number), inputs={}))
"""


@pytest.mark.parametrize("second", [0, 100], ids=["equal lines", "other lines"])
def test_two_processes_without_a_lock_are_no_damage(tmp_path: Path, second: int) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", APPENDER, str(tmp_path), str(first)])
        for first in (0, second)
    ]
    assert [process.wait() for process in both] == [0, 0]
    ledger = Ledger(tmp_path)
    assert ledger.faults == []
    keys = {int(start.key) for start in ledger.starts}
    assert keys == {*range(40)} | {*range(second, second + 40)}


def test_of_lines_that_came_at_once_neither_is_lost_unseen(tmp_path: Path) -> None:
    first = write_ledger(tmp_path, 1)
    [line] = lines_of(first)
    one, two = (write_ledger(tmp_path / name, 1) for name in ("one", "two"))
    one.append(record(1))
    two.append(record(3))
    fork = [line, lines_of(one)[1], lines_of(two)[1]]
    first.path.write_bytes(b"".join(fork))
    joined = Ledger(tmp_path)
    joined.append(record(5))
    assert joined.faults == []
    lines = lines_of(joined)
    for lost in (1, 2):
        assert faults_of(b"".join(lines[:lost] + lines[lost + 1 :]))


def old_line(each: LedgerRecord) -> bytes:
    """Return a line as versions before the chain wrote it."""
    content = {"schema": 3, **content_of(each)}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    return (json.dumps({**content, "mark": mark}, ensure_ascii=False) + "\n").encode()


def test_a_ledger_of_an_older_version_is_read_and_goes_on(tmp_path: Path) -> None:
    old = [old_line(record(number)) for number in (0, 1, 1, 2)]  # lines could repeat
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(old))
    ledger = Ledger(tmp_path)
    assert (ledger.faults, ledger.is_chained) == ([], False)
    assert len(ledger.records) == 4
    assert record(2) in ledger
    ledger.append(record(3))
    assert (Ledger(tmp_path).faults, Ledger(tmp_path).is_chained) == ([], True)
    lines = lines_of(ledger)
    assert faults_of(b"".join(lines[:3] + lines[4:]))
    assert faults_of(b"".join([lines[0].replace(b'"0"', b'"9"'), *lines[1:]])) == [
        "line 1 was changed: its mark is not that of its content"
    ]


def test_a_line_of_a_version_before_that_is_named(tmp_path: Path) -> None:
    content = {"schema": 2, **content_of(record(0))}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    line = json.dumps({**content, "mark": mark}, ensure_ascii=False) + "\n"
    (tmp_path / "ledger.jsonl").write_text(line, encoding="utf-8")
    assert [str(fault) for fault in Ledger(tmp_path).faults] == [
        "line 1 is of version 2, and this program reads 3 and 4"
    ]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_ledger_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "ledger.jsonl")
    with pytest.raises(SetupError, match=r"ledger.jsonl: .* it is a .*, not a plain file"):
        Ledger(tmp_path)
