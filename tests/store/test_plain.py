"""Only plain files are read, and only so far: no pipe waits, and no device goes on for ever."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.plain import open_plain, read_bytes, read_text, require_plain

READERS: list[Callable[[Path], object]] = [
    read_bytes,
    read_text,
    open_plain,
    require_plain,
    sha256_of,
]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    # The name of a socket may have about 100 bytes only, so it is bound from its own folder.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (make_pipe, "it is a named pipe, not a plain file"),
    "socket": (make_socket, "it is a socket, not a plain file"),
    "folder": (Path.mkdir, "it is a folder, not a plain file"),
    "device": (link_to("/dev/zero"), "it is a device, not a plain file"),
    "terminal": (link_to("/dev/tty"), "it is a device, not a plain file"),
    "dangling link": (link_to("nowhere"), "No such file or directory"),
    "looping link": (link_to("file"), "Too many levels of symbolic links"),
    "link to a pipe": (
        lambda path: (make_pipe(path.with_name("pipe")), path.symlink_to("pipe"))[1],
        "it is a named pipe, not a plain file",
    ),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("make", "reason"), HOSTILE.values(), ids=list(HOSTILE))
def test_what_is_no_plain_file_is_refused(
    tmp_path: Path, read: Callable[[Path], object], make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / "file")
    with pytest.raises(OSError, match=re.escape(reason)) as caught:
        read(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value.filename)


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_an_impossible_name_is_an_error_of_the_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"NUL character|File name too long"):
        read_bytes(tmp_path / name)


def test_a_pipe_that_takes_the_place_of_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    plain = path.stat()
    path.unlink()
    make_pipe(path)
    monkeypatch.setattr(Path, "stat", lambda self, **_: plain)
    with pytest.raises(OSError, match="named pipe"):
        open_plain(path)


def test_a_link_to_a_plain_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link") == b"content"


def test_bytes_are_counted_while_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert read_bytes(path, 8) == b"12345678"
    with pytest.raises(OSError, match="longer than 7 bytes"):
        read_bytes(path, 7)
    # Files of the kernel state a length of 0.
    kernel = Path("/proc/self/status")
    assert kernel.stat().st_size == 0
    with pytest.raises(OSError, match="longer than 10 bytes"):
        read_bytes(kernel, 10)


def test_text_is_utf8_with_the_line_ends_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("ä\r\nb\rc\n".encode())
    assert read_text(path) == path.read_text(encoding="utf-8") == "ä\nb\nc\n"
    assert read_text(path, newline="") == "ä\r\nb\rc\n"
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(path)


UNGUARDED = re.compile(r"\.read_text\(|\.read_bytes\(|\bopen\(\s*[^)]*[\"']rb?[\"']|\.open\(\s*\)")
OWN_FILES = {
    "planning/calibration.py",
    "store/ledger.py",
    "plugin/source_code.py",
    "rotdistill_report/_notebook.py",
    "rotdistill_scaffold/_templates.py",
}
"""Modules that read files of installed packages or of the kernel, or a ledger that is open."""


def test_no_module_reads_a_file_in_another_way() -> None:
    root = Path(__file__).parents[2]
    modules = [*root.glob("rotdistill_core/**/*.py"), *root.glob("plugins/*/src/**/*.py")]
    assert len(modules) > 100
    unguarded = {
        f"{path.parent.name}/{path.name}"
        for path in modules
        if UNGUARDED.search(path.read_text(encoding="utf-8"))
    }
    assert unguarded <= OWN_FILES
