"""The output of one step: its files are found again by key and name, if they hash true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rotdistill_core.errors import CheckFailed
from rotdistill_core.store.files import CommittedFile, json_blocks, write_file
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput


def open_output(
    root: Path, run: str = "run", key: str = "key", warnings: list[str] | None = None
) -> StepOutput:
    warn = (lambda _: None) if warnings is None else warnings.append
    return StepOutput(ArtifactStore(root, warn), Ledger(root / run), key)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_file_without_its_ledger_line_is_not_committed(tmp_path: Path) -> None:
    write_file(tmp_path / "run" / "a.json", json_blocks(1))
    assert open_output(tmp_path).find("a.json") is None


def test_a_later_process_finds_a_written_file(tmp_path: Path) -> None:
    path = open_output(tmp_path).json("a.json", {"x": 1})
    later = open_output(tmp_path)
    assert later.find("a.json") == path
    file = CommittedFile("run/a.json", path.stat().st_size, sha256_of(path))
    assert later.used == {"run/a.json": file}
    assert open_output(tmp_path, key="other").find("a.json") is None


def test_tensors_are_written_as_given(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    found = load_file(open_output(tmp_path).tensors("t.safetensors", tensors))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_missing_file_is_reported_as_gone(tmp_path: Path) -> None:
    open_output(tmp_path).json("a.json", 1).unlink()
    warnings: list[str] = []
    assert open_output(tmp_path, warnings=warnings).find("a.json") is None
    assert "a.json: is gone" in warnings[0]


def test_a_damaged_file_is_good_again_once_rewritten(tmp_path: Path) -> None:
    flip_byte(open_output(tmp_path).json("a.json", 1))
    out = open_output(tmp_path)
    assert out.find("a.json") is None
    path = out.json("a.json", 1)
    assert out.find("a.json") == path
    assert open_output(tmp_path).find("a.json") == path


def test_runs_share_files_keyed_by_content(tmp_path: Path) -> None:
    path = (
        open_output(tmp_path, "first", "k1")
        .shared("teacher", "abc", code="1")
        .json("shards/t.json", 1)
    )
    second = open_output(tmp_path, "second", "k2")
    assert second.find("shards/t.json") is None
    assert second.shared("teacher", "other", code="1").find("shards/t.json") is None
    assert second.shared("teacher", "abc", code="2").find("shards/t.json") is None
    assert second.shared("teacher", "abc", code="1").find("shards/t.json") == path
    assert list(second.used) == ["first/shards/t.json"]


def test_two_keys_with_one_name_keep_both_files(tmp_path: Path) -> None:
    for name in ("maps/a.json", "a.json"):
        first = open_output(tmp_path, key="111111aa").json(name, "one")
        second = open_output(tmp_path, key="222222bb").json(name, "two")
        assert first != second
        assert open_output(tmp_path, key="111111aa").find(name) == first
        assert open_output(tmp_path, key="222222bb").find(name) == second
        assert (json.loads(first.read_text()), json.loads(second.read_text())) == ("one", "two")
    assert (tmp_path / "run/maps-222222/a.json").is_file()


def test_a_document_is_written_once_and_anew_when_it_changes(tmp_path: Path) -> None:
    path = open_output(tmp_path).document("a.md", [b"one"])
    before = path.stat().st_mtime_ns, len(Ledger(tmp_path / "run").records)
    assert open_output(tmp_path).document("a.md", [b"o", b"ne"]) == path
    assert (path.stat().st_mtime_ns, len(Ledger(tmp_path / "run").records)) == before
    open_output(tmp_path).document("a.md", [b"two"])
    assert path.read_bytes() == b"two"
    open_output(tmp_path, key="other").document("a.md", [b"three"])  # of other inputs: same place
    assert path.read_bytes() == b"three"
    assert open_output(tmp_path).document("a.md", [b"two"]).read_bytes() == b"two"


def test_a_damaged_document_is_told_and_written_anew(tmp_path: Path) -> None:
    path = open_output(tmp_path).document("a.md", [b"text"])
    flip_byte(path)
    warnings: list[str] = []
    open_output(tmp_path, warnings=warnings).document("a.md", [b"text"])
    assert path.read_bytes() == b"text"
    assert [str(path) in line for line in warnings] == [True]


def test_a_fresh_run_writes_its_documents_once(tmp_path: Path) -> None:
    path = open_output(tmp_path).document("a.md", [b"text"])
    old = path.stat().st_ino
    store = ArtifactStore(tmp_path, fresh=True)
    out = StepOutput(store, Ledger(tmp_path / "run"), "key")
    assert out.document("a.md", [b"text"]) == path
    new = path.stat().st_ino
    assert new != old
    out.document("a.md", [b"text"])
    assert path.stat().st_ino == new


def test_a_committed_file_is_read_only_if_it_hashes_true(tmp_path: Path) -> None:
    path = open_output(tmp_path).json("a.json", {"x": 1})
    assert open_output(tmp_path).committed("run/a.json") == path
    flip_byte(path)
    with pytest.raises(CheckFailed, match=r"a\.json: does not match its sha256"):
        open_output(tmp_path).committed("run/a.json")
    with pytest.raises(CheckFailed, match="no line commits run/other"):
        open_output(tmp_path).committed("run/other")
