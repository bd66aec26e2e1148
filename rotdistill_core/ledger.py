"""The one place that writes files, and the ledger that says which of them count.

Commit protocol: write to a unique temporary name in the same folder while hashing, fsync, rename, fsync the folder, then append
one fsynced ledger line with length and sha256. Only that line commits. Reading verifies the hash on first use; existence,
modification times and locks prove nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotdistill_core.errors import SetupError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCHEMA = 1
BLOCK = 1 << 22
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32", "BOOL": "bool"}
WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "BOOL": 1}

Blocks = Iterable[bytes | memoryview]


@dataclass(frozen=True)
class File:
    """A committed file: path relative to the folder of all runs, length and sha256."""

    path: str
    bytes: int
    sha256: str


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_file(path: Path, blocks: Blocks) -> tuple[int, str]:
    """Write a file atomically and durably; return its length and sha256.

    Raises:
        SetupError: the disk refuses (full, read-only); nothing is left behind under the final name.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                for block in blocks:
                    digest.update(block)
                    size += stream.write(block)
                    del block  # before the next one is made
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # there only when something failed before the rename
        _sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    return size, digest.hexdigest()


def _unwritable(path: Path, error: OSError) -> SetupError:
    return SetupError(f"{path}: cannot be written: {error.strerror}. What was committed before stays valid.")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_blocks(value: object) -> Blocks:
    """Return a value as readable JSON."""
    return [(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()]


def tensor_blocks(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file: header from shapes and dtypes, then each tensor as it is computed, one in memory at a time."""
    import torch

    codes = {getattr(torch, name): code for code, name in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype, _) in tensors.items():
        end = offset + WIDTH[codes[dtype]] * math.prod(shape)
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for shape, dtype, read in tensors.values():
        tensor = read().to("cpu", dtype).contiguous()
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"tensor of shape {tuple(tensor.shape)} where {shape} was declared")
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data
        del tensor  # before the next one is made


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
            raise _unwritable(self.path, error) from error
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
        _sync_folder(self.folder)


def _mark(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


class Store:
    """All runs under one folder: finds a step's result by key, and verifies files once per process."""

    def __init__(self, root: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self.warn = warn
        self._good: dict[str, bool] = {}

    def ledgers(self) -> list[Ledger]:
        """Return the ledgers of all runs."""
        return [Ledger(path.parent) for path in sorted(self.root.glob("*/ledger.jsonl"))]

    def verify(self, file: File) -> bool:
        """Return whether a committed file still hashes true; the first failure is reported by name."""
        key = f"{file.path}:{file.sha256}"
        if key not in self._good:
            path = self.root / file.path
            exists = path.is_file()
            self._good[key] = exists and path.stat().st_size == file.bytes and sha256_of(path) == file.sha256
            if not self._good[key]:
                fault = "its bytes do not match its sha256" if exists else "is gone"
                self.warn(f"{path}: {fault}; it is not used and will be made again.")
        return self._good[key]

    def forget(self, file: File) -> None:
        """Drop what is known of a path that has just been written again."""
        self._good = {k: v for k, v in self._good.items() if not k.startswith(f"{file.path}:")}

    def find(self, key: str, only: Ledger | None = None) -> dict[str, Any] | None:
        """Return the newest committed step record with this key whose files all hash true, from any run or from `only` one."""
        for ledger in [only] if only else self.ledgers():
            for record in ledger.records[::-1]:
                if record["kind"] == "step" and record["key"] == key:
                    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
                        whole = list(pool.map(self.verify, (File(**f) for f in record["files"])))
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


class Out:
    """Where one step writes. Files are committed one by one, so a killed step keeps what it had finished."""

    def __init__(self, store: Store, ledger: Ledger, key: str, step: str = "", others: Iterable[Ledger] = ()) -> None:
        self.store, self.ledger, self.key, self.step = store, ledger, key, step
        self.notes: dict[str, Any] = {}
        """What the step wants remembered beside its result; shown in the report."""
        self.used: dict[str, File] = {}
        """Files that make up the result."""
        self._mine: dict[str, File] = {}
        for each in (*others, ledger):
            for r in each.records:
                if r["kind"] == "file" and r["step"] == key:
                    self._mine[r["name"]] = File(r["path"], r["bytes"], r["sha256"])

    @property
    def run_id(self) -> str:
        """The run that solves: names the folder of rotations."""
        return self.ledger.folder.name

    def keyed(self, *parts: str) -> Out:
        """Return a place keyed by content instead of by the steps before, so that every run under this folder shares its files.

        Its files count as this step's own.
        """
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        shared = Out(self.store, self.ledger, key, self.step, self.store.ledgers())
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
        if any(r["kind"] == "file" and r["path"] == path and r["step"] != self.key for r in self.ledger.records):
            head, _, tail = name.partition("/")
            path = f"{self.run_id}/{head}-{self.key[:6]}/{tail}"
        size, digest = write_file(self.store.root / path, blocks)
        file = File(path, size, digest)
        self.ledger.append("file", step=self.key, name=name, path=path, bytes=size, sha256=digest)
        self.store.forget(file)
        self._mine[name] = self.used[path] = file
        return self.store.root / path

    def json(self, name: str, value: object) -> Path:
        """Commit a JSON document."""
        return self.write(name, json_blocks(value))

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Commit a safetensors file of tensors that are at hand."""
        return self.write(name, tensor_blocks({k: (tuple(t.shape), t.dtype, lambda t=t: t) for k, t in tensors.items()}))  # type: ignore[misc]
