"""Opened models: folder, config, adapter and hashes. Weights and tokenizers load on use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint.file_hashes import FileHashes, sample_of
from rotdistill_core.checkpoint.foreign import reading
from rotdistill_core.checkpoint.headers import (
    REMOTE_CODE,
    TEMPLATE_FOLDER,
    read_object,
    require_plain_files,
    shard_files,
)
from rotdistill_core.errors import SetupError
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import COLLECTION_BYTES, read_bytes

if TYPE_CHECKING:
    import torch

    from rotdistill_core.checkpoint.weights import Weights


TOKENIZER_FILES = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "generation_config",
    "spiece",
    "sentencepiece",
    "tekken",
    "tiktoken",
)
"""How the names of files begin that belong to the tokenizer and to generation."""
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
TOKENIZER_DOCUMENTS = (TOKENIZER_CONFIG, "special_tokens_map.json", ADDED_TOKENS)
"""What stands beside a vocabulary: each is one JSON object."""
GENERATION_CONFIG = "generation_config.json"

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)
"""Files of which a tokenizer has at least one. Others, generation_config.json too, make none."""

Log = Callable[[str], None]
"""Shows the user one line."""


@dataclass(frozen=True)
class Model:
    """An opened model. Nothing of it is in memory yet."""

    ref: ModelRef
    folder: Path
    config: Mapping[str, Any]
    adapter: Adapter
    table_code: str = ""
    """Hash of the code that the adapter's table comes from."""
    hashes: FileHashes = field(default_factory=FileHashes, compare=False, repr=False)
    """What hashes its files; models of one run share it, and so a file that they share is read
    once."""

    @cached_property
    def sha256(self) -> str:
        """Hash of weights, config and tokenizer: two references with one hash are one model.

        Files that an earlier run has hashed are not read again; see `FileHashes` for the limit.
        """
        files = self._files
        hashes = self.hashes.of(files)
        names = [path.relative_to(self.folder).as_posix() for path in files]
        lines = [f"{name} {sha256}" for name, sha256 in zip(names, hashes, strict=True)]
        lines.append(self._config_text)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config and of a little of each file; cheap, and tells models apart."""
        found = hashlib.sha256(self._config_text.encode())
        for path in self._files:
            for block in sample_of(path):
                found.update(block)
            name = path.relative_to(self.folder).as_posix()
            found.update(f"{name} {path.stat().st_size}".encode())
        return found.hexdigest()

    @property
    def _files(self) -> list[Path]:
        return sorted({*shard_files(self.folder), *tokenizer_files(self.folder)})

    @property
    def _config_text(self) -> str:
        return json.dumps(self.config, sort_keys=True)

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self.adapter.depth(self.config)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.adapter.sizes(self.config)["residual"]

    @cached_property
    def weights(self) -> Weights:
        """The weights as a lazy view."""
        from rotdistill_core.checkpoint.weights import open_folder  # noqa: PLC0415  (loads torch)

        return open_folder(self.folder, self.config, self.adapter)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, from the folder."""
        return load_tokenizer(self.folder)

    def require_known_tokens(self, tokens: Iterable[int], what: str) -> None:
        """Refuse tokens that have no row in the embedding.

        Args:
            tokens: token ids.
            what: names the text, for the error.

        Raises:
            SetupError: naming the token and the rows.
        """
        require_known_tokens(self.folder, self.weights, tokens, what)

    @property
    def device(self) -> torch.device:
        """Where the model computes.

        Raises:
            SetupError: this machine has no such device.
        """
        # plan opens models without torch
        from rotdistill_core.checkpoint.devices import resolve_device  # noqa: PLC0415

        return resolve_device(self.ref.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the model computes.

        On a CPU it is float32: bfloat16 is slow there, and wrong on some processors.
        """
        import torch  # noqa: PLC0415  (plan opens models without it)

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
    def by_role(self) -> dict[str, Model]:
        """The models by their role in a recipe."""
        models = {"teacher": self.teacher, "student": self.student, "anchor": self.anchor}
        return {role: model for role, model in models.items() if model}

    @property
    def for_alignment(self) -> Pair:
        """The pair that aligners see: an anchor takes the teacher's place."""
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
        """Return the teacher's layer boundary at the relative depth of one of the student's.

        `boundary` counts in the original student, before any cut.
        """
        return round(boundary * self.teacher.depth / self.student.depth)


def is_unedited(view: Weights, model: Model) -> bool:
    """Return whether a view has every tensor of a model as it was opened.

    A head that was untied is no edit: it is the embedding.
    """
    same_depth = len(view.lineage.depths) == model.depth + 1
    own = model.weights.entries
    return same_depth and all(view.entries.get(name) is entry for name, entry in own.items())


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that belong to the tokenizer and to generation, named templates included."""
    beside = (
        path
        for path in folder.iterdir()
        if path.name.startswith(TOKENIZER_FILES) and path.suffix != ".safetensors"
    )
    found = [*beside, *folder.glob(f"{TEMPLATE_FOLDER}/*.jinja")]
    return sorted(path for path in found if path.is_file())


def tokenizer_contents(folder: Path) -> dict[str, bytes]:
    """Return what a checkpoint with this tokenizer holds: file name -> bytes.

    The names of classes that come with a model are left out: their code is not copied.

    Raises:
        SetupError: a file cannot be read.
    """
    contents = {}
    for path in tokenizer_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            contents[name] = read_bytes(path, COLLECTION_BYTES)
        except OSError as error:
            raise SetupError(f"{path}: cannot be read: {error.strerror}.") from error
        if name == TOKENIZER_CONFIG and REMOTE_CODE.encode() in contents[name]:
            config = read_object(path)
            plain = {key: value for key, value in config.items() if key != REMOTE_CODE}
            contents[name] = json.dumps(plain, indent=2, ensure_ascii=False).encode()
    return contents


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder has a tokenizer that could be loaded."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def require_vocabulary(folder: Path) -> None:
    """Refuse a folder that has no tokenizer.

    Raises:
        SetupError: it holds none of the files that a tokenizer is made of.
    """
    if not has_vocabulary(folder):
        raise SetupError(
            f"{folder}: has no tokenizer: none of {', '.join(VOCABULARY_FILES)} is there. Save the "
            "tokenizer beside the weights."
        )


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, without network and without remote code.

    Raises:
        SetupError: transformers cannot load it, or would open what is no plain file.
    """
    check_tokenizer(folder)
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415  (takes seconds)

    require_plain_files(folder)
    options = {"local_files_only": True, "trust_remote_code": False}
    with reading(folder, "its tokenizer"):
        try:
            return AutoTokenizer.from_pretrained(folder, **options)
        except Exception:
            # It reads the config, too. If that is the cause, the error names it.
            if (folder / RunLayout.CONFIG).is_file():
                with reading(folder / RunLayout.CONFIG, "the config"):
                    AutoConfig.from_pretrained(folder, **options)
            raise


def require_known_tokens(folder: Path, weights: Weights, tokens: Iterable[int], what: str) -> None:
    """Refuse tokens that have no row in the embedding of a model; see the method of `Model`."""
    rows = weights.entries[weights.adapter.embedding].shape[0]
    largest = max(tokens, default=0)
    if largest >= rows:
        raise SetupError(
            f"{folder}: its tokenizer makes token {largest} of {what}, and its embedding has "
            f"{rows} rows. The tokenizer belongs to another model, or the model was not resized "
            "when tokens were added."
        )


def check_tokenizer(folder: Path) -> None:
    """Check what can be checked of a tokenizer without loading it.

    Raises:
        SetupError: a document beside its vocabulary is not one JSON object, or states a longest
            text, a side or the id of an added token that is none.
    """
    for name in TOKENIZER_DOCUMENTS:
        path = folder / name
        settings = read_object(path) if path.is_file() else {}
        longest = settings.get("model_max_length", 0)
        if isinstance(longest, bool) or not isinstance(longest, int | float | None):
            raise SetupError(
                f"{path}: `model_max_length` = {longest!r:.40} is no number of tokens."
            )
        for key in ("padding_side", "truncation_side"):
            if settings.get(key, "left") not in ("left", "right"):
                raise SetupError(
                    f'{path}: `{key}` = {settings[key]!r:.40} must be "left" or "right".'
                )
    path = folder / ADDED_TOKENS
    for token, number in (read_object(path) if path.is_file() else {}).items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise SetupError(
                f"{path}: the token {token!r:.40} has the id {number!r:.40}; an id is a number "
                "from 0 on."
            )


def end_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end an answer by the model's own settings.

    They stand in generation_config.json, or in config.json of a folder that has none. The
    tokenizer's own end token comes on top.

    Raises:
        SetupError: they are no token ids, or generation_config.json is not valid.
    """
    path = folder / RunLayout.CONFIG
    ends = _token_ids(config, path)  # transformers reads them in any case
    if (folder / GENERATION_CONFIG).is_file():
        path = folder / GENERATION_CONFIG
        ends = _token_ids(read_object(path), path)
    if any(end < 0 for end in ends):
        raise _no_token_id(path, [*ends])
    return ends


def _token_ids(settings: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """Return the end tokens that settings name: one, a list, or none."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise _no_token_id(path, value)
    return tuple(ids)


def _no_token_id(path: Path, value: object) -> SetupError:
    return SetupError(
        f"{path}: `eos_token_id` = {value!r} is no token id; it must be a number, or a list of "
        "numbers."
    )
