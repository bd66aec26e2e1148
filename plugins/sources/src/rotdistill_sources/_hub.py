"""Download from the Hugging Face hub: safetensors, config and tokenizer, never code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from rotdistill_core.checkpoint.headers import TEMPLATE_FOLDER, TOKENIZERS, missing_files
from rotdistill_core.checkpoint.models import TOKENIZER_FILES
from rotdistill_core.checkpoint.open import may_download
from rotdistill_core.errors import ModelNotAvailable, SetupError
from rotdistill_core.store.layout import RunLayout

FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    RunLayout.CONFIG,
    "adapter_config.json",
    *(f"{name}*" for name in TOKENIZER_FILES),
    f"{TEMPLATE_FOLDER}/*.jinja",
    "*.model",
]
"""Patterns of the files that are fetched. A `*` also matches in folders: those are left out."""
NOT_FILES = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"]
"""Patterns of files in folders, which no one reads: other formats, steps of a training."""


def download(name: str, revision: str | None, log: Callable[[str], None]) -> Path:
    """Return the local folder of a model: from the cache if it is whole there, or else downloaded.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None is the main branch.
        log: shows one line to the user.

    Raises:
        ModelNotAvailable: it is not in the cache, and nothing may be downloaded now.
        SetupError: the hub does not give the model, or does not hold a whole one.
    """
    cached = _cached(name, revision)
    missing = missing_files(cached) if cached else []
    if cached and not missing:
        return cached
    if not may_download():
        raise ModelNotAvailable(
            name,
            "is not, or not wholly, in the local cache of the hub. `rotdistill run` downloads it; "
            f"so does `hf download {name}{f' --revision {revision}' if revision else ''}`.",
        )
    part = f"only partly in the local cache ({', '.join(missing)} missing)"
    log(f"{name}: {part if cached else 'not in the local cache'}, downloading")
    try:
        folder = _snapshot(name, revision, local_files_only=False)
    except (OSError, ValueError, HfHubHTTPError) as error:
        lines = str(error).strip().splitlines()
        reason = (lines[0] if lines else type(error).__name__).rstrip(".")
        state = f"is {part}" if cached else "there is no such folder here"
        raise SetupError(
            f"{name}: {state}, and the hub did not give it ({reason}). Without a network name a "
            "local folder; for a gated model accept its licence and log in."
        ) from error
    missing = missing_files(folder)
    # A model may be without a tokenizer; where one is needed, it is told.
    if {*missing} - {TOKENIZERS[0]}:
        # Without a network the hub's client returns what it has.
        raise SetupError(
            f"{name}: is only partly in the local cache ({', '.join(missing)} missing), and the "
            f"hub gave no more. Try again with a network. If it has no such files there, it is no "
            f"model that can be opened: pickled weights are not read. The part is in {folder}."
        )
    return folder


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a model in the local cache, whole or not; None if there is none."""
    try:
        return _snapshot(name, revision, local_files_only=True)
    except (OSError, ValueError):
        return None


def _snapshot(name: str, revision: str | None, local_files_only: bool) -> Path:
    return Path(
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=FILES,
            ignore_patterns=NOT_FILES,
            local_files_only=local_files_only,
        )
    )
