"""The append-only record of a run, and the results of all runs by key.

Commit protocol: `write_file` makes a file durable, then one appended and fsynced line of
`ledger.jsonl` states its length and sha256. Only that line commits. A line carries a mark, the hash
of its content, so a line that a crash tore or a hand edited counts for nothing. Readers compare a
file with its sha256 on first use; existence, modification times and locks prove nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from rotdistill_core.store.files import (
    CommittedFile,
    make_folder,
    sync_folder,
    unwritable,
    write_file,
)
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout, ledger_paths
from rotdistill_core.store.plain import COLLECTION_BYTES, read_bytes
from rotdistill_core.store.records import (
    CheckpointRecord,
    FileRecord,
    LedgerRecord,
    ParityRecord,
    StartRecord,
    StepRecord,
    record_as_json,
    record_from_json,
)
from rotdistill_core.store.results import Parity

SCHEMA = 3
"""Version of the records. Lines of another version commit nothing."""

AnyRecord = TypeVar("AnyRecord", bound=LedgerRecord)
KeyedRecord = TypeVar("KeyedRecord", StepRecord, CheckpointRecord)


class Ledger:
    """The records of one run, in the order in which they were committed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = RunLayout(folder).ledger
        self.records: list[LedgerRecord] = []
        self._marks: set[str] = set()
        for record, mark in self._read():
            self.records.append(record)
            self._marks.add(mark)

    def __contains__(self, record: LedgerRecord) -> bool:
        """Return whether a record of the same content is committed here."""
        return _mark(_content(record)) in self._marks

    @property
    def starts(self) -> list[StartRecord]:
        """What the run has started from."""
        return [record for record in self.records if isinstance(record, StartRecord)]

    @property
    def files(self) -> list[FileRecord]:
        """The files that were committed one by one."""
        return [record for record in self.records if isinstance(record, FileRecord)]

    @property
    def steps(self) -> list[StepRecord]:
        """The finished steps."""
        return [record for record in self.records if isinstance(record, StepRecord)]

    @property
    def checkpoints(self) -> list[CheckpointRecord]:
        """The saved variants."""
        return [record for record in self.records if isinstance(record, CheckpointRecord)]

    @property
    def parities(self) -> list[ParityRecord]:
        """The models and variants that were compared with transformers."""
        return [record for record in self.records if isinstance(record, ParityRecord)]

    def append(self, record: AnyRecord) -> AnyRecord:
        """Append one durable line; return the record as a later process reads it.

        Raises:
            SetupError: the disk refuses. Half a line may be left, which commits nothing.
        """
        content = _content(record)
        try:
            self._append_line(_line(content))
        except OSError as error:
            raise unwritable(self.path, error) from error
        committed = cast("AnyRecord", record_from_json(content))
        self.records.append(committed)
        self._marks.add(_mark(content))
        return committed

    def rewrite(self, records: Iterable[LedgerRecord]) -> None:
        """Replace all lines by those of `records`, atomically.

        Raises:
            SetupError: the disk refuses; the old lines stay.
        """
        kept = list(records)
        contents = [_content(record) for record in kept]
        write_file(self.path, [_line(content) for content in contents])
        self.records = kept
        self._marks = {_mark(content) for content in contents}

    def _read(self) -> Iterator[tuple[LedgerRecord, str]]:
        if not self.path.exists():
            return
        for line in read_bytes(self.path, COLLECTION_BYTES).split(b"\n"):
            try:
                content: dict[str, Any] = json.loads(line)
                mark = content.pop("mark")
                if mark != _mark(content) or content.get("schema") != SCHEMA:
                    continue
                record = record_from_json(content)
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                continue  # a line torn by a crash, or edited: it commits nothing
            yield record, mark

    def _append_line(self, line: bytes) -> None:
        make_folder(self.folder)
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


def _content(record: LedgerRecord) -> dict[str, Any]:
    """Return a record as the JSON values that will be read back.

    Going through JSON and back turns keys into strings, which sort as strings in the mark, and
    numbers into those that a later process will see.
    """
    read_back = record_from_json(json.loads(json.dumps(record_as_json(record))))
    content: dict[str, Any] = json.loads(json.dumps(record_as_json(read_back)))
    return {"schema": SCHEMA, **content}


def _mark(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps({**content, "mark": _mark(content)}, ensure_ascii=False)
    return (text + "\n").encode()


class ArtifactStore:
    """All runs in one folder: finds results by key, and verifies each file once per process."""

    def __init__(self, root: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self.warn = warn
        self._verified: dict[CommittedFile, bool] = {}

    def ledgers(self) -> list[Ledger]:
        """Return the ledgers of all runs."""
        return [Ledger(path.parent) for path in ledger_paths(self.root)]

    def find_step(self, key: str) -> StepRecord | None:
        """Return a finished step with this key, from any run, whose files all hash true."""
        for ledger in self.ledgers():
            record = self._newest(ledger.steps, key)
            if record is not None:
                return record
        return None

    def find_parity(self, key: str) -> Parity | None:
        """Return a comparison with transformers with this key, from any run."""
        records = (record for ledger in self.ledgers() for record in ledger.parities)
        return next((record.result for record in records if record.key == key), None)

    def find_checkpoint(self, key: str, ledger: Ledger) -> CheckpointRecord | None:
        """Return the newest checkpoint of a run with this key, if its files all hash true."""
        return self._newest(ledger.checkpoints, key)

    def _newest(self, records: Sequence[KeyedRecord], key: str) -> KeyedRecord | None:
        for record in reversed(records):
            if record.key == key:
                with ThreadPoolExecutor() as pool:  # hashing lets other threads run
                    intact = list(pool.map(self.verify, record.files))
                return record if all(intact) else None
        return None

    def verify(self, file: CommittedFile) -> bool:
        """Return whether a committed file still hashes true; warn by name the first time."""
        if file not in self._verified:
            path = self.root / file.path
            exists = path.is_file()
            intact = exists and path.stat().st_size == file.bytes and sha256_of(path) == file.sha256
            self._verified[file] = intact
            if not intact:
                fault = "its bytes do not match its sha256" if exists else "is gone"
                self.warn(f"{path}: {fault}; it is not used and will be made again.")
        return self._verified[file]

    def forget(self, file: CommittedFile) -> None:
        """Forget what was verified under a path that has just been written again."""
        for known in [known for known in self._verified if known.path == file.path]:
            del self._verified[known]

    def sweep(self, folder: Path) -> None:
        """Remove temporary files that a dead process left in a run."""
        for path in folder.rglob("*.tmp"):
            # NAME.PID.RANDOM.tmp, as `write_file` names them
            pid = path.name.split(".")[-3] if path.name.count(".") >= 3 else ""
            if pid.isdigit() and not _alive(int(pid)):
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's process
    return True
