"""Hashes of model files: several at once, remembered between runs, and never of old content."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from rotdistill_core.checkpoint import file_hashes
from rotdistill_core.checkpoint.file_hashes import (
    LEAST_REMEMBERED,
    SAMPLE_BYTES,
    FileHashes,
    remembered_hashes,
)
from rotdistill_core.checkpoint.open import open_pair
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import MODEL_HASHES, user_cache
from rotdistill_core.testing import pico_folder

SIZE = 2 * LEAST_REMEMBERED


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files that a test has just written count as old."""
    monkeypatch.setattr(file_hashes, "SETTLED_NANOSECONDS", -(10**12))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the files that are hashed, as they come."""
    paths: list[Path] = []

    def counted(path: Path) -> str:
        paths.append(path)
        return sha256_of(path)

    monkeypatch.setattr(file_hashes, "sha256_of", counted)
    return paths


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def change_byte(path: Path, position: int) -> None:
    """Change one byte of a file in its place."""
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


def test_a_file_is_read_once_in_two_processes(tmp_path: Path, file: Path, read: list[Path]) -> None:
    cache = tmp_path / "cache" / "hashes.json"
    for _ in range(2):
        assert FileHashes(cache).of([file]) == [sha256_of(file)]
    assert read == [file]
    assert list(cache.parent.iterdir()) == [cache]


def test_without_a_cache_a_file_is_read_in_each_process(file: Path, read: list[Path]) -> None:
    for _ in range(2):
        hashes = FileHashes()
        assert hashes.of([file]) == hashes.of([file]) == [sha256_of(file)]
    assert read == [file, file]


@pytest.mark.parametrize("position", [0, 2 * SAMPLE_BYTES], ids=["in the sample", "outside"])
@pytest.mark.parametrize("keep_mtime", [False, True])
def test_a_change_of_one_byte_is_seen(
    tmp_path: Path, file: Path, position: int, keep_mtime: bool
) -> None:
    hashes = FileHashes(tmp_path / "hashes.json")
    [before] = hashes.of([file])
    status = file.stat()
    change_byte(file, position)
    times = (status.st_atime_ns, status.st_mtime_ns + (0 if keep_mtime else 10**9))
    os.utime(file, ns=times)
    assert file.stat().st_size == status.st_size
    [after] = hashes.of([file])
    assert after == sha256_of(file) != before
    assert FileHashes(tmp_path / "hashes.json").of([file]) == [after]


def test_a_sampled_byte_that_changes_behind_the_file_system_is_seen(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = file.stat()
    plain = Path.stat

    def frozen(path: Path, **options: Any) -> os.stat_result:
        return status if path == file else plain(path, **options)

    monkeypatch.setattr(Path, "stat", frozen)
    hashes = FileHashes(tmp_path / "hashes.json")
    [before] = hashes.of([file])
    change_byte(file, 2 * SAMPLE_BYTES)  # the documented limit
    assert hashes.of([file]) == [before] != [sha256_of(file)]
    assert FileHashes().of([file]) == [sha256_of(file)]
    change_byte(file, SIZE // 2)
    assert hashes.of([file]) == [sha256_of(file)]


def test_another_file_in_the_same_place_is_read(
    tmp_path: Path, file: Path, read: list[Path]
) -> None:
    cache = tmp_path / "hashes.json"
    FileHashes(cache).of([file])
    copy = file.with_suffix(".copy")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)
    FileHashes(cache).of([file])
    assert read == [file, file]


@pytest.mark.parametrize("damage", ["torn", "list", "no mark", "other hash"])
def test_a_damaged_cache_is_ignored_and_written_again(
    tmp_path: Path, file: Path, read: list[Path], damage: str
) -> None:
    cache = tmp_path / "hashes.json"
    FileHashes(cache).of([file])
    whole = cache.read_text()
    [[name, [state, sha256, mark]]] = json.loads(whole).items()
    damaged = {
        "torn": whole[:-20],
        "list": "[]",
        "no mark": json.dumps({name: [state, sha256]}),
        "other hash": json.dumps({name: [state, "0" + sha256[1:-1] + "0", mark]}),
    }
    cache.write_text(damaged[damage])
    assert FileHashes(cache).of([file]) == [sha256]
    assert read == [file, file]
    assert cache.read_text() == whole


def test_a_cache_that_cannot_be_written_is_reported_and_stops_nothing(
    tmp_path: Path, file: Path
) -> None:
    lines: list[str] = []
    (tmp_path / "cache").write_text("a file, and no folder")
    assert FileHashes(tmp_path / "cache" / "hashes.json", lines.append).of([file]) == [
        sha256_of(file)
    ]
    [line] = lines
    assert "hashes.json: cannot be written" in line
    assert line.endswith("Models are hashed anew by each run.")


def test_two_processes_add_to_one_cache(tmp_path: Path, file: Path, read: list[Path]) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"x" * SIZE)
    cache = tmp_path / "hashes.json"
    one, two = FileHashes(cache), FileHashes(cache)
    assert one.of([file]) != two.of([other])
    FileHashes(cache).of([file, other])
    assert read == [file, other]


def test_the_cache_forgets_the_oldest_files(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "MOST_REMEMBERED", 2)
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for path in files:
        path.write_bytes(path.name.encode() * SIZE)
        FileHashes(tmp_path / "hashes.json").of([path])
    read.clear()
    FileHashes(tmp_path / "hashes.json").of(files)
    assert read == files[:1]


def test_a_small_file_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"x" * (LEAST_REMEMBERED - 1))
    FileHashes(tmp_path / "hashes.json").of([path])
    assert not (tmp_path / "hashes.json").exists()


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    FileHashes(tmp_path / "hashes.json").of([file])
    assert not (tmp_path / "hashes.json").exists()


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_after(path: Path) -> str:
        found = sha256_of(path)
        change_byte(path, 2 * SAMPLE_BYTES)
        os.utime(path, ns=(0, 0))
        return found

    monkeypatch.setattr(file_hashes, "sha256_of", change_after)
    hashes = FileHashes(tmp_path / "hashes.json")
    hashes.of([file])
    monkeypatch.setattr(file_hashes, "sha256_of", sha256_of)
    assert hashes.of([file]) == [sha256_of(file)]


def test_files_are_hashed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Barrier(2, timeout=10)

    def waiting(path: Path) -> str:
        together.wait()  # breaks unless the other file is being hashed, too
        return path.name

    monkeypatch.setattr(file_hashes, "sha256_of", waiting)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"x")
    assert FileHashes().of(paths) == ["a", "b"]


def test_models_that_share_files_are_hashed_once(
    tmp_path: Path,
    read: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = pico_folder(tmp_path / "model", vocab_size=9000)
    alias = tmp_path / "alias"
    alias.symlink_to(folder)
    pair = open_pair(ModelRef(model=str(folder)), ModelRef(model=str(alias)), None)
    weights = folder / "model.safetensors"
    assert weights.stat().st_size > LEAST_REMEMBERED
    assert pair.same
    assert [path.resolve() for path in read if path.suffix == ".safetensors"] == [weights]
    assert (user_cache() / MODEL_HASHES).is_file()
    again = open_pair(ModelRef(model=str(folder)), ModelRef(model=str(alias)), None)
    assert again.teacher.sha256 == pair.teacher.sha256
    assert [path.resolve() for path in read if path.suffix == ".safetensors"] == [weights]


def test_hashes_are_remembered_in_the_users_cache(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remembered_hashes().of([file])
    assert (tmp_path / "cache" / "rotdistill" / "model_hashes.json").is_file()
