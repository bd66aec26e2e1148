"""The harness of the fault matrix sees what it is to see."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.child import Ended
from tests.faults.disk import Event, recorded
from tests.faults.matrix import sample, table
from tests.faults.power import LOSSES, lose
from tests.faults.rows import Case, Row, unsound
from tests.faults.workshop import State

ROOT = Path(__file__).parents[2]
WRITER = """
import os, sys
from pathlib import Path
from rotdistill_core.store.files import write_file
from tests.faults.disk import Disk, Event, failing, killer, recorder
from tests.faults.power import power_failure
root, shadow = Path(sys.argv[1]), Path(sys.argv[2])
Disk(root, {act}).plant()
write_file(root / "run/safe", [b"safe"])
with (root / "run/careless.1.a.tmp").open("wb") as stream:
    stream.write(b"careless")
os.replace(root / "run/careless.1.a.tmp", root / "run/careless")
write_file(root / "other/late", [b"late"])
"""
"""Writes a file as runs do, one without any fsync, and one more."""


def written(folder: Path, act: str) -> tuple[int, str]:
    """Carry out the writer with a fault in it; return its exit code and what it said."""
    (folder / "root").mkdir()
    (folder / "shadow").mkdir()
    words = [sys.executable, "-c", WRITER.format(act=act), folder / "root", folder / "shadow"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in (folder / "root").rglob("*") if path.is_file()]
    return {path.relative_to(folder / "root").as_posix(): path.read_bytes() for path in found}


def test_every_operation_is_an_event(tmp_path: Path) -> None:
    code, said = written(tmp_path, 'recorder(shadow / "log")')
    assert code == 0, said
    seen = [(event.op, event.phase) for event in recorded(tmp_path / "shadow/log")]
    for op in ("open", "write", "fsync", "rename", "mkdir", "sync folder"):
        assert (op, "before") in seen
    assert ("write", "middle") in seen
    assert seen.index(("fsync", "after")) < seen.index(("rename", "before"))


def test_a_kill_comes_at_its_event(tmp_path: Path) -> None:
    code, _ = written(tmp_path, 'killer(Event("rename", "before", "run/careless", 0))')
    assert code == -signal.SIGKILL
    assert set(files(tmp_path)) == {"run/safe", "run/careless.1.a.tmp"}


def test_an_error_comes_at_its_event(tmp_path: Path) -> None:
    act = f'failing(Event("write", "middle", "run/safe", 0), {errno.ENOSPC})'
    code, said = written(tmp_path, act)
    assert code == 1
    assert "No space left on device" in said
    assert files(tmp_path) == {}


@pytest.mark.parametrize("loss", LOSSES)
def test_power_loses_what_was_not_synced_and_nothing_else(tmp_path: Path, loss: str) -> None:
    at = 'Event("rename", "before", "other/late", 0)'
    code, _ = written(tmp_path, f"power_failure(root, shadow, {at})")
    assert code == -signal.SIGKILL
    before = files(tmp_path)
    lose(tmp_path / "root", tmp_path / "shadow", loss, seed=1)
    after = files(tmp_path)
    assert after["run/safe"] == b"safe"
    assert set(after) <= set(before)
    if loss == "everything":
        assert set(after) == {"run/safe"}
    if loss == "names":
        assert "run/careless" not in after
    if loss == "bytes":
        assert after["run/careless"] != b"careless"


def test_a_state_differs_in_files_and_in_what_is_committed() -> None:
    one = State({"a": "1", "b": "2"}, frozenset({"x"}))
    other = State({"a": "1", "b": "3", "c": "4"}, frozenset({"y"}))
    lines = one.differences(other)
    assert [line.split(":")[0] for line in lines] == [
        "b has other bytes",
        "c is there besides",
        "not in the ledger",
        "in the ledger besides",
    ]
    assert one.differences(one) == []


@pytest.mark.parametrize(
    ("code", "words", "fault"),
    [
        (3, "error model: is not there.", ""),
        (1, "error model: is not there.", "exit code 1"),
        (3, "", "no message"),
        (3, "error: \x1b[31m", "U+001B"),
        (3, "error: \u202e", "U+202E"),
        (3, "unexpected KeyError: 'a'\nThat should not happen", "error of ours"),
        (3, "Traceback (most recent call last):", "traceback"),
        (3, "x" * 50_000, "characters of message"),
    ],
)
def test_a_call_that_ends_badly_is_seen(code: int, words: str, fault: str) -> None:
    found = unsound(Ended(("run",), code, "", words, 1.0), {3})
    assert fault in found
    assert bool(found) == bool(fault)


def test_a_call_without_end_is_seen() -> None:
    assert "no end" in unsound(Ended(("run",), 0, "", "", 90.0, hung=True), {0})


def test_a_sample_has_every_class_and_is_the_same_each_time() -> None:
    cases = [Case(f"class {k % 5}", str(k), lambda *_: []) for k in range(100)]
    chosen = sample(cases, 10)
    assert {case.kind for case in chosen} == {f"class {k}" for k in range(5)}
    assert [case.name for case in sample(cases, 10)] == [case.name for case in chosen]


def test_the_table_counts_what_is_wrong() -> None:
    rows = [Row("kills", "a", ""), Row("kills", "b", "lost"), Row("flips", "c", "")]
    lines = table(rows).splitlines()
    assert lines[2:] == [
        "| kills | 2 | 1 | 1 |",
        "| flips | 1 | 1 | 0 |",
        "| **all** | 3 | 2 | 1 |",
    ]
    assert json.dumps(rows[1].as_dict())
    assert Event("fsync", "after", "run/shards/teacher/a", 0).stage == "shards/teacher"
