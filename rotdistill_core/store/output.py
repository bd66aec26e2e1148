"""Where one step writes its files and what it reports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotdistill_core.store.files import (
    Blocks,
    CommittedFile,
    json_blocks,
    tensor_blocks,
    write_file,
)
from rotdistill_core.store.ledger import ArtifactStore, Ledger
from rotdistill_core.store.results import StepReport

if TYPE_CHECKING:
    from torch import Tensor


class StepOutput:
    """Where one step writes. Files are committed one by one, so a killed step keeps what it had finished."""

    def __init__(
        self,
        store: ArtifactStore,
        ledger: Ledger,
        key: str,
        step: str = "",
        others: Iterable[Ledger] = (),
    ) -> None:
        self.store, self.ledger, self.key, self.step = store, ledger, key, step
        self.notes: dict[str, Any] = {}
        """Free notes of the step, for people; shown in the report, read by no program."""
        self.report = StepReport()
        """What programs read of the step beside its result."""
        self.used: dict[str, CommittedFile] = {}
        """Files that make up the result."""
        self._mine: dict[str, CommittedFile] = {}
        for each in (*others, ledger):
            for r in each.records:
                if r["kind"] == "file" and r["step"] == key:
                    self._mine[r["name"]] = CommittedFile(r["path"], r["bytes"], r["sha256"])

    @property
    def run_id(self) -> str:
        """The run that solves: names the folder of rotations."""
        return self.ledger.folder.name

    def shared(self, *parts: str) -> StepOutput:
        """Return a place keyed by content instead of by the steps before, so that every run under this folder shares its files.

        Its files count as this step's own.
        """
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        shared = StepOutput(self.store, self.ledger, key, self.step, self.store.ledgers())
        shared.used = self.used
        return shared

    def find(self, name: str) -> Path | None:
        """Return a file that this step committed before, if it still hashes true."""
        file = self._mine.get(name)
        if file is None or not self.store.verify(file):
            return None
        self.used[file.path] = file
        return self.store.root / file.path

    def write(self, name: str, blocks: Blocks) -> Path:
        """Commit a file of this step and return its path: `name` in the run folder, or beside it when that is another key's."""
        path = f"{self.run_id}/{name}"
        if any(
            r["kind"] == "file" and r["path"] == path and r["step"] != self.key
            for r in self.ledger.records
        ):
            head, _, tail = name.partition("/")
            path = f"{self.run_id}/{head}-{self.key[:6]}/{tail}"
        size, digest = write_file(self.store.root / path, blocks)
        file = CommittedFile(path, size, digest)
        self.ledger.append("file", step=self.key, name=name, path=path, bytes=size, sha256=digest)
        self.store.forget(file)
        self._mine[name] = self.used[path] = file
        return self.store.root / path

    def json(self, name: str, value: object) -> Path:
        """Commit a JSON document."""
        return self.write(name, json_blocks(value))

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Commit a safetensors file of tensors that are at hand."""
        return self.write(
            name,
            tensor_blocks(
                {k: (tuple(t.shape), t.dtype, lambda t=t: t) for k, t in tensors.items()}
            ),
        )  # type: ignore[misc]
