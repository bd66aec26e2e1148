"""Where one step writes its files and what it reports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from rotdistill_core.errors import CheckFailed, SetupError
from rotdistill_core.store.files import (
    Blocks,
    CommittedFile,
    TensorSource,
    json_blocks,
    tensor_blocks,
    write_file,
)
from rotdistill_core.store.inside import require_inside
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.records import FileRecord, StepRecord
from rotdistill_core.store.results import StepReport

if TYPE_CHECKING:
    from torch import Tensor


class StepOutput:
    """Where one step writes.

    Files are committed one by one, so a step that is killed keeps what it had finished.

    Args:
        store: all runs; it verifies files.
        ledger: the run that is written to.
        key: the step's key, by which its files are found again.
        step: the step's id.
        before: the key of the state that the step starts from; empty if nobody says.
        others: ledgers of other runs in which files are looked up too.

    Raises:
        SetupError: the ledger is a link. Lines are appended to it, wherever it leads.
    """

    def __init__(
        self,
        store: ArtifactStore,
        ledger: Ledger,
        key: str,
        step: str = "",
        before: str = "",
        others: Iterable[Ledger] = (),
    ) -> None:
        if ledger.path.is_symlink():
            raise SetupError(
                f"{ledger.path}: is a link, so nothing is written to it. Put the file in its place."
            )
        self.store = store
        self.ledger = ledger
        self.key = key
        self.step = step
        self._before = before
        self.notes: dict[str, Any] = {}
        """Free notes of the step, for people; shown in the report, read by no program."""
        self.report = StepReport()
        """What programs read of the step, apart from its result."""
        self.used: dict[str, CommittedFile] = {}
        """Path -> file, for every file that makes up the result."""
        self._committed: dict[str, CommittedFile] = {}
        for each in (*others, ledger):
            for record in each.files:
                if record.key == key:
                    self._committed[record.name] = record.file

    @property
    def run_id(self) -> str:
        """Name of the run that is written to."""
        return self.ledger.folder.name

    def earlier_steps(self) -> Iterator[StepRecord]:
        """Yield the steps that led to the state that this one starts from, the last one first.

        The ledger has steps of other variants and of other inputs besides.
        """
        made = {record.key: record for record in self.ledger.steps}
        key = self._before
        while key in made:
            yield made[key]
            key = made[key].before

    def shared(self, *parts: str, code: str) -> StepOutput:
        """Return an output whose key is the hash of its content's origin, not of the steps before.

        Every run in the same folder finds the files under that key. They count as files of this
        step too.

        Args:
            parts: what the files are, and what they depend on: models, texts, dtype, device.
            code: hash of the code that makes them, so that an edit makes them anew; see
                `rotdistill_core.plugin.source_code`.
        """
        key = hashlib.sha256("\n".join([*parts, code]).encode()).hexdigest()
        shared = StepOutput(
            self.store, self.ledger, key, self.step, self._before, self.store.ledgers()
        )
        shared.used = self.used
        shared.notes = self.notes
        return shared

    def aside(self) -> StepOutput:
        """Return an output under the same key whose files are no part of the step's result.

        They only save work when a step is killed and run again. The result of a finished step
        stands without them.
        """
        aside = StepOutput(self.store, self.ledger, self.key, self.step, self._before)
        aside.notes = self.notes
        return aside

    def find(self, name: str) -> Path | None:
        """Return a file that this step committed before, if it still hashes true.

        A run that starts afresh finds what it has committed itself.
        """
        file = self._committed.get(name)
        if file is None or not self.store.may_be_used(file) or not self.store.verify(file):
            return None
        self.used[file.path] = file
        return self.store.root / file.path

    def names(self, beginning: str) -> list[str]:
        """Return the names of this step's committed files that begin so, sorted."""
        return sorted(name for name in self._committed if name.startswith(beginning))

    def write(self, name: str, blocks: Blocks) -> Path:
        """Commit a file of this step and return its path.

        The path is `name` in the run's folder. If a file of another key has that path, the first
        folder of the new path ends in the key.

        Raises:
            SetupError: the disk refuses, or the file would not lie in the run's folder.
        """
        if PurePosixPath(name) == PurePosixPath(RunLayout.LEDGER):
            raise SetupError(f"{self.ledger.path}: is written by the program alone.")
        path = f"{self.run_id}/{name}"
        if any(record.path == path and record.key != self.key for record in self.ledger.files):
            head, slash, tail = name.partition("/")
            path = f"{self.run_id}/{head}-{self.key[:6]}{slash}{tail}"
        return self._commit(name, path, blocks)

    def _commit(self, name: str, path: str, blocks: Blocks) -> Path:
        """Write a file at a path relative to the folder of all runs, and append its line."""
        require_inside(self.store.root / self.run_id, path.removeprefix(f"{self.run_id}/"))
        size, sha256 = write_file(self.store.root / path, blocks)
        file = CommittedFile(path, size, sha256)
        self.ledger.append(
            FileRecord(key=self.key, name=name, path=path, bytes=size, sha256=sha256)
        )
        self.store.committed(file)
        self._committed[name] = file
        self.used[path] = file
        return self.store.root / path

    def document(self, name: str, blocks: Iterable[bytes]) -> Path:
        """Return a small file of these bytes: committed before, else committed now.

        Each document is looked for by itself, so a run that was killed between two of them writes
        the second when it is carried out again. Its path is always `name` in the run's folder: a
        document of another key makes room, because it is about an earlier run.

        Raises:
            SetupError: the disk refuses.
        """
        content = b"".join(blocks)
        path = f"{self.run_id}/{name}"
        file = CommittedFile(path, len(content), hashlib.sha256(content).hexdigest())
        newest = next((each for each in reversed(self.ledger.files) if each.path == path), None)
        is_same = newest is not None and (newest.key, newest.file) == (self.key, file)
        if is_same and self.store.may_be_used(file) and self.store.verify(file):
            self.used[path] = file
            return self.store.root / path
        return self._commit(name, path, [content])

    def committed(self, path: str) -> Path:
        """Return where a file lies that the run commits, by its path in the ledger.

        Raises:
            CheckFailed: it does not hash true, or no line commits it.
        """
        file = self.ledger.committed.get(path)
        if file is None:
            raise CheckFailed(f"{self.ledger.path}: no line commits {path}.")
        return self.store.require(file)

    def relative(self, path: Path) -> str:
        """Return the path of a file relative to the folder of all runs, as ledgers name it."""
        return path.relative_to(self.store.root).as_posix()

    def json(self, name: str, value: object) -> Path:
        """Commit a JSON document."""
        return self.write(name, json_blocks(value))

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Commit a safetensors file of tensors at hand."""
        sources = {key: TensorSource.of(tensor) for key, tensor in tensors.items()}
        return self.write(name, tensor_blocks(sources))
