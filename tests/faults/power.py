"""Power loss: what a disk may hold after it, by what was synced before.

The shim keeps, for each inode, the bytes of its last fsync and, for each folder, the entries of its
last fsync. When the power fails, every later change may be on the disk or not, in any order. What
is left is legal by POSIX, which promises less than file systems do. SQLite tests itself so.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.disk import Act, Event

LOSSES = ("everything", "names", "bytes", "some")
"""What the disk loses of all that was not synced: everything; entries of folders; bytes of files;
some of each, at random."""


@dataclass
class Journal:
    """What is durable below a folder, kept while a call runs."""

    root: Path
    shadow: Path
    """Holds the synced bytes of each inode."""
    fails_at: Event
    synced: dict[str, str] = field(default_factory=dict)
    """Inode -> file in the shadow folder."""
    entries: dict[str, dict[str, int]] = field(default_factory=dict)
    """Folder, relative -> its durable entries: name -> inode."""

    def begin(self) -> None:
        """Take what is there as durable."""
        self.shadow.mkdir(exist_ok=True)
        self.entries["."] = _listing(self.root)
        for path in self.root.rglob("*"):
            if path.is_dir():
                self.entries[path.relative_to(self.root).as_posix()] = _listing(path)
            else:
                self._keep(path)

    def act(self, event: Event) -> None:
        """Note a sync; fail at the chosen event."""
        if event.phase == "after" and event.op == "sync folder":
            self.entries[event.name] = _listing(self.root / event.name)
        if event.phase == "after" and event.op == "fsync":
            self._keep(self._written(event.name))
        if event == self.fails_at:
            document = {"synced": self.synced, "entries": self.entries}
            (self.shadow / "journal.json").write_text(json.dumps(document), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)

    def _written(self, name: str) -> Path:
        """Return the file that was just synced: a temporary one, or the file itself."""
        path = self.root / name
        mine = sorted(path.parent.glob(f"{path.name}.*.{os.getpid()}.*.tmp"))
        return mine[-1] if mine else path

    def _keep(self, path: Path) -> None:
        inode = str(path.stat().st_ino)
        copy = self.shadow / inode
        shutil.copyfile(path, copy)
        self.synced[inode] = inode


def power_failure(root: Path, shadow: Path, at: Event) -> Act:
    """Return a fault that ends the process at an event, as a failure of the power would."""
    journal = Journal(root, shadow, at)
    journal.begin()
    return journal.act


def lose(root: Path, shadow: Path, loss: str, seed: int) -> None:
    """Turn a tree into one that the disk may hold after the power has failed."""
    document = json.loads((shadow / "journal.json").read_text(encoding="utf-8"))
    after = _After(root, shadow, document["entries"], loss, random.Random(seed))
    tree = after.folder(".")
    for path in list(root.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write(root, tree)


@dataclass(frozen=True)
class _After:
    """The choice of one legal state."""

    root: Path
    shadow: Path
    durable: Mapping[str, Mapping[str, int]]
    loss: str
    choice: random.Random

    def folder(self, name: str) -> dict[str, Any]:
        """Return the content of a folder: name -> bytes, or a folder."""
        path = self.root / name
        now, before = _listing(path), self.durable.get(name, {})
        # All names of an inode change together: a rename is one change.
        made = {inode: self._keeps(names=True) for inode in sorted({*now.values()})}
        kept = dict(before)
        for entry, inode in before.items():
            gone = entry not in now
            if gone and (made[inode] if inode in made else self._keeps(names=True)):
                del kept[entry]
        kept |= {entry: inode for entry, inode in now.items() if made[inode]}
        return {entry: self._content(name, entry, inode) for entry, inode in kept.items()}

    def _content(self, folder: str, entry: str, inode: int) -> Any:
        path = self.root / folder / entry
        relative = entry if folder == "." else f"{folder}/{entry}"
        same = path.exists() and path.stat().st_ino == inode
        if same and path.is_dir():
            return self.folder(relative)
        copy = self.shadow / str(inode)
        synced = copy.read_bytes() if copy.exists() else b""
        now = path.read_bytes() if same else synced
        if now == synced or self._keeps(names=False):
            return now
        added = len(now) - len(synced)
        torn = now[: len(synced) + self.choice.randrange(max(1, added))]
        return self.choice.choice([synced, torn, synced + bytes(max(0, added))])

    def _keeps(self, names: bool) -> bool:
        if self.loss == "everything":
            return False
        if self.loss == "names":
            return not names
        if self.loss == "bytes":
            return names
        return self.choice.random() < 0.5


def _write(folder: Path, tree: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in tree.items():
        if isinstance(content, dict):
            _write(folder / name, content)
        else:
            (folder / name).write_bytes(content)


def _listing(folder: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_ino for entry in os.scandir(folder)}
