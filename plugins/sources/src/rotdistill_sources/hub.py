"""Models by their Hugging Face id: the local cache first, then a download of safetensors, config and tokenizer, never of code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from rotdistill_core import hookimpl
from rotdistill_core.errors import SetupError

WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", "generation_config.json", "tokenizer*",
          "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model"]  # fmt: skip


@hookimpl
def locate(reference: str, log: Callable[[str], None]) -> Path:
    """See `Specs.locate`: `hub:owner/name`, with `@revision` behind it where the recipe names one."""
    name, _, revision = reference.removeprefix("hub:").partition("@")
    try:
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=WANTED, local_files_only=True
            )
        )
    except (OSError, ValueError):
        log(f"{name}: not in the local cache, downloading")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=WANTED))
    except (OSError, ValueError, HfHubHTTPError) as error:
        text = str(error).strip().splitlines()
        reason = text[0] if text else type(error).__name__
        raise SetupError(
            f"{name}: there is no such folder here, and the hub did not give it ({reason.rstrip('.')}). "
            "Without a network name a local folder; for a gated model accept its licence and log in."
        ) from error
