"""Model references: what a recipe names becomes a local folder with a config, an adapter and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint.headers import shard_files
from rotdistill_core.errors import SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.hashing import sha256_of

if TYPE_CHECKING:
    import torch

    from rotdistill_core.checkpoint.weights import Weights


MANIFEST = "COMPLETE"
FINGERPRINT_BYTES = 1 << 16
"""Bytes at each place."""
TOKENIZER_FILES = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "generation_config",
)

Log = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """An opened model: nothing of it is in memory yet."""

    ref: ModelRef
    folder: Path
    config: Mapping[str, Any]
    adapter: Adapter

    @cached_property
    def sha256(self) -> str:
        """Hash of weights, config and tokenizer: what makes two references the same model."""
        files = sorted({*shard_files(self.folder), *tokenizer_files(self.folder)})
        lines = [
            *(f"{path.name} {sha256_of(path)}" for path in files),
            json.dumps(self.config, sort_keys=True),
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config and of a little of each file: tells models apart without reading their weights."""
        found = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted({*shard_files(self.folder), *tokenizer_files(self.folder)}):
            with path.open("rb") as stream:
                for place in range(
                    0, size := path.stat().st_size, max(FINGERPRINT_BYTES, size // 4)
                ):
                    stream.seek(place)
                    found.update(stream.read(FINGERPRINT_BYTES))
            found.update(f"{path.name} {size}".encode())
        return found.hexdigest()

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self.adapter.depth(self.config)

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.adapter.sizes(self.config)["residual"]

    @cached_property
    def weights(self) -> Weights:
        """The weights as a lazy view."""
        from rotdistill_core.checkpoint.weights import open_folder

        return open_folder(self.folder, self.config, self.adapter)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, from the folder."""
        return load_tokenizer(self.folder)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        import torch

        name = self.ref.device
        return torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: float32 on CPU (bfloat16 is slow there, and on some processors not to be trusted)."""
        import torch

        if self.ref.dtype != "auto":
            return getattr(torch, self.ref.dtype)  # type: ignore[no-any-return]
        return torch.float32 if self.device.type == "cpu" else self.weights.dtype


@dataclass(frozen=True)
class Pair:
    """Teacher and student, and an anchor of the student's shape where the recipe names one."""

    teacher: Model
    student: Model
    anchor: Model | None = None

    @property
    def for_alignment(self) -> Pair:
        """The pair that aligners see: with an anchor, that stands in the teacher's place."""
        return Pair(self.anchor, self.student) if self.anchor else self

    @property
    def same(self) -> bool:
        """Whether the student starts as the teacher itself, so that both share one basis."""
        return self.teacher.sha256 == self.student.sha256

    @cached_property
    def one_tokenizer(self) -> bool:
        """Whether both give the same ids to the same tokens."""
        return self.same or self.student.tokenizer.get_vocab() == self.teacher.tokenizer.get_vocab()

    def teacher_depth(self, boundary: int) -> int:
        """Return the teacher's layer boundary at the same relative depth as a boundary of the original student."""
        return round(boundary * self.teacher.depth / self.student.depth)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that belong to the tokenizer and to generation."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.startswith(TOKENIZER_FILES))


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, without network and without remote code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
