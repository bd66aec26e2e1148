"""TODO: rotdistill_core.planning.machine."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

SPEED = {"cpu": 6e10, "gpu": 5e13}
"""Operations in a second, of one core or one GPU: rough, and good enough for a class of time."""


@dataclass(frozen=True)
class Machine:
    """What there is to be had, in bytes."""

    ram: int
    gpu: int
    """0 where there is none."""
    disk: int
    cores: int

    @property
    def speed(self) -> float:
        """Operations in a second."""
        return SPEED["gpu"] if self.gpu else SPEED["cpu"] * self.cores


def this_machine(root: Path) -> Machine:
    """Return what this machine has to give now."""
    there = next(folder for folder in (root.resolve(), *root.resolve().parents) if folder.exists())
    gpu = 0
    if shutil.which("nvidia-smi"):
        import subprocess

        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        gpu = int(lines[0]) << 20 if lines and lines[0].isdigit() else 0
    return Machine(
        psutil.virtual_memory().available, gpu, shutil.disk_usage(there).free, os.cpu_count() or 1
    )
