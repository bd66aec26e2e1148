"""The torch device that a recipe names, on this machine."""

from __future__ import annotations

import torch

from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.recipe.devices import DEVICE_HELP, is_device


def resolve_device(name: str) -> torch.device:
    """Return the device of a name such as `auto`, `cpu`, `cuda:1` or `mps`.

    Raises:
        RecipeError: it is no name of a device.
        SetupError: this machine has no such device.
    """
    if not is_device(name):
        raise RecipeError(f"device: {DEVICE_HELP} (it is {name!r}).")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise SetupError(f'device = "{name}": {_gpus(count)}')
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SetupError('device = "mps": this torch has no Apple GPU; write "cpu" or "auto".')
    return device


def _gpus(count: int) -> str:
    """Return which GPUs torch sees."""
    if count == 0:
        return (
            "torch sees no GPU here. Install a build of torch for CUDA, or write "
            'device = "cpu" or "auto".'
        )
    seen = ", ".join(f"cuda:{k}" for k in range(count))
    return f"there is no such GPU; torch sees {seen}."
