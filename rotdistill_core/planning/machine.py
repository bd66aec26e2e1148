"""The memory, disk and speed of the machine that a run would use."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

OPERATIONS_PER_SECOND = {"cpu": 6e10, "gpu": 5e13}
"""Of one core, or of one GPU. Rough: a plan states classes of time, not times."""


@dataclass(frozen=True)
class Machine:
    """Free resources of a machine, in bytes."""

    ram: int
    """Memory that is free."""
    gpu: int
    """Memory of the first GPU; 0 without a GPU."""
    disk: int
    """Free space on the disk of the runs."""
    cores: int

    @property
    def speed(self) -> float:
        """Floating-point operations in a second."""
        if self.gpu:
            return OPERATIONS_PER_SECOND["gpu"]
        return OPERATIONS_PER_SECOND["cpu"] * self.cores


def this_machine(root: Path) -> Machine:
    """Return the resources that are free on this machine now.

    Args:
        root: the folder of runs; its disk is the one that counts. It need not exist yet.
    """
    folders = (root.resolve(), *root.resolve().parents)
    existing = next(folder for folder in folders if folder.exists())
    return Machine(
        ram=psutil.virtual_memory().available,
        gpu=_gpu_memory(),
        disk=shutil.disk_usage(existing).free,
        cores=os.cpu_count() or 1,
    )


def _gpu_memory() -> int:
    """Return the memory of the first GPU in bytes, without torch; 0 without a GPU."""
    if not shutil.which("nvidia-smi"):
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    mebibytes = answer.split()
    if not mebibytes or not mebibytes[0].isdigit():
        return 0
    return int(mebibytes[0]) << 20
