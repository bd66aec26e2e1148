"""What a checkpoint folder holds, read from its headers alone: no weight is touched and torch is not imported."""

from __future__ import annotations

import json
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
    """Read a safetensors header and compare it with the file's size, so that a torn file is an error here and never a SIGBUS later.

    Raises:
        SetupError: naming the file, when it is not a whole safetensors file of plain dtypes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError("its header length is impossible")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found: dict[str, Header] = {}
        end = 0
        for name, item in header.items():
            start, stop = item["data_offsets"]
            count = 1
            for n in item["shape"]:
                count *= n
            if item["dtype"] not in DTYPES:
                raise ValueError(f"tensor {name} has dtype {item['dtype']}, which is quantised or unknown")
            if not 0 <= start <= stop or stop - start != count * WIDTH[item["dtype"]]:
                raise ValueError(f"tensor {name} has impossible offsets")
            end = max(end, stop)
            found[name] = Header(path, DTYPES[item["dtype"]], tuple(item["shape"]), stop - start)
        if 8 + length + end != size:
            raise ValueError(f"it is {size} bytes long and its header asks for {8 + length + end}; it is torn or was extended")
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SetupError(f"{path}: not a valid safetensors file: {error}.") from error
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
        except (ValueError, KeyError, AttributeError) as error:
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
        SetupError: missing, not JSON, or asking for remote code.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}. A model folder needs a config.json.") from error
    except ValueError as error:
        raise SetupError(f"{path}: not valid JSON: {error}.") from error
    for key in ("auto_map", "_attn_implementation_internal"):
        if key in config:
            raise SetupError(f"{path}: `{key}` asks to run code that comes with the model; that is refused.")
    if "quantization_config" in config:
        raise SetupError(f"{path}: the weights are quantised; use the original or a .gguf file, which is dequantised.")
    return config
