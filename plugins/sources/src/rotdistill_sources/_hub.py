"""Download from the Hugging Face hub: safetensors, config and tokenizer, never code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from rotdistill_core.errors import SetupError
from rotdistill_core.store.layout import RunLayout

FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    RunLayout.CONFIG,
    "adapter_config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
]
"""Patterns of the files that are fetched."""


def download(name: str, revision: str | None, log: Callable[[str], None]) -> Path:
    """Return the local folder of a model: from the cache, or else downloaded.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None is the main branch.
        log: shows one line to the user.

    Raises:
        SetupError: the hub does not give the model.
    """
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=FILES, local_files_only=True)
        )
    except (OSError, ValueError):
        log(f"{name}: not in the local cache, downloading")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise SetupError(
            f"{name}: there is no such folder here, and the hub did not give it "
            f"({reason.rstrip('.')}). Without a network name a local folder; "
            "for a gated model accept its licence and log in."
        ) from error
