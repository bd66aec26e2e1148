"""TODO: rotdistill_core.store.ledger."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rotdistill_core.store.files import CommittedFile, sync_folder, unwritable
from rotdistill_core.store.hashing import sha256_of

SCHEMA = 2


class Ledger:
    """The append-only record of one run, `ledger.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "ledger.jsonl"
        self.records: list[dict[str, Any]] = list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_bytes().split(b"\n"):
            try:
                record: dict[str, Any] = json.loads(line)
                whole = record.pop("mark") == _mark(record) and record.get("schema") == SCHEMA
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                continue  # a line torn by a crash, or edited: it commits nothing
            if whole:
                yield record

    def append(self, kind: str, **fields: Any) -> None:
        """Append one durable line.

        Raises:
            SetupError: the disk refuses; half a line may stay behind, which commits nothing.
        """
        # Through JSON once, so that what is marked is what will be read back (keys become strings, and sort as such).
        record = json.loads(json.dumps({"schema": SCHEMA, "kind": kind, **fields}))
        line = json.dumps({**record, "mark": _mark(record)}, ensure_ascii=False) + "\n"
        try:
            self._append_line(line.encode())
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.records.append(record)

    def _append_line(self, line: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.read_bytes()[-1:] != b"\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            rest = (b"\n" if torn else b"") + line
            while rest:  # the system may take only a part
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        sync_folder(self.folder)


def _mark(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()[:16]


class ArtifactStore:
    """All runs under one folder: finds a step's result by key, and verifies files once per process."""

    def __init__(self, root: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self.warn = warn
        self._good: dict[str, bool] = {}

    def ledgers(self) -> list[Ledger]:
        """Return the ledgers of all runs."""
        return [Ledger(path.parent) for path in sorted(self.root.glob("*/ledger.jsonl"))]

    def verify(self, file: CommittedFile) -> bool:
        """Return whether a committed file still hashes true; the first failure is reported by name."""
        key = f"{file.path}:{file.sha256}"
        if key not in self._good:
            path = self.root / file.path
            exists = path.is_file()
            self._good[key] = (
                exists and path.stat().st_size == file.bytes and sha256_of(path) == file.sha256
            )
            if not self._good[key]:
                fault = "its bytes do not match its sha256" if exists else "is gone"
                self.warn(f"{path}: {fault}; it is not used and will be made again.")
        return self._good[key]

    def forget(self, file: CommittedFile) -> None:
        """Drop what is known of a path that has just been written again."""
        self._good = {k: v for k, v in self._good.items() if not k.startswith(f"{file.path}:")}

    def find(self, key: str, only: Ledger | None = None) -> dict[str, Any] | None:
        """Return the newest committed step record with this key whose files all hash true, from any run or from `only` one."""
        for ledger in [only] if only else self.ledgers():
            for record in ledger.records[::-1]:
                if record["kind"] == "step" and record["key"] == key:
                    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
                        whole = list(
                            pool.map(self.verify, (CommittedFile(**f) for f in record["files"]))
                        )
                    if all(whole):
                        return record
                    break
        return None

    def sweep(self, folder: Path) -> None:
        """Remove temporary files that a dead process left in a run."""
        for path in folder.rglob("*.tmp"):
            pid = path.name.split(".")[-3] if path.name.count(".") >= 3 else ""
            if pid.isdigit() and not _alive(int(pid)):
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # somebody else's
    return True
