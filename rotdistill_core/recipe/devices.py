"""The names of devices in a recipe: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`. Nothing loads torch."""

from __future__ import annotations

import re
import sys

KNOWN_DEVICES = ("auto", "cpu", "cuda", "mps")
DEVICE_HELP = 'write "auto", "cpu", "cuda", "cuda:1" (the second GPU) or "mps"'


def device_problem(name: str) -> str:
    """Return what is wrong with the name of a device; empty if nothing is."""
    kind, colon, index = name.partition(":")
    if kind not in KNOWN_DEVICES and kind != _own_backend():
        return f'"{name}" is no device; {DEVICE_HELP}.'
    if colon and (kind in ("auto", "cpu", "mps") or not re.fullmatch(r"0|[1-9]\d{0,3}", index)):
        return f'"{name}" has a number that no such device has; {DEVICE_HELP}.'
    return ""


def _own_backend() -> str:
    """Return the name under which a backend of somebody's own was registered with torch."""
    torch = sys.modules.get("torch")
    return str(torch._C._get_privateuse1_backend_name()) if torch else ""
