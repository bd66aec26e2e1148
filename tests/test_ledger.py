"""The commit protocol: only a ledger line commits, and only bytes that hash true are used."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import ReferenceType, ref

import pytest
import torch
from safetensors.torch import load_file

from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import CommittedFile, json_blocks, tensor_blocks, write_file
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.output import StepOutput


def open_out(
    root: Path, run: str = "run", key: str = "key", warnings: list[str] | None = None
) -> StepOutput:
    store = ArtifactStore(root, (lambda text: None) if warnings is None else warnings.append)
    return StepOutput(store, Ledger(root / run), key)


def commit_step(out: StepOutput) -> None:
    files = [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in out.used.values()]
    out.ledger.append("step", key=out.key, files=files)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


def raise_disk_full(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_without_its_ledger_line_is_not_committed(tmp_path: Path) -> None:
    write_file(tmp_path / "run" / "a.json", json_blocks(1))
    assert open_out(tmp_path).find("a.json") is None


def test_a_written_file_is_found_by_a_later_process(tmp_path: Path) -> None:
    path = open_out(tmp_path).json("a.json", {"x": 1})
    later = open_out(tmp_path)
    assert later.find("a.json") == path
    assert later.used == {
        "run/a.json": CommittedFile("run/a.json", path.stat().st_size, sha256_of(path))
    }
    assert open_out(tmp_path, key="other").find("a.json") is None


def test_a_torn_last_line_is_ignored_and_appending_after_it_works(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append("first")
    ledger.append("second")
    ledger.path.write_bytes(ledger.path.read_bytes()[:-9])
    resumed = Ledger(tmp_path)
    assert [r["kind"] for r in resumed.records] == ["first"]
    resumed.append("third")
    assert [r["kind"] for r in Ledger(tmp_path).records] == ["first", "third"]


@pytest.mark.parametrize("keep", [1, 2, 40])
def test_a_ledger_torn_at_any_place_still_takes_lines(tmp_path: Path, keep: int) -> None:
    ledger = Ledger(tmp_path)
    ledger.append("first", text="größer")
    ledger.path.write_bytes(ledger.path.read_bytes()[:keep])
    Ledger(tmp_path).append("second")
    assert [r["kind"] for r in Ledger(tmp_path).records] == ["second"]


EDITS: dict[str, Callable[[str], str]] = {
    "value": lambda line: line.replace('"n": 1', '"n": 2'),
    "schema": lambda line: line.replace('"schema": 1', '"schema": 2'),
    "no mark": lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "mark"}),
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
        ledger.append("line", n=n)
    lines = ledger.path.read_text(encoding="utf-8").splitlines()
    lines[1] = edit(lines[1])
    ledger.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [r["n"] for r in Ledger(tmp_path).records] == [0, 2]


def test_a_line_with_number_keys_and_other_scripts_is_read_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append("step", notes={2: 0.5, 10: (1, 2), 1: "東京\u2028"})
    assert Ledger(tmp_path).records == ledger.records


def test_a_line_written_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:30]))
    Ledger(tmp_path).append("step", key="k")
    assert [r["key"] for r in Ledger(tmp_path).records] == ["k"]


def test_a_flipped_byte_is_reported_by_name_and_not_used(tmp_path: Path) -> None:
    out = open_out(tmp_path)
    path = out.json("a.json", {"x": 1})
    commit_step(out)
    assert ArtifactStore(tmp_path).find("key") is not None
    flip_byte(path)
    warnings: list[str] = []
    later = open_out(tmp_path, warnings=warnings)
    assert later.store.find("key") is None
    assert later.find("a.json") is None
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert "sha256" in warnings[0]


def test_a_missing_file_is_reported_as_gone(tmp_path: Path) -> None:
    open_out(tmp_path).json("a.json", 1).unlink()
    warnings: list[str] = []
    assert open_out(tmp_path, warnings=warnings).find("a.json") is None
    assert "a.json: is gone" in warnings[0]


def test_a_damaged_file_is_good_again_once_rewritten(tmp_path: Path) -> None:
    flip_byte(open_out(tmp_path).json("a.json", 1))
    out = open_out(tmp_path)
    assert out.find("a.json") is None
    path = out.json("a.json", 1)
    assert out.find("a.json") == path
    assert open_out(tmp_path).find("a.json") == path


def test_a_step_damaged_in_one_run_is_found_in_another(tmp_path: Path) -> None:
    damaged, sound = open_out(tmp_path, "a"), open_out(tmp_path, "b")
    for out in (damaged, sound):
        out.json("x.json", 1)
        commit_step(out)
    flip_byte(tmp_path / "a" / "x.json")
    record = ArtifactStore(tmp_path).find("key")
    assert record is not None
    assert record["files"][0]["path"] == "b/x.json"


def test_keyed_files_are_shared_between_runs_and_count_as_the_steps_own(tmp_path: Path) -> None:
    path = open_out(tmp_path, "first", "k1").shared("teacher", "abc").json("shards/t.json", 1)
    second = open_out(tmp_path, "second", "k2")
    assert second.find("shards/t.json") is None
    assert second.shared("teacher", "other").find("shards/t.json") is None
    assert second.shared("teacher", "abc").find("shards/t.json") == path
    assert list(second.used) == ["first/shards/t.json"]


def test_two_keys_with_one_name_lie_beside_each_other(tmp_path: Path) -> None:
    first = open_out(tmp_path, key="111111aa").json("maps/a.json", "one")
    second = open_out(tmp_path, key="222222bb").json("maps/a.json", "two")
    assert first != second
    assert second.name == "a.json"
    assert open_out(tmp_path, key="111111aa").find("maps/a.json") == first
    assert open_out(tmp_path, key="222222bb").find("maps/a.json") == second
    assert (json.loads(first.read_text()), json.loads(second.read_text())) == ("one", "two")


def test_two_keys_with_one_name_in_the_run_folder_keep_both_files(tmp_path: Path) -> None:
    first, second = (
        open_out(tmp_path, key=key).json("a.json", key) for key in ("111111aa", "222222bb")
    )
    for key, path in (("111111aa", first), ("222222bb", second)):
        assert open_out(tmp_path, key=key).find("a.json") == path
        assert json.loads(path.read_text()) == key


def test_write_file_leaves_nothing_behind_when_the_blocks_raise(tmp_path: Path) -> None:
    def blocks() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    write_file(tmp_path / "a", [b"old"])
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", blocks())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_write_file_on_a_full_disk_is_a_setup_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(SetupError, match=r"a\.bin: cannot be written: No space left on device"):
        write_file(tmp_path / "a.bin", [b"x"])
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_line_on_a_full_disk_is_a_setup_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(SetupError, match="No space left on device"):
        Ledger(tmp_path).append("step")


def test_write_file_where_the_folder_cannot_be_made_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SetupError, match="cannot be written"):
        write_file(tmp_path / "file" / "a.bin", [b"x"])


def test_write_file_returns_length_and_hash(tmp_path: Path) -> None:
    size, digest = write_file(tmp_path / "new" / "a", [b"ab", memoryview(b"cd")])
    assert (size, digest) == (4, sha256_of(tmp_path / "new" / "a"))


def test_sweep_removes_temporary_files_of_dead_processes_only(tmp_path: Path) -> None:
    dead = tmp_path / "shards" / f"a.safetensors.{dead_pid()}.0badcafe.tmp"
    alive = tmp_path / f"a.json.{os.getpid()}.0badcafe.tmp"
    foreign = [tmp_path / "notes.tmp", tmp_path / "a.b.c.tmp", tmp_path / "a.json"]
    dead.parent.mkdir()
    for path in (dead, alive, *foreign):
        path.write_text("")
    ArtifactStore(tmp_path).sweep(tmp_path)
    assert not dead.exists()
    assert all(path.exists() for path in (alive, *foreign))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
)
def test_tensor_files_are_read_back_equal_by_safetensors(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {
        "matrix": torch.arange(15).reshape(3, 5).to(dtype),
        "transposed": torch.arange(6).reshape(2, 3).to(dtype).T,
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    path = open_out(tmp_path).tensors("t.safetensors", tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_a_tensor_of_another_shape_than_declared_is_refused(tmp_path: Path) -> None:
    blocks = tensor_blocks({"a": ((2, 2), torch.float32, lambda: torch.zeros(3))})
    with pytest.raises(ValueError, match="was declared"):
        write_file(tmp_path / "a.safetensors", blocks)
    assert list(tmp_path.iterdir()) == []


def test_a_block_is_gone_before_the_next_one_is_made(tmp_path: Path) -> None:
    before: list[ReferenceType[array[int]]] = []

    def made() -> Iterator[bytes]:
        for k in range(3):
            assert not any(seen() for seen in before)
            block = array("B", [k] * 9)
            before.append(ref(block))
            yield block  # type: ignore[misc]
            del block

    assert write_file(tmp_path / "file", made())[0] == 27
