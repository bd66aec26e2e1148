"""The append-only record of a run, and the results of all runs by key.

Commit protocol: `write_file` makes a file durable, then one appended and fsynced line of
`ledger.jsonl` states its length and sha256. Only that line commits. A line carries a mark, the hash
of its content, and the marks of the lines before it; see `rotdistill_core.store.chain`. A line that
a crash tore or a hand edited counts for nothing, and a lost one is seen. Readers compare a file
with its sha256 on first use; existence, modification times and locks prove nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.store.chain import (
    Chain,
    Generation,
    LedgerFault,
    chained_lines,
    content_digest,
    content_of,
    mending,
)
from rotdistill_core.store.files import (
    CommittedFile,
    make_folder,
    sync_folder,
    unwritable,
    write_file,
)
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout, ledger_paths
from rotdistill_core.store.place import this_place
from rotdistill_core.store.plain import (
    COLLECTION_BYTES,
    KINDS,
    open_plain,
    read_bytes,
    require_plain,
)
from rotdistill_core.store.records import (
    CheckpointRecord,
    FailureRecord,
    FileRecord,
    LedgerRecord,
    ParityRecord,
    RemovalRecord,
    StartRecord,
    StepRecord,
    record_from_json,
)
from rotdistill_core.store.results import Parity

LOCK_TRIES = 100
LOCK_SECONDS = 0.02
"""How long an appender waits for another process: in all two seconds."""

AnyRecord = TypeVar("AnyRecord", bound=LedgerRecord)
KeyedRecord = TypeVar("KeyedRecord", StepRecord, CheckpointRecord)


class Ledger:
    """The records of one run, in the order in which they were committed.

    Raises:
        SetupError: the file is there and cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._generation: Generation | None = None
        """Which processes of a launch write; None for one that no launcher restarts."""
        self.path = RunLayout(folder).ledger
        self.records: list[LedgerRecord] = []
        self._chain = Chain()
        self._contents: set[str] = set()
        """Digests of what is committed here."""
        self._place = (0, 0)
        """Device and inode of the file as it was read."""
        self._read_bytes = 0
        """How much of the file was read, in whole lines."""
        self._tail = b""
        """What follows: the line that a crash tore, if the file does not end in a newline."""
        self.refresh()

    def __contains__(self, record: LedgerRecord) -> bool:
        """Return whether a record of the same content is committed here."""
        return content_digest(record) in self._contents

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
    def failures(self) -> list[FailureRecord]:
        """The steps that raised, those too that were made later."""
        return [record for record in self.records if isinstance(record, FailureRecord)]

    def failed_last(self, key: str) -> bool:
        """Return whether the newest that is known of a step is that it raised."""
        known = (r for r in reversed(self.records) if isinstance(r, StepRecord | FailureRecord))
        return isinstance(next((r for r in known if r.key == key), None), FailureRecord)

    def failed_since(self, record: StepRecord, variant: str) -> bool:
        """Return whether a step of that name raised in a variant after one was made."""
        for each in reversed(self.records):
            if isinstance(each, FailureRecord) and (each.variant, each.id) == (variant, record.id):
                return True
            if each == record:
                return False
        return False

    def has_later(self, record: StepRecord) -> bool:
        """Return whether readers of the run would take a later record in the place of one.

        They follow a variant from the start, step by step, and take the newest record of each.
        """
        starts = {start.key for start in self.starts}

        def place(step: StepRecord) -> tuple[str, str]:
            if step.variant:  # an evaluator's key is that of a checkpoint, which is in no chain
                return step.id, step.variant
            return step.id, "" if step.before in starts else step.before

        newest = {place(step): step for step in self.steps}
        return newest.get(place(record), record) != record

    @property
    def checkpoints(self) -> list[CheckpointRecord]:
        """The saved variants."""
        return [record for record in self.records if isinstance(record, CheckpointRecord)]

    @property
    def parities(self) -> list[ParityRecord]:
        """The models and variants that were compared with transformers."""
        return [record for record in self.records if isinstance(record, ParityRecord)]

    @property
    def removals(self) -> list[RemovalRecord]:
        """What was removed on purpose, with its records."""
        return [record for record in self.records if isinstance(record, RemovalRecord)]

    @property
    def committed(self) -> dict[str, CommittedFile]:
        """Path -> file, for every file that the ledger commits, as its last line states it."""
        files = {file.path: file for record in self.steps for file in record.files}
        files |= {file.path: file for record in self.checkpoints for file in record.files}
        return files | {record.path: record.file for record in self.files}

    @property
    def faults(self) -> list[LedgerFault]:
        """Damaged lines and places where lines are missing, those apart that are mended."""
        return self._chain.faults + self.torn

    @property
    def torn(self) -> list[LedgerFault]:
        """The fault of a torn last line, which is ordinary after a crash; the next line ends it."""
        return [self._chain.torn_fault(self._tail)] if self._tail else []

    @property
    def is_chained(self) -> bool:
        """Whether a line names the lines before it, as those of older versions did not."""
        return self._chain.is_chained

    def named(self, name: str) -> FileRecord | None:
        """Return the newest record of a file by the name that its step gave it."""
        return next((record for record in reversed(self.files) if record.name == name), None)

    def append(self, record: AnyRecord) -> AnyRecord:
        """Append one durable line; return the record as a later process reads it.

        Raises:
            SetupError: the disk refuses. Half a line may be left, which commits nothing. Or the
                launcher has replaced this process by a newer generation.
        """
        content = content_of(record)
        self._append([content])
        return cast("AnyRecord", record_from_json(content))

    def mend(self) -> None:
        """Append a line that names all faults so far, so that they are not told again.

        What damaged lines recorded stays lost; the run finds it or makes it anew.

        Raises:
            SetupError: the disk refuses.
        """
        self._append([])

    def begin_generation(self, launch: str) -> None:
        """Append a line that says that this process writes for a launch from now on.

        No process that wrote for it before can append anything more: its launcher has replaced it.

        Raises:
            SetupError: the disk refuses.
        """
        self.refresh()
        number = self._chain.generations.get(launch, -1) + 1
        self._generation = Generation(launch, number)
        self._append([mending(())])

    def rewrite(self, records: Iterable[LedgerRecord]) -> None:
        """Replace all lines by those of `records`, atomically.

        Raises:
            SetupError: the disk refuses; the old lines stay.
        """
        write_file(self.path, [chained_lines(map(content_of, records), [])])
        self.refresh()

    def refresh(self) -> None:
        """Read what this and other processes have appended since the last call.

        Raises:
            SetupError: the file cannot be read, or is a folder, a pipe or a device.
        """
        try:
            if not self.path.exists():
                self._forget()
                return
            with open_plain(self.path) as stream:
                self._catch_up(stream.fileno())
        except OSError as error:
            raise SetupError(f"{self.path}: cannot be read: {error.strerror}.") from error

    def _append(self, contents: Sequence[Mapping[str, Any]]) -> None:
        """Append lines; without any, one that mends all faults."""
        try:
            make_folder(self.folder)
            if self.path.exists():
                require_plain(self.path)
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                _lock(handle)
                self._catch_up(handle)
                self._require_newest_generation()
                torn = self._end_torn_line(handle)
                faults = torn if contents else self._chain.faults
                mend = [mending(faults)] if faults else []
                _write_all(
                    handle, chained_lines([*mend, *contents], self._chain.tips, self._generation)
                )
                os.fsync(handle)
                self._catch_up(handle)
            finally:
                os.close(handle)
            sync_folder(self.folder)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _require_newest_generation(self) -> None:
        """Raise SetupError if the launcher has replaced this process."""
        if self._generation is None:
            return
        own = self._generation.number
        newest = self._chain.generations.get(self._generation.launch, own)
        if newest > own:
            raise SetupError(
                f"{self.path}: this process is of generation {own}, and its launcher has started "
                f"generation {newest} since, which carries on with the run. Nothing was committed "
                "by this process; end it if it goes on."
            )

    def _end_torn_line(self, handle: int) -> list[LedgerFault]:
        """End a line that a crash tore. Return its fault, which is ordinary and not told."""
        if not self._tail:
            return []
        known = {fault.id for fault in self._chain.faults}
        _write_all(handle, b"\n")
        self._catch_up(handle)
        return [f for f in self._chain.faults if f.id not in known and not f.is_gap]

    def _catch_up(self, handle: int) -> None:
        """Read the lines that follow those that were read; all, if the file is another one."""
        status = os.fstat(handle)
        place = (status.st_dev, status.st_ino)
        if place != self._place or status.st_size < self._read_bytes:
            self._forget()
            self._place = place
        if status.st_size > COLLECTION_BYTES:
            raise OSError(errno.EFBIG, f"it is longer than {COLLECTION_BYTES} bytes")
        os.lseek(handle, self._read_bytes, os.SEEK_SET)
        with os.fdopen(handle, "rb", closefd=False) as stream:
            data = stream.read()
        *lines, self._tail = data.split(b"\n")
        self._read_bytes += len(data) - len(self._tail)
        for entry in filter(None, map(self._chain.read, lines)):
            self.records.append(entry.record)
            self._contents.add(entry.digest)

    def _forget(self) -> None:
        self.records.clear()
        self._contents.clear()
        self._chain = Chain()
        self._place, self._read_bytes, self._tail = (0, 0), 0, b""


