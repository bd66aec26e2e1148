"""The contents of a checkpoint folder, from its headers alone.

No weight is read, and torch is not imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import DTYPES, WIDTH
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.store.plain import (
    COLLECTION_BYTES,
    is_file,
    open_plain,
    read_text,
    require_plain,
)

WHOLE_FILE = RunLayout.model_shard(1, 1)
"""The file of a checkpoint in one piece, which transformers prefers to an index."""
SHARD_INDEX = "model.safetensors.index.json"
MOST_TENSORS = 200_000
"""Tensors of a file; more take long to look at, and no architecture that has a table needs them."""
READ_BY_TRANSFORMERS = (".json", ".jinja", ".model", ".safetensors", ".txt", ".tiktoken")
"""Endings of the files of a model folder that somebody opens: this program or transformers."""
TEMPLATE_FOLDER = "additional_chat_templates"
"""Folder in a model folder that transformers reads, too."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers reads where it finds neither of them."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files of which one makes a tokenizer; the first is the usual one."""
ADAPTER_CONFIG = "adapter_config.json"
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Names of files of a distributed checkpoint, which transformers prefers to all others."""
OLD_BUFFER = re.compile(r"rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)$|attn\.masked_bias$")
"""Buffers that old checkpoints hold. transformers computes what they hold from the config, whatever
the file says."""
KERNEL_KEYS = ("attn_implementation", "experts_implementation")
"""Parts of config keys that choose which kernel computes."""
KERNEL = re.compile(r"(paged\|)?\w*")
"""Values of them that are part of transformers. Others name a repository with code."""
REMOTE_CODE = "auto_map"
"""Key that names classes that come with a model. A table is for transformers' own."""
HEAD = "lm_head."
"""How the name of a head begins, which is outside the body."""
COMPARED_BYTES = 1 << 24
"""Bytes of two tensors that are compared at once."""
OTHER_WEIGHTS = "transformers_weights"
"""Config key that names the file of the weights."""


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
            names = file.keys()
            if len(names) > MOST_TENSORS:
                raise SetupError(
                    f"{path}: holds {len(names)} tensors; {MOST_TENSORS} are the most that are "
                    "read of a file."
                )
            for name in names:
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
    """Return the safetensors files of a checkpoint folder: those that transformers would read.

    A folder that holds one file under another name is read as well. A folder that can be read in
    two ways is refused: some program would load other weights from it.

    Raises:
        SetupError: no safetensors, a missing shard, an index entry outside the folder, or files of
            two checkpoints.
    """
    _refuse_what_comes_first(folder)
    whole = folder / WHOLE_FILE
    index = folder / SHARD_INDEX
    if whole.is_file():
        _refuse_other_shards(whole, index)
        return [whole]
    if index.is_file():
        return [folder / name for name in _indexed_shards(index)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SetupError(
            f"{folder}: has no .safetensors weights. Pickled weights are not read; convert them "
            "first."
        )
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles or len(files) > 1:
        raise _two_readings(
            folder,
            f"without {WHOLE_FILE} and {SHARD_INDEX} nothing says which of these files is the "
            f"model: {', '.join([*(file.name for file in files), *pickles])}",
        )
    return files


def _refuse_what_comes_first(folder: Path) -> None:
    """Refuse files that transformers prefers to the weights of the folder, or lays over them."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise SetupError(
            f"{folder}: holds {ADAPTER_CONFIG}, so transformers would lay an adapter over its "
            "weights. Merge the adapter first, or move its files to a folder of their own."
        )
    distributed = sorted(p.name for p in folder.iterdir() if DISTRIBUTED.fullmatch(p.name))
    if distributed:
        raise _two_readings(folder, f"{distributed[0]} is part of a distributed checkpoint")


def _refuse_other_shards(whole: Path, index: Path) -> None:
    """Refuse an index of other files that are there.

    One whose files are gone, or that cannot be read, is no second reading.
    """
    try:
        weight_map = json.loads(read_text(index))["weight_map"]
        names = sorted(map(str, {*weight_map.values()} - {whole.name}))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return
    there = [name for name in names if Path(name).name == name and is_file(whole.parent / name)]
    if there:
        raise _two_readings(
            whole.parent,
            f"{whole.name} holds a model, and {index.name} names {there[0]} and others of another",
        )


def _two_readings(folder: Path, why: str) -> SetupError:
    """Return the error for a folder from which programs would load different weights."""
    return SetupError(
        f"{folder}: can be read in two ways: {why}. Which weights load would depend on the "
        "program. Keep the files of one model, and move the others away."
    )


def _indexed_shards(index: Path) -> list[str]:
    """Return the names of the shards that an index lists."""
    names = sorted({*_weight_map(index).values()})
    for name in names:
        if Path(name).name != name or not is_file(index.parent / name):
            raise SetupError(
                f'{index}: names the shard "{name}", which is not a file of this folder.'
            )
    return names


def _weight_map(index: Path) -> dict[str, str]:
    """Return the name of the shard of each tensor, as an index has them.

    Raises:
        SetupError: it cannot be read.
    """
    try:
        weight_map: dict[str, str] = json.loads(read_text(index))["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("the name of a shard must be text")
    except OSError as error:
        raise SetupError(f"{index}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SetupError(f"{index}: not a valid shard index: {error}.") from error
    return weight_map


def _require_as_indexed(index: Path, headers: Mapping[str, Header]) -> None:
    """Refuse shards whose tensors are not those that their index lists.

    Some programs read what the index lists, others all that the files hold.

    Raises:
        SetupError: naming the first tensor that differs.
    """
    listed = {
        name: shard for name, shard in _weight_map(index).items() if not OLD_BUFFER.search(name)
    }
    held = {name: header.file.name for name, header in headers.items()}
    for name in sorted({*listed, *held}):
        if listed.get(name) == held.get(name):
            continue
        says = f"in {listed[name]}" if name in listed else "in no shard"
        is_in = f"in {held[name]}" if name in held else "in none"
        raise SetupError(
            f"{index}: the tensor {name} is {says} according to the index, and {is_in} of its "
            "files. Which weights load would depend on the program. Take the index that belongs "
            "to these files, or save the model once more."
        )


def missing_files(folder: Path) -> list[str]:
    """Return the files that a folder lacks to be a whole model, or a whole adapter.

    A download that was interrupted, or that fetched the tokenizer alone, leaves such a folder. A
    folder that is damaged in another way lacks nothing.
    """
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / RunLayout.CONFIG).is_file():
        return [] if any(folder.glob("adapter_model.*")) else ["adapter_model.safetensors"]
    wanted = [RunLayout.CONFIG]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        wanted.append(TOKENIZERS[0])
    wanted += _weight_files(folder)
    return [name for name in wanted if not (folder / name).is_file()]


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files of weights that a folder should hold, by what it holds."""
    index = folder / SHARD_INDEX
    if (folder / WHOLE_FILE).is_file() or not index.is_file():
        return [] if any(folder.glob("*.safetensors")) else [WHOLE_FILE]
    try:
        return sorted({*map(str, json.loads(read_text(index))["weight_map"].values())})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []  # told when the folder is opened


def folder_headers(folder: Path, body: str = "") -> dict[str, Header]:
    """Return every tensor of a checkpoint folder but the rotary buffers of old ones.

    Args:
        folder: the checkpoint.
        body: module of the model without its head; see `lost_prefix`.

    Raises:
        SetupError: see `read_header` and `shard_files`; or a tensor is in two shards, or in
            another one than the index says.
    """
    headers: dict[str, Header] = {}
    files = shard_files(folder)
    for path in files:
        for name, header in read_header(path).items():
            if name in headers:
                raise SetupError(f"{path}: tensor {name} is also in {headers[name].file.name}.")
            if not OLD_BUFFER.search(name):
                headers[name] = header
    index = folder / SHARD_INDEX
    if index.is_file() and files != [folder / WHOLE_FILE]:
        _require_as_indexed(index, headers)
    prefix = lost_prefix(headers, body)
    return {prefix + name: header for name, header in headers.items()}


def lost_prefix(names: Iterable[str], body: str) -> str:
    """Return what stands before all names of tensors in a model and is missing in its checkpoint.

    A checkpoint of the class without a head names its tensors from the inside of its body.
    transformers opens it as a whole model, whose head is the embedding.
    """
    prefix = f"{body}."
    is_inside = body and not any(name.startswith((prefix, HEAD)) for name in names)
    return prefix if is_inside else ""


def settled_tie(
    config: Mapping[str, Any], adapter: Adapter, headers: Mapping[str, Header]
) -> dict[str, Any]:
    """Return a config that says whether the head is the embedding, as the weights have it.

    A checkpoint may hold a head of its own although its config ties it to the embedding.
    transformers drops it only if both are equal, and so do we.

    Raises:
        SetupError: a file cannot be read.
    """
    head = headers.get(adapter.head)
    embedding = headers.get(adapter.embedding)
    if not config.get("tie_word_embeddings") or head is None or embedding is None:
        return dict(config)
    if _same_values(head, adapter.head, embedding, adapter.embedding):
        return dict(config)
    return {**config, "tie_word_embeddings": False}


def _same_values(one: Header, one_name: str, two: Header, two_name: str) -> bool:
    """Return whether two tensors hold the same bytes of one dtype."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    try:
        with open_plain(one.file) as first, open_plain(two.file) as second:
            first.seek(_position(first, one_name))
            second.seek(_position(second, two_name))
            for done in range(0, one.bytes, COMPARED_BYTES):
                size = min(COMPARED_BYTES, one.bytes - done)
                if first.read(size) != second.read(size):
                    return False
    except OSError as error:
        raise SetupError(f"{one.file}: cannot be read: {error.strerror}.") from error
    return True


def _position(stream: BinaryIO, name: str) -> int:
    """Return where the bytes of a tensor begin in a valid safetensors file."""
    length = int.from_bytes(stream.read(8), "little")
    return 8 + length + int(json.loads(stream.read(length))[name]["data_offsets"][0])


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json without what is no property of the checkpoint.

    Which kernel computes is the machine's affair, and the tables of this program are for classes of
    transformers, so that no code of the model is needed: `auto_map` and the names of kernels are
    left out, and no checkpoint that is saved has them.

    Raises:
        SetupError: missing, not a JSON object, of a quantised model, naming other weights than
            `shard_files` reads, or naming a kernel that would have to be downloaded.
    """
    path = folder / RunLayout.CONFIG
    config: dict[str, Any] = read_object(path, "A model folder needs a config.json.")
    try:
        _refuse_kernels(path, config)
        plain: dict[str, Any] = _plain(config)
    except RecursionError as error:
        raise SetupError(f"{path}: is nested too deeply for a config.") from error
    if config.get("quantization_config") is not None:
        raise SetupError(
            f"{path}: the weights are quantised; use the original or a .gguf file, which is "
            "dequantised."
        )
    other = config.get(OTHER_WEIGHTS)
    if other not in (None, WHOLE_FILE, SHARD_INDEX):
        raise SetupError(
            f"{path}: `{OTHER_WEIGHTS}` = {other!r} lets transformers read other weights than "
            f"{WHOLE_FILE}. Remove the key, and name the file so that it is found without."
        )
    dropped = ("quantization_config", OTHER_WEIGHTS)
    return {key: value for key, value in plain.items() if key not in dropped}


def read_object(path: Path, hint: str = "") -> dict[str, Any]:
    """Return the object of a JSON file.

    Args:
        path: the file.
        hint: follows the error if it cannot be read.

    Raises:
        SetupError: it cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}. {hint}".strip()) from error
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise SetupError(f"{path}: must hold one JSON object.")
    return value


def _refuse_kernels(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config that names a kernel outside transformers, at whatever depth."""
    for key, value in config_items(config):
        if _names_kernel(key) and not all(KERNEL.fullmatch(text) for text in _texts(value)):
            raise SetupError(
                f"{path}: `{key}` = {value!r} asks to download a kernel and to run it; that is "
                "refused. Remove the key: the model computes the same without it."
            )


def _names_kernel(key: str) -> bool:
    return any(part in key for part in KERNEL_KEYS)


def config_items(value: object) -> Iterator[tuple[str, Any]]:
    """Yield key and value of all objects in a JSON value, the value itself included."""
    if isinstance(value, Mapping):
        yield from value.items()
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from config_items(inner)


def _texts(value: object) -> Iterator[str]:
    """Yield all text in a JSON value, but no keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _plain(value: Any) -> Any:
    """Return a JSON value without names of kernels and of classes that come with a model."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _plain(inner)
        for key, inner in value.items()
        if key != REMOTE_CODE and not _names_kernel(key)
    }
