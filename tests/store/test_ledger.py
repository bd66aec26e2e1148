"""The commit protocol: only a ledger line commits, and only bytes that hash true are used."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rotdistill_core.errors import SetupError
from rotdistill_core.store.chain import SCHEMA
from rotdistill_core.store.files import CommittedFile
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.place import Place, this_place
from rotdistill_core.store.records import (
    ActivationsRef,
    CheckpointRecord,
    FailureRecord,
    FileRecord,
    LedgerRecord,
    MapsRef,
    RowsRef,
    StartRecord,
    StepRecord,
    WeightsRef,
)
from rotdistill_core.store.results import Answer, Certificate, Curve, StepReport


def start(key: str) -> StartRecord:
    return StartRecord(key=key, inputs={"seed": "0"})


def step(key: str, *files: CommittedFile) -> StepRecord:
    return StepRecord(
        key=key,
        before="start",
        id="chop",
        use="chop",
        options={"layers": 2},
        plugin="rotdistill-chop 0.1",
        seconds=1.25,
        files=files,
        result=RowsRef(rows=()),
        notes={},
        report=StepReport(),
    )


def open_output(root: Path, run: str, warnings: list[str] | None = None) -> StepOutput:
    warn = (lambda _: None) if warnings is None else warnings.append
    return StepOutput(ArtifactStore(root, warn), Ledger(root / run), "key")


def commit_step(out: StepOutput) -> None:
    out.ledger.append(step(out.key, *out.used.values()))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def raise_disk_full(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FILES = (CommittedFile("run/a.json", 3, "ab"), CommittedFile("other/b.json", 4, "cd"))
SOLVED = step("k", *FILES)
REPORT = StepReport(
    refused="no gain",
    certificate=Certificate(1e-12, 1e-5, 0.0, 0.0, 2),
    curves=[Curve("base", "full", (0.0, 1.0), (0.5, 0.25))],
    answers={"q1": Answer("ja", "東京は?", "はい", "no", teacher_facts=("Tokyo",))},
)
RECORDS: dict[str, LedgerRecord] = {
    "start": StartRecord(key="k", inputs={"teacher": "ab", "seed": "0"}, models={"teacher": "abc"}),
    "file": FileRecord(key="k", name="a.json", path="run/a.json", bytes=3, sha256="ab"),
    "checkpoint": CheckpointRecord(key="k", variant="full", folder="run/c/full", files=FILES),
    "failure": FailureRecord(
        key="k",
        id="head",
        variant="full",
        plugin="rotdistill-chop 0.1",
        when="2026-01-02T03:04:05+00:00",
        error="RecipeError",
        message="größer",
    ),
    "activations": replace(
        SOLVED,
        result=ActivationsRef(
            shards={"teacher": ("run/s0", "other/s1")},
            texts={"teacher": ((0, 2), (5, 6))},
            depths=(0, 2),
            partners=(0, 3),
        ),
    ),
    "maps": replace(
        SOLVED,
        result=MapsRef(
            spaces={"residual.0": {"file": "run/m", "kind": "Rotation", "scale": 0.5}},
            cards={"0": "run/layer_0.json"},
        ),
    ),
    "weights": replace(
        SOLVED,
        result=WeightsRef(
            config={"rope": {"theta": 1e4}},
            depths=(0, 1),
            basis="run/basis",
            tensors={"embed": ("", "embed"), "head": ("other/w", "head")},
            undo="run/undo",
        ),
    ),
    "rows": replace(SOLVED, variant="full", result=RowsRef(rows=(("full", "kl", 0.5, None),))),
    "report": replace(SOLVED, report=REPORT, notes={"text": "größer", "list": [1, None]}),
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_a_record_is_read_back_equal(tmp_path: Path, record: LedgerRecord) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.append(record) == record
    later = Ledger(tmp_path)
    assert later.records == [record]
    assert record in later


def test_a_line_names_the_kinds_of_record_and_result(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(RECORDS["maps"])
    line = json.loads(ledger.path.read_text())
    assert (line["schema"], line["kind"], line["result"]["kind"]) == (SCHEMA, "step", "maps")


def test_a_record_knows_the_files_that_it_needs() -> None:
    paths = {name: set(record.paths()) for name, record in RECORDS.items()}
    own = {"run/a.json", "other/b.json"}
    assert paths["start"] == set()
    assert paths["file"] == {"run/a.json"}
    assert paths["failure"] == set()
    assert paths["checkpoint"] == own
    assert paths["activations"] == own | {"run/s0", "other/s1"}
    assert paths["maps"] == own | {"run/m", "run/layer_0.json"}
    assert paths["weights"] == own | {
        "run/basis",
        "other/w",
        "run/undo",
    }  # '' is the opened student
    assert paths["rows"] == own


def test_a_ledger_sorts_its_records_by_kind(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for record in RECORDS.values():
        ledger.append(record)
    counts = (ledger.starts, ledger.files, ledger.steps, ledger.checkpoints, ledger.failures)
    assert [len(records) for records in counts] == [1, 1, 5, 1, 1]


def test_a_record_with_nan_and_number_keys_is_recognised(tmp_path: Path) -> None:
    rows = RowsRef(rows=(("full", "kl", math.nan),))
    record = replace(SOLVED, result=rows, notes={2: 0.5, 10: (1, 2), 1: "東京\u2028"})
    assert record not in Ledger(tmp_path)
    committed = Ledger(tmp_path).append(record)
    later = Ledger(tmp_path)
    assert committed.notes == {"2": 0.5, "10": [1, 2], "1": "東京\u2028"}
    assert committed in later
    assert record in later
    assert replace(record, key="other") not in later


def test_appending_after_a_torn_last_line_works(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(start("first"))
    ledger.append(start("second"))
    ledger.path.write_bytes(ledger.path.read_bytes()[:-9])
    resumed = Ledger(tmp_path)
    assert resumed.records == [start("first")]
    resumed.append(start("third"))
    assert Ledger(tmp_path).records == [start("first"), start("third")]


@pytest.mark.parametrize("keep", [1, 2, 40])
def test_a_ledger_torn_at_any_place_still_takes_lines(tmp_path: Path, keep: int) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(start("größer"))
    ledger.path.write_bytes(ledger.path.read_bytes()[:keep])
    Ledger(tmp_path).append(start("second"))
    assert Ledger(tmp_path).records == [start("second")]


def remarked(line: str, **changes: object) -> str:
    """Return a line with other content and a mark that fits it."""
    body = json.dumps(json.loads(line) | changes, ensure_ascii=False)
    body = body.rpartition(', "mark": "')[0]
    return f'{body}, "mark": "{hashlib.sha256(body.encode()).hexdigest()[:16]}"}}'


EDITS: dict[str, Callable[[str], str]] = {
    "value": lambda line: line.replace('"key": "1"', '"key": "2"'),
    "no mark": lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "mark"}),
    "another schema": lambda line: remarked(line, schema=SCHEMA - 2),
    "an unknown kind": lambda line: remarked(line, kind="wish"),
    "a missing field": lambda line: remarked(line, kind="file"),
    "number": lambda line: "7",
    "empty list": lambda line: "[]",
    "list": lambda line: '["mark"]',
    "null": lambda line: "null",
    "zeros": lambda line: "\x00" * 40,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edited_line_is_ignored(tmp_path: Path, edit: Callable[[str], str]) -> None:
    ledger = Ledger(tmp_path)
    for n in range(3):
        ledger.append(start(str(n)))
    lines = ledger.path.read_text(encoding="utf-8").splitlines()
    assert edit(lines[1]) != lines[1]
    lines[1] = edit(lines[1])
    ledger.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [record.key for record in Ledger(tmp_path).starts] == ["0", "2"]


def test_a_line_with_a_fitting_mark_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(start("1"))
    ledger.path.write_text(remarked(ledger.path.read_text(), key="2") + "\n")
    assert Ledger(tmp_path).records == [start("2")]


def test_a_line_written_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:30]))
    Ledger(tmp_path).append(start("k"))
    assert Ledger(tmp_path).records == [start("k")]


def test_a_ledger_line_on_a_full_disk_is_a_setup_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raise_disk_full)
    ledger = Ledger(tmp_path)
    with pytest.raises(SetupError, match="No space left on device"):
        ledger.append(start("k"))
    assert ledger.records == []


def test_a_rewritten_ledger_holds_only_what_was_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for n in range(3):
        ledger.append(start(str(n)))
    ledger.rewrite([record for record in ledger.records if record.key != "1"])
    for each in (ledger, Ledger(tmp_path)):
        assert [record.key for record in each.records] == ["0", "2"]
        assert start("1") not in each
    ledger.append(start("1"))
    assert [record.key for record in Ledger(tmp_path).records] == ["0", "2", "1"]


def test_a_flipped_byte_is_reported_by_name_and_not_used(tmp_path: Path) -> None:
    out = open_output(tmp_path, "run")
    path = out.json("a.json", {"x": 1})
    commit_step(out)
    assert ArtifactStore(tmp_path).find_step("key") is not None
    flip_byte(path)
    warnings: list[str] = []
    later = open_output(tmp_path, "run", warnings)
    assert later.store.find_step("key") is None
    assert later.find("a.json") is None
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert "sha256" in warnings[0]


def test_a_step_damaged_in_one_run_is_found_in_another(tmp_path: Path) -> None:
    damaged, sound = open_output(tmp_path, "a"), open_output(tmp_path, "b")
    for out in (damaged, sound):
        out.json("x.json", 1)
        commit_step(out)
    flip_byte(tmp_path / "a" / "x.json")
    record = ArtifactStore(tmp_path).find_step("key")
    assert record is not None
    assert record.files[0].path == "b/x.json"


def test_checkpoints_are_found_in_their_own_run_only(tmp_path: Path) -> None:
    out = open_output(tmp_path, "a")
    out.json("c/COMPLETE", {})
    files = tuple(out.used.values())
    record = CheckpointRecord(key="k", variant="full", folder="a/c", files=files)
    out.ledger.append(record)
    store = ArtifactStore(tmp_path)
    assert store.find_checkpoint("k", out.ledger) == record
    assert store.find_checkpoint("other", out.ledger) is None
    assert store.find_checkpoint("k", Ledger(tmp_path / "b")) is None
    assert store.find_step("k") is None


def file_called(name: str) -> FileRecord:
    return FileRecord(key="k", name=name, path=f"a/{name}", bytes=1, sha256="0")


def test_a_process_that_its_launcher_replaced_commits_nothing_more(tmp_path: Path) -> None:
    old, new = Ledger(tmp_path / "a"), Ledger(tmp_path / "a")
    old.begin_generation("launch")
    old.append(file_called("first"))
    new.begin_generation("launch")
    before = new.path.read_bytes()
    with pytest.raises(SetupError, match=r"of generation 0, and its launcher has started gen.* 1"):
        old.append(file_called("late"))
    assert new.path.read_bytes() == before
    new.append(file_called("second"))
    assert [record.name for record in Ledger(tmp_path / "a").files] == ["first", "second"]
    assert Ledger(tmp_path / "a").faults == []


@pytest.mark.parametrize("launch", ["", "another"])
def test_processes_of_other_launches_go_on(tmp_path: Path, launch: str) -> None:
    other, restarted = Ledger(tmp_path / "a"), Ledger(tmp_path / "a")
    if launch:
        other.begin_generation(launch)
    for _ in range(3):
        restarted.begin_generation("launch")
    other.append(file_called("other"))
    restarted.append(file_called("own"))
    assert [record.name for record in Ledger(tmp_path / "a").files] == ["other", "own"]


def test_a_record_is_the_same_in_any_generation(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a")
    ledger.begin_generation("launch")
    ledger.append(file_called("one"))
    assert file_called("one") in Ledger(tmp_path / "a")


def test_sweep_removes_temporary_files_of_dead_processes_only(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    here = this_place()
    dead = here.temporary(tmp_path / "shards" / "a.safetensors", child.pid)
    alive = here.temporary(tmp_path / "a.json", os.getpid())
    foreign = [tmp_path / "notes.tmp", tmp_path / "a.b.c.tmp", tmp_path / "a.json"]
    container = Place.of("worker", "", "boot", "pid:[4026532001]")
    foreign.append(container.temporary(tmp_path / "a.json", child.pid))
    dead.parent.mkdir()
    for path in (dead, alive, *foreign):
        path.write_text("")
    ArtifactStore(tmp_path).sweep(tmp_path)
    assert not dead.exists()
    assert all(path.exists() for path in (alive, *foreign))
