"""The contents of a checkpoint folder, from its headers alone.

No weight is read, and torch is not imported.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import DTYPES, WIDTH
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import COLLECTION_BYTES, read_text, require_plain

SHARD_INDEX = "model.safetensors.index.json"
READ_BY_TRANSFORMERS = (".json", ".jinja", ".model", ".safetensors", ".txt", ".tiktoken")
"""Endings of the files of a model folder that somebody opens: this program or transformers."""
TEMPLATE_FOLDER = "additional_chat_templates"
"""Folder in a model folder that transformers reads, too."""
REMOTE_CODE_KEYS = ("auto_map", "_attn_implementation_internal")
"""Config keys that ask to run code that comes with the model."""


@dataclass(frozen=True)
class Header:
    """One tensor of a safetensors file."""

    file: Path
    dtype: str
    """As in torch: float32, bfloat16, ..."""
    shape: tuple[int, ...]
    bytes: int


def read_header(path: Path) -> dict[str, Header]:
    """Read the header of a safetensors file.

    safetensors compares it with the file's size, so a torn file is an error here and no SIGBUS
    later.

    Raises:
        SetupError: naming the file, when it is not a whole safetensors file of plain dtypes.
    """
    headers: dict[str, Header] = {}
    try:
        require_plain(path)
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                tensor = file.get_slice(name)
                headers[name] = _header(path, name, tensor.get_dtype(), tensor.get_shape())
    except OSError as error:
        reason = error.strerror or error
        raise SetupError(f"{path}: cannot be read: {reason}.") from error
    except SafetensorError as error:
        raise SetupError(
            f"{path}: not a valid safetensors file: {error}. It may be torn, or extended."
        ) from error
    return headers


def _header(path: Path, name: str, code: str, shape: list[int]) -> Header:
    if code not in DTYPES:
        raise SetupError(f"{path}: tensor {name} has dtype {code}, which is quantised or unknown.")
    return Header(
        file=path,
        dtype=DTYPES[code],
        shape=tuple(shape),
        bytes=math.prod(shape) * WIDTH[code],
    )


def require_plain_files(folder: Path) -> None:
    """Refuse a model folder in which something that is opened is no plain file, or is too long.

    transformers opens what it finds there: a named pipe would let it wait for ever. Weights may be
    as long as they are.

    Raises:
        SetupError: naming the file.
    """
    for path in (*folder.glob("*"), *folder.glob(f"{TEMPLATE_FOLDER}/*")):
        opened = path.suffix in READ_BY_TRANSFORMERS
        if not opened and (path.is_file() or path.is_dir() or not path.exists()):
            continue  # a link to nothing that nobody follows
        limit = None if path.suffix == ".safetensors" else COLLECTION_BYTES
        try:
            require_plain(path, limit)
        except OSError as error:
            raise SetupError(
                f"{path}: cannot be read: {error.strerror}. Remove it, or put a whole model in the "
                "folder."
            ) from error


def shard_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, by its index where it has one.

    Raises:
        SetupError: no safetensors, a missing shard, or an index entry outside the folder.
    """
    index = folder / SHARD_INDEX
    if index.is_file():
        return [folder / name for name in _indexed_shards(index)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SetupError(
            f"{folder}: has no .safetensors weights. Pickled weights are not read; convert them "
            "first."
        )
    return files


def _indexed_shards(index: Path) -> list[str]:
    """Return the names of the shards that an index lists."""
    try:
        weight_map = json.loads(read_text(index))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError("the name of a shard must be text")
    except OSError as error:
        raise SetupError(f"{index}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SetupError(f"{index}: not a valid shard index: {error}.") from error
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise SetupError(
                f'{index}: names the shard "{name}", which is not a file of this folder.'
            )
    return names


def folder_headers(folder: Path) -> dict[str, Header]:
    """Return every tensor of a checkpoint folder.

    Raises:
        SetupError: see `read_header` and `shard_files`; or a tensor is in two shards.
    """
    headers: dict[str, Header] = {}
    for path in shard_files(folder):
        for name, header in read_header(path).items():
            if name in headers:
                raise SetupError(f"{path}: tensor {name} is also in {headers[name].file.name}.")
            headers[name] = header
    return headers


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        SetupError: missing, not a JSON object, or asking for remote code.
    """
    path = folder / RunLayout.CONFIG
    try:
        config = json.loads(read_text(path))
    except OSError as error:
        raise SetupError(
            f"{path}: cannot be read: {error.strerror}. A model folder needs a config.json."
        ) from error
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise SetupError(f"{path}: must hold one JSON object.")
    for key in REMOTE_CODE_KEYS:
        if key in config:
            raise SetupError(
                f"{path}: `{key}` asks to run code that comes with the model; that is refused."
            )
    if "quantization_config" in config:
        raise SetupError(
            f"{path}: the weights are quantised; use the original or a .gguf file, which is "
            "dequantised."
        )
    return config
