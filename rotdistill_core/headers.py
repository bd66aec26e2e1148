"""What a checkpoint folder holds, read from its headers alone: no weight is touched and torch is not imported."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotdistill_core.errors import SetupError
from rotdistill_core.ledger import DTYPES, WIDTH

MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Header:
    """One tensor of a safetensors file."""

    file: Path
    dtype: str
    """As in torch: float32, bfloat16, ..."""
    shape: tuple[int, ...]
    bytes: int


def read_header(path: Path) -> dict[str, Header]:
    """Read a safetensors header and compare it with the file's size.

    A torn file is thus an error here and never a SIGBUS later.

    Raises:
        SetupError: naming the file, when it is not a whole safetensors file of plain dtypes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError("its header length is impossible")
            found = _tensors(path, json.loads(stream.read(length)))
        end = sum(tensor.bytes for tensor in found.values())
        if 8 + length + end != size:
            raise ValueError(f"it is {size} bytes long and its header asks for {8 + length + end}; it is torn or was extended")
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SetupError(f"{path}: not a valid safetensors file: {error}.") from error
    return found


def _tensors(path: Path, header: object) -> dict[str, Header]:
    """Return the tensors of a parsed header; they must lie one after the other, without overlap or gap."""
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    found: dict[str, Header] = {}
    spans: list[tuple[int, int]] = []
    for name, item in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        if dtype not in DTYPES:
            raise ValueError(f"tensor {name} has dtype {dtype}, which is quantised or unknown")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError(f"tensor {name} has a shape or offsets that are no whole numbers from 0")
        if stop - start != math.prod(shape) * WIDTH[dtype]:
            raise ValueError(f"tensor {name} has offsets that do not fit its shape")
        spans.append((start, stop))
        found[name] = Header(path, DTYPES[dtype], shape, stop - start)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(start, end)} of the data")
        end = stop
    return found


def shard_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, by its index where it has one.

    Raises:
        SetupError: no safetensors, a missing shard, or an index entry that points out of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError("the name of a shard must be text")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise SetupError(f"{index}: not a valid shard index: {error}.") from error
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise SetupError(f'{index}: names the shard "{name}", which is not a file of this folder.')
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SetupError(f"{folder}: has no .safetensors weights. Pickled weights are not read; convert them first.")
    return files


def folder_headers(folder: Path) -> dict[str, Header]:
    """Return every tensor of a checkpoint folder."""
    found: dict[str, Header] = {}
    for path in shard_files(folder):
        for name, header in read_header(path).items():
            if name in found:
                raise SetupError(f"{path}: tensor {name} is also in {found[name].file.name}.")
            found[name] = header
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        SetupError: missing, not a JSON object, or asking for remote code.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}. A model folder needs a config.json.") from error
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise SetupError(f"{path}: must hold one JSON object.")
    for key in ("auto_map", "_attn_implementation_internal"):
        if key in config:
            raise SetupError(f"{path}: `{key}` asks to run code that comes with the model; that is refused.")
    if "quantization_config" in config:
        raise SetupError(f"{path}: the weights are quantised; use the original or a .gguf file, which is dequantised.")
    return config
