"""Conversion of .gguf files by transformers; loads torch."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import write_file

CARD_FIELDS = {"license": "general.license", "language": "general.languages"}
"""Key of a model card -> field of a .gguf file."""
SPLIT_COUNT = "split.count"
"""Field of the number of parts of a split file."""
LAYER = re.compile(r"blk\.(\d+)\.")
"""How the names of a layer's tensors begin."""
WRONG_TENSORS = {
    "missing_keys": "missing",
    "mismatched_keys": "of another shape",
    "unexpected_keys": "without a place in it",
}
"""Key of what transformers tells about loading -> its words."""
SHOWN_TENSORS = 6


def convert(gguf: Path, folder: Path) -> None:
    """Write a .gguf file as a bfloat16 Hugging Face folder with its tokenizer.

    Raises:
        SetupError: transformers cannot read the file.
    """
    logging.disable_progress_bar()
    # No setting of transformers turns this progress bar off.
    modeling_gguf_pytorch_utils.tqdm = _without_bar
    with _parsing(gguf):
        _require_one_model(gguf)
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name below
        )
        _require_all_tensors(gguf, info)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _parsing(gguf: Path) -> Iterator[None]:
    """Name the file in whatever a parser of untrusted bytes raises; it logs nothing."""
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of tensors: the error names them
    try:
        yield
    except (SetupError, MemoryError):
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        raise SetupError(
            f"{gguf}: transformers cannot read this .gguf file: {type(error).__name__}: {words}"
        ) from error
    finally:
        logging.set_verbosity(shown)


def _require_one_model(gguf: Path) -> None:
    """Refuse a part of a split file, and layers that the header does not count.

    Raises:
        SetupError: naming how many parts or layers there are.
    """
    reader = GGUFReader(gguf)
    parts = _number(reader, SPLIT_COUNT, 1)
    if parts > 1:
        raise SetupError(
            f"{gguf}: is one of {parts} parts of a model. Join them first: llama-gguf-split "
            "--merge FIRST_PART WHOLE.gguf."
        )
    layers = [int(match[1]) + 1 for t in reader.tensors if (match := LAYER.match(t.name))]
    held = max(layers, default=0)
    stated = next(
        (_number(reader, name, held) for name in reader.fields if name.endswith(".block_count")),
        held,
    )
    if held != stated:
        what = "leave the others out" if held > stated else "make random ones"
        raise SetupError(
            f"{gguf}: holds {held} layers, and its header states {stated}; transformers would "
            f"{what}. Get the whole file."
        )


def _number(reader: GGUFReader, field: str, default: int) -> int:
    return int(reader.fields[field].contents()) if field in reader.fields else default


def _require_all_tensors(gguf: Path, info: Mapping[str, Any]) -> None:
    """Refuse a file that lacks tensors, or holds others: transformers would make random ones.

    Raises:
        SetupError: naming them.
    """
    problems = {
        words: sorted(str(item[0] if isinstance(item, tuple) else item) for item in info[key])
        for key, words in WRONG_TENSORS.items()
        if info.get(key)
    }
    if problems:
        shown = "; ".join(
            f"{words}: {', '.join(names[:SHOWN_TENSORS])}"
            + (f" and {len(names) - SHOWN_TENSORS} more" if len(names) > SHOWN_TENSORS else "")
            for words, names in problems.items()
        )
        raise SetupError(
            f"{gguf}: holds another model than its header says: {shown}. It may be torn, or "
            "written by a tool that transformers does not understand; get the whole file."
        )


def write_card(gguf: Path, path: Path) -> None:
    """Write a model card with the licence and the languages that a .gguf file states.

    In a cache that cannot be written there is no card.
    """
    fields = GGUFReader(gguf).fields
    lines = ["---"]
    for key, name in CARD_FIELDS.items():
        if name in fields:
            lines.append(f"{key}: {json.dumps(fields[name].contents())}")
    lines += ["---", f"Dequantised from {gguf.name}.", ""]
    with contextlib.suppress(SetupError):
        write_file(path, ["\n".join(lines).encode()])


def _without_bar(tensors: Iterable[Any], **_: Any) -> Iterable[Any]:
    """Stand for `tqdm`: return the tensors."""
    return tensors
