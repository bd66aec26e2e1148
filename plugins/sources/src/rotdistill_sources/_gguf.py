"""Conversion of .gguf files by transformers; loads torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
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
from transformers.utils.logging import disable_progress_bar

from rotdistill_core.errors import SetupError
from rotdistill_core.store.files import write_file

CARD_FIELDS = {"license": "general.license", "language": "general.languages"}
"""Key of a model card -> field of a .gguf file."""


def convert(gguf: Path, folder: Path) -> None:
    """Write a .gguf file as a bfloat16 Hugging Face folder with its tokenizer.

    Raises:
        SetupError: transformers cannot read the file.
    """
    disable_progress_bar()
    # No setting of transformers turns this progress bar off.
    modeling_gguf_pytorch_utils.tqdm = _without_bar
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # a parser of untrusted bytes may raise anything
        raise SetupError(
            f"{gguf}: transformers cannot read this .gguf file: {type(error).__name__}: {error}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
