"""A shim between a call and its disk: every open, write, fsync, rename and mkdir is an event.

A fault is a function that takes an event. It may note it, raise an `OSError`, or kill the process.
Files that C++ reads (safetensors, tokenizers) are not seen.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import signal
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TEMPORARY = re.compile(r"(\.[0-9a-f]{16})?\.\d+\.[0-9a-f]+\.tmp$")


@dataclass(frozen=True)
class Event:
    """Something that a call does to a file."""

    op: str
    """open, write, fsync, rename, unlink, mkdir, sync folder, read."""
    phase: str
    """before, middle (of a write) or after."""
    name: str
    """The file, relative to the folder that is watched, under the name that it will have."""
    nth: int
    """How often there was an event of the same op, phase and name before it."""

    @property
    def stage(self) -> str:
        """What the run makes there: the first folders of the name below the run."""
        parts = self.name.split("/")[1:]
        if len(parts) > 2:
            return "/".join(parts[:2])
        return "/".join(parts[:1]) or "the folder"


Act = Callable[[Event], None]


@dataclass
class Disk:
    """The shim for one folder; `plant` puts it in this process for good."""

    root: Path
    act: Act
    seen: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    busy: bool = False

    def plant(self) -> None:
        """Put the shim between this process and the system."""
        self._plant_open()
        self._plant_handles()
        for op, name in (("unlink", "unlink"), ("mkdir", "mkdir")):
            setattr(os, name, self._around_path(op, getattr(os, name)))
        for name in ("replace", "rename"):
            setattr(os, name, self._around_rename(getattr(os, name)))

    def fire(self, op: str, phase: str, path: object) -> None:
        """Tell of an event, if it is below the root."""
        name = self.name_of(path)
        if name is None or self.busy:
            return
        key = (op, phase, name)
        self.busy = True  # what the fault itself does to files is no event
        try:
            self.act(Event(op, phase, name, self.seen[key]))
        finally:
            self.seen[key] += 1
            self.busy = False

    def name_of(self, path: object) -> str | None:
        """Return the name of a path below the root, and None for another."""
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")  # noqa: PTH115
            except OSError:
                return None
        full = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]  # noqa: PTH100
        root = str(self.root)
        if full == root:
            return "."
        if not full.startswith(root + "/"):
            return None
        return TEMPORARY.sub("", full[len(root) + 1 :].removesuffix(" (deleted)"))

    def _plant_open(self) -> None:
        plain: Any = io.open
        disk = self

        class Raw(io.FileIO):
            """A file whose writes are events."""

            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                disk.fire("write", "before", self.fileno())
                half = len(view) // 2
                done = super().write(view[:half]) if half else 0
                disk.fire("write", "middle", self.fileno())
                if done == half:
                    done += super().write(view[half:])
                disk.fire("write", "after", self.fileno())
                return done

        def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            if isinstance(file, int) or disk.name_of(file) is None:
                return plain(file, mode, *args, **more)
            op = "open" if set(mode) & set("wxa+") else "read"
            disk.fire(op, "before", file)
            if mode in ("wb", "xb", "ab"):
                return io.BufferedWriter(Raw(os.fspath(file), mode))
            return plain(file, mode, *args, **more)

        io.open = opened
        builtins.open = opened

    def _plant_handles(self) -> None:
        plain_open, plain_write, plain_fsync = os.open, os.write, os.fsync

        def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.fire("open", "before", path)
            return plain_open(path, flags, *args, **more)

        def written(handle: int, data: Any) -> int:
            self.fire("write", "before", handle)
            half = len(data) // 2
            done = plain_write(handle, data[:half]) if half else 0
            self.fire("write", "middle", handle)
            done += plain_write(handle, data[half:])
            self.fire("write", "after", handle)
            return done

        def synced(handle: int) -> None:
            folder = stat.S_ISDIR(os.fstat(handle).st_mode)
            op = "sync folder" if folder else "fsync"
            self.fire(op, "before", handle)
            plain_fsync(handle)
            self.fire(op, "after", handle)

        os.open, os.write, os.fsync = opened, written, synced

    def _around_path(self, op: str, plain: Callable[..., None]) -> Callable[..., None]:
        def around(path: Any, *args: Any, **more: Any) -> None:
            self.fire(op, "before", path)
            plain(path, *args, **more)
            self.fire(op, "after", path)

        return around

    def _around_rename(self, plain: Callable[..., None]) -> Callable[..., None]:
        def around(source: Any, target: Any, **more: Any) -> None:
            self.fire("rename", "before", target)
            plain(source, target, **more)
            self.fire("rename", "after", target)

        return around


def recorder(log: Path) -> Act:
    """Return a fault that only writes all events down."""
    stream = log.open("a", encoding="utf-8")

    def act(event: Event) -> None:
        stream.write(json.dumps(asdict(event)) + "\n")
        stream.flush()

    return act


def recorded(log: Path) -> list[Event]:
    """Return the events that a recorder wrote down."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return [Event(**json.loads(line)) for line in lines]


def killer(at: Event) -> Act:
    """Return a fault that kills the process at an event."""

    def act(event: Event) -> None:
        if event == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def failing(at: Event, number: int, lasting: bool = False) -> Act:
    """Return a fault that raises an error at an event, and after it where the fault lasts."""
    broken = False

    def act(event: Event) -> None:
        nonlocal broken
        begins = event == at
        goes_on = broken and lasting and event.op == at.op and event.phase == at.phase
        if begins or goes_on:
            broken = True
            raise OSError(number, os.strerror(number), event.name)

    return act
