"""The names of devices in a recipe: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`. Nothing loads torch."""

from __future__ import annotations

import re
import sys

KNOWN_DEVICES = ("auto", "cpu", "cuda", "mps")
DEVICE_HELP = 'write "auto", "cpu", "cuda", "cuda:1" (the second GPU) or "mps"'


def is_device(name: str) -> bool:
    """Return whether a recipe may name a device so. Whether the machine has it is another matter.

    A backend of somebody's own is known once it is registered with a torch that is loaded.
    """
    kind, colon, index = name.partition(":")
    if kind not in KNOWN_DEVICES and kind != _own_backend():
        return False
    if not colon:
        return True
    return kind not in ("auto", "cpu", "mps") and bool(re.fullmatch(r"0|[1-9]\d{0,3}", index))


def _own_backend() -> str:
    """Return the name under which a backend of somebody's own was registered with torch."""
    torch = sys.modules.get("torch")
    return str(torch._C._get_privateuse1_backend_name()) if torch else ""
