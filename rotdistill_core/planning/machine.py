"""The memory, disk and rates of the machine that a run would use."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from rotdistill_core.planning.rates import Profile

HOST = "cpu"
"""The host, as a device that computes."""
BUSY = 1.25
"""Waiting programs for each core above which a machine counts as busy."""
SHARED = 0.2
"""Share of the processors in use above which rates come out too low."""
GLANCE = 0.2
"""Seconds for which the use of the processors is looked at."""


@dataclass(frozen=True)
class Machine:
    """Free resources of a machine, in bytes."""

    ram: int
    """Memory that is free."""
    gpus: tuple[int, ...]
    """Memory of each GPU that torch would see, in its order; empty without a GPU."""
    disk: int | None
    """Free space on the disk of the runs; None if that disk is not this machine's."""
    cores: int
    profile: Profile | None = None
    """How fast it works; None if that is not known."""

    def device_of(self, name: str) -> str:
        """Return the device that a recipe's name stands for: `HOST`, or `cuda:0` and so on.

        Apple's GPU has the memory of the host. The device need not exist.
        """
        if name == "auto":
            return "cuda:0" if self.gpus else HOST
        if not name.startswith("cuda"):
            return HOST
        return name if ":" in name else f"{name}:0"

    @property
    def gpu_names(self) -> list[str]:
        """The names of the GPUs."""
        return [f"cuda:{index}" for index in range(len(self.gpus))]

    def lacks(self, device: str) -> str:
        """Return that a GPU such as `cuda:1` is not here, and what is; empty if it is."""
        if device == HOST or device in self.gpu_names:
            return ""
        return f"of GPUs this machine has {', '.join(self.gpu_names) or 'none'}"

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


def load() -> float:
    """Return how many programs want to compute for each core: 1 if all cores are in use."""
    average = float(psutil.getloadavg()[0]) / (os.cpu_count() or 1)
    # The average is of the last minute: what has ended counts only as far as cores are in use now.
    return average * processors_in_use(GLANCE) if average > BUSY else average


def processors_in_use(seconds: float) -> float:
    """Return the share of the processors that all programs use in the next `seconds`."""
    return float(psutil.cpu_percent(interval=seconds)) / 100


def gpu_listing() -> str:
    """Return the names of the GPUs, a line for each; empty without one that nvidia-smi knows."""
    return _asked_of_gpus("name")


def _asked_of_gpus(fields: str) -> str:
    """Return what nvidia-smi says of each GPU, a line for each; empty without it."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout


def _gpu_memories() -> tuple[int, ...]:
    """Return the memory of each GPU that CUDA shows to a process, in bytes and in its order.

    Without torch, so from nvidia-smi, which lists all GPUs in the order of the PCI bus.
    """
    memories: dict[str, int] = {}
    for line in _asked_of_gpus("uuid,memory.total").splitlines():
        uuid, comma, mebibytes = line.partition(", ")
        if comma:
            # A GPU that shares the host's memory states none of its own: "[N/A]".
            own = int(mebibytes) << 20 if mebibytes.isdigit() else None
            memories[uuid] = psutil.virtual_memory().total if own is None else own
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(memories.values() if visible is None else _visible(visible, memories))


def _visible(visible: str, memories: Mapping[str, int]) -> Iterator[int]:
    """Yield the memories of the GPUs that CUDA_VISIBLE_DEVICES names, in its order.

    An entry is a number or the beginning of a UUID. As in CUDA, what follows an unknown one does
    not count.

    Args:
        visible: the value of the variable.
        memories: UUID -> memory of every GPU, in the order of their numbers.
    """
    for entry in map(str.strip, visible.split(",")):
        if entry.startswith("MIG-") and memories:
            # A part of a GPU, whose size nvidia-smi does not list: no more than the largest GPU.
            yield max(memories.values())
            continue
        named = [uuid for k, uuid in enumerate(memories) if entry in (str(k), uuid)]
        named = named or [uuid for uuid in memories if entry and uuid.startswith(entry)]
        if len(named) != 1:
            return
        yield memories[named[0]]
