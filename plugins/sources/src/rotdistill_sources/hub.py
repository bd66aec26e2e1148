"""The source of models by their Hugging Face id, `owner/name`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rotdistill_core import hookimpl


@hookimpl
def locate(reference: str, log: Callable[[str], None]) -> Path:
    """Return the folder of `owner/name@revision`; without a revision it is the main branch.

    The prefix `hub:` may precede the name.

    Raises:
        SetupError: neither the local cache nor the hub has the model.
    """
    # The hub's client takes long to load.
    from rotdistill_sources._hub import download  # noqa: PLC0415

    name, _, revision = reference.removeprefix("hub:").partition("@")
    return download(name, revision or None, log)
