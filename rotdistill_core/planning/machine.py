"""The memory, disk and speed of the machine that a run would use."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

HOST = "cpu"
"""The host, as a device that computes."""
OPERATIONS_PER_SECOND = {"cpu": 6e10, "gpu": 5e13}
"""Of one core, or of one GPU. Rough: a plan states classes of time, not times."""


@dataclass(frozen=True)
class Machine:
    """Free resources of a machine, in bytes."""

    ram: int
    """Memory that is free."""
    gpus: tuple[int, ...]
    """Memory of each GPU that torch would see, in its order; empty without a GPU."""
    disk: int
    """Free space on the disk of the runs."""
    cores: int

    def speed(self, device: str) -> float:
        """Return the floating-point operations in a second of a device; see `device_of`."""
        if device == HOST:
            return OPERATIONS_PER_SECOND["cpu"] * self.cores
        return OPERATIONS_PER_SECOND["gpu"]

    def device_of(self, name: str) -> str:
        """Return the device that a recipe's name stands for: `HOST`, or `cuda:0` and so on.

        Apple's GPU has the memory of the host. The device need not exist.
        """
        if name == "auto":
            return "cuda:0" if self.gpus else HOST
        if not name.startswith("cuda"):
            return HOST
        return name if ":" in name else f"{name}:0"

    def gpu_memory(self, device: str) -> int:
        """Return the memory of a GPU such as `cuda:1`; 0 if it is not there."""
        index = int(device.partition(":")[2])
        return self.gpus[index] if index < len(self.gpus) else 0


def this_machine(root: Path) -> Machine:
    """Return the resources that are free on this machine now.

    Args:
        root: the folder of runs; its disk is the one that counts. It need not exist yet.
    """
    folders = (root.resolve(), *root.resolve().parents)
    existing = next(folder for folder in folders if folder.exists())
    return Machine(
        ram=psutil.virtual_memory().available,
        gpus=_gpu_memories(),
        disk=shutil.disk_usage(existing).free,
        cores=os.cpu_count() or 1,
    )


def _gpu_memories() -> tuple[int, ...]:
    """Return the memory of each GPU in bytes, without torch: those that CUDA shows to a process."""
    if not shutil.which("nvidia-smi"):
        return ()
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    memories = [int(line) << 20 for line in answer.split() if line.isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(memories)
    numbers = [word.strip() for word in visible.split(",") if word.strip()]
    if not all(number.isdigit() for number in numbers):
        return tuple(memories[: len(numbers)])  # named by their UUIDs, which are not looked up
    return tuple(memories[int(n)] for n in numbers if int(n) < len(memories))
