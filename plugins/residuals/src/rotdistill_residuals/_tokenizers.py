"""What the files of two tokenizers tell of whether their tokens can be paired."""

from __future__ import annotations

import json
from pathlib import Path

from rotdistill_core.data.chat import PLAIN_CLASSES, TOKENIZER_CONFIG
from rotdistill_core.data.vocabularies import TOKENIZER_FILE, have_vocabularies, one_vocabulary
from rotdistill_core.errors import SetupError
from rotdistill_core.store.plain import COLLECTION_BYTES, read_bytes

BYTE_DECODERS = ("ByteLevel", "ByteFallback")
"""Decoders of vocabularies whose tokens are bytes."""


def is_of_bytes(decoder: str) -> bool:
    """Return whether the tokens of a vocabulary are bytes; `decoder` is its decoder as JSON."""
    return any(name in decoder for name in BYTE_DECODERS)


def require_pairs(folders: tuple[Path, Path]) -> None:
    """Refuse two vocabularies that cannot be paired, as far as files tell.

    Raises:
        SetupError: they differ, and the tokens of one are not bytes.
    """
    if len({*folders}) == 1 or not have_vocabularies(*folders):
        return
    decoders = {folder: _decoder(folder) for folder in folders}
    refused = [folder for folder, decoder in decoders.items() if not is_of_bytes(decoder)]
    if refused and not one_vocabulary(*folders):
        raise not_of_bytes(str(refused[0]), decoders[refused[0]])


def not_of_bytes(source: str, decoder: str) -> SetupError:
    """Return the error of a tokenizer whose tokens are not bytes."""
    return SetupError(
        f"{source}: its tokens are not bytes (decoder {decoder[:60]}); it cannot be paired with "
        "another. Take two models of one vocabulary."
    )


def _decoder(folder: Path) -> str:
    """Return the decoder of a tokenizer as JSON; that of a class of its own is not in the file."""
    settings = folder / TOKENIZER_CONFIG
    named = json.loads(read_bytes(settings)) if settings.is_file() else {}
    if named.get("tokenizer_class") not in PLAIN_CLASSES:
        return BYTE_DECODERS[0]
    return json.dumps(json.loads(read_bytes(folder / TOKENIZER_FILE, COLLECTION_BYTES))["decoder"])