def _lock(handle: int) -> None:
    """Wait a moment until no other process appends.

    Two lines may then not come after the same one. They may, so nothing depends on the lock: some
    file systems have none, and a process that was stopped keeps its own.
    """
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_SECONDS)
        except OSError:
            return
        else:
            return


def _write_all(handle: int, data: bytes) -> None:
    while data:  # the system may take only a part
        data = data[os.write(handle, data) :]


class ArtifactStore:
    """All runs in one folder: finds results by key, and verifies each file once per process.

    Args:
        root: the folder.
        warn: takes one line about a file that is damaged.
        fresh: find nothing but what this process has committed.
    """

    def __init__(
        self, root: Path, warn: Callable[[str], None] = lambda _: None, fresh: bool = False
    ) -> None:
        self.root = root
        self.warn = warn
        self.fresh = fresh
        self._unreadable: set[Path] = set()
        """Ledgers of which it has been told that they cannot be read."""
        self._made: set[CommittedFile] = set()
        """What this process has committed."""
        self._verified: dict[CommittedFile, str] = {}
        """File -> what is wrong with it; empty if it hashes true."""

    def ledgers(self) -> list[Ledger]:
        """Return the ledgers of all runs.

        One that cannot be read is told once and left out: other runs go on without its results.
        """
        found = []
        for path in ledger_paths(self.root):
            try:
                found.append(Ledger(path.parent))
            except SetupError as error:
                if path not in self._unreadable:
                    self._unreadable.add(path)
                    self.warn(f"{error} Nothing of that run is used.")
        return found

    def find_step(self, key: str) -> StepRecord | None:
        """Return a finished step with this key, from any run, whose files all hash true.

        The files of earlier steps that its result refers to hash true, too.
        """
        ledgers = self.ledgers()
        for ledger in ledgers:
            record = self._newest(ledger.steps, key)
            if record and record.is_whole and self._has_result(record, ledgers):
                return record
        return None

    def _has_result(self, record: StepRecord, ledgers: Sequence[Ledger]) -> bool:
        """Return whether every file of a step's result is committed by some run, and true."""
        elsewhere = {*record.result.paths()} - {file.path for file in record.files}
        if not elsewhere:
            return True
        committed = [ledger.committed for ledger in ledgers]
        return all(
            any(path in files and not self.fault_of(files[path]) for files in committed)
            for path in elsewhere
        )

    def find_parity(self, key: str) -> Parity | None:
        """Return a comparison with transformers with this key, from any run."""
        records = (record for ledger in self.ledgers() for record in ledger.parities)
        return next((record.result for record in records if record.key == key), None)

    def find_checkpoint(self, key: str, ledger: Ledger) -> CheckpointRecord | None:
        """Return the newest checkpoint of a run with this key, if its files all hash true."""
        record = self._newest(ledger.checkpoints, key)
        return None if record is None or self.manifest_problem(record) else record

    def may_be_used(self, file: CommittedFile) -> bool:
        """Return whether a run that starts afresh may take a file; any other run may."""
        return not self.fresh or file in self._made

    def _newest(self, records: Sequence[KeyedRecord], key: str) -> KeyedRecord | None:
        for record in reversed(records):
            if record.key == key:
                if not all(map(self.may_be_used, record.files)):
                    return None
                with ThreadPoolExecutor() as pool:  # hashing lets other threads run
                    intact = list(pool.map(self.verify, record.files))
                return record if all(intact) else None
        return None

    def verify(self, file: CommittedFile) -> bool:
        """Return whether a committed file still hashes true; warn by name the first time."""
        is_new = file not in self._verified
        fault = self.fault_of(file)
        if fault and is_new:
            self.warn(f"{self.root / file.path}: {fault}; it is not used and will be made again.")
        return not fault

    def fault_of(self, file: CommittedFile) -> str:
        """Return what is wrong with a committed file, in words; nothing if it hashes true."""
        if file not in self._verified:
            self._verified[file] = _fault(self.root / file.path, file)
        return self._verified[file]

    def require(self, file: CommittedFile) -> Path:
        """Return the path of a committed file that hashes true; readers beside a run ask here.

        Raises:
            CheckFailed: it does not, or it is gone.
        """
        path = self.root / file.path
        fault = self.fault_of(file)
        if fault:
            raise CheckFailed(
                f"{path}: {fault}, so it is not used. Carry out the recipe of the run again; that "
                "makes the file anew."
            )
        return path

    def require_checkpoint(self, record: CheckpointRecord) -> Path:
        """Return the folder of a checkpoint whose files all hash true.

        Raises:
            CheckFailed: a file does not, or the manifest does not name the same hashes.
        """
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            list(pool.map(self.fault_of, record.files))
        for file in record.files:
            self.require(file)
        problem = self.manifest_problem(record)
        if problem:
            raise CheckFailed(problem)
        return self.root / record.folder

    def manifest_problem(self, record: CheckpointRecord) -> str:
        """Return what the manifest of a checkpoint says otherwise than its record, in words."""
        folder = self.root / record.folder
        path = folder / RunLayout.MANIFEST
        files = {self.root / file.path: file for file in record.files}
        if path not in files:
            return f"{folder}: its record names no {RunLayout.MANIFEST}, so it is not whole."
        expected = {each.name: file.sha256 for each, file in files.items() if each != path}
        if json.loads(read_bytes(path)) != expected:
            return f"{path}: does not name the files of the checkpoint's record with their hashes."
        return ""

    def committed(self, file: CommittedFile) -> None:
        """Take note of a file that was written and committed just now."""
        self._made.add(file)
        for known in [known for known in self._verified if known.path == file.path]:
            del self._verified[known]

    def sweep(self, folder: Path) -> None:
        """Remove temporary files that dead processes of this place left in a run.

        Those of another host or container stay: only its system knows whether somebody writes them.
        """
        here = this_place()
        for path in filter(here.has_left, folder.rglob("*.tmp")):
            path.unlink(missing_ok=True)


def _fault(path: Path, file: CommittedFile) -> str:
    """Return what is wrong with a file, in words; nothing if it is as committed."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "is gone"
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        return f"is {kind} where a file belongs"
    intact = status.st_size == file.bytes and sha256_of(path) == file.sha256
    return "" if intact else "does not match its sha256 in the ledger"
