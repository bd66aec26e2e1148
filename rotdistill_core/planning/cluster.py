"""What a run takes on several machines: time, memory of a rank, disk, and bytes between machines.

A step states how its work splits (`Cost`): what is dealt over the processes, what each of them adds
up with the others, and the rest, which the first process does while the others wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rotdistill_core.errors import RecipeError, suggest
from rotdistill_core.planning.cost import Cost
from rotdistill_core.planning.machine import Machine
from rotdistill_core.planning.rates import ASSUMED

GIB = 1 << 30
MOST = 4096
"""Largest number of machines, and of GPUs of one: more is a slip of the hand."""
HERE = "here"
"""Name of this machine in the table."""


@dataclass(frozen=True)
class Kind:
    """One kind of GPU, with its share of the machine around it."""

    memory: int
    """Bytes of memory."""
    operations: float
    """Floating-point operations in a second, in bfloat16 and in practice: 0.3 of the data sheet."""
    network: float
    """Bytes in a second between two machines."""
    ram: int
    """Bytes of host memory for each GPU."""
    host_operations: float = 1e12
    """Floating-point operations in a second of the processors, in float64."""
    measured: bool = False
    """Whether the operations of the GPU were measured; else they are assumed."""
    host_measured: bool = False
    """Whether those of the processors were."""


KINDS = {
    "h100": Kind(80 * GIB, 3.0e14, 4.5e10, 128 * GIB),
    "h200": Kind(141 * GIB, 3.0e14, 4.5e10, 128 * GIB),
    "a100": Kind(80 * GIB, 1.0e14, 2.2e10, 128 * GIB),
    "l40s": Kind(48 * GIB, 1.1e14, 1.1e10, 64 * GIB),
    "rtx4090": Kind(24 * GIB, 5.0e13, 1.1e9, 32 * GIB),
}
"""Name -> kind. The memory of a GPU is that of its data sheet. The other figures are assumed: no
such machine was at hand."""


@dataclass(frozen=True)
class Cluster:
    """Equal machines."""

    nodes: int
    gpus: int
    """Of each machine; a process computes on each."""
    name: str
    """Of the kind of GPU."""
    kind: Kind

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.nodes * self.gpus

    def machine(self, here: Machine) -> Machine:
        """Return one of the machines; its cores, and how fast they are, are those of this one.

        Several machines have the folder of runs on a disk that all of them see, and other machines
        than this one have disks of their own: how much is free there is not known.
        """
        if self.name == HERE:
            return here if self.nodes == 1 else replace(here, disk=None)
        memory = (self.kind.memory,) * self.gpus
        profile = here.profile and here.profile.on_gpu(self.kind.operations)
        return Machine(self.kind.ram * self.gpus, memory, None, here.cores, profile)

    def seconds(self, cost: Cost) -> float:
        """Return the time of a step: the dealt part, what one process does alone, and sums."""
        on_host = not (cost.device_bytes or cost.teacher_device_bytes)
        speed = self.kind.host_operations if on_host else self.kind.operations
        alone = cost.operations - cost.dealt_operations
        computed = (alone + cost.dealt_operations / self.ranks) / speed
        return computed + self.traffic_bytes(cost) / self.kind.network

    def traffic_bytes(self, cost: Cost) -> float:
        """Return the bytes that a machine sends to others, in the mean; none if it is alone.

        Sums go round in a ring: each process passes on twice what it holds, but for its own part.
        Rows go to the first process once, except those of its own machine.
        """
        if self.nodes == 1:
            return 0.0
        ring = 2 * (self.ranks - 1) / self.ranks
        added = sum(
            each.size * (math.ceil(each.times / self.ranks) if each.dealt else each.times)
            for each in cost.added_up
        )
        sent = sum(each.size * self._elsewhere(each.batches) for each in cost.gathered)
        return ring * added + sent / self.nodes

    def _elsewhere(self, batches: int) -> float:
        """Return the share of dealt batches that is not computed on the first machine."""
        rounds, rest = divmod(batches, self.ranks)
        here = rounds * self.gpus + min(rest, self.gpus)
        return 1 - here / batches if batches else 0.0

    def constants(self) -> list[str]:
        """Return the constants that figures come from, and whether they were measured."""
        kind = self.kind
        memory, ram = ("measured", "measured") if self.name == HERE else ("data sheet", "assumed")
        of_gpu, of_host = (
            "measured" if each else "assumed" for each in (kind.measured, kind.host_measured)
        )
        return [
            f"{kind.operations / 1e12:.3g} TFLOP/s ({of_gpu})",
            f"{kind.host_operations / 1e12:.3g} TFLOP/s of the processors ({of_host})",
            f"{kind.network / 1e9:g} GB/s between machines (assumed)",
            f"{kind.memory / GIB:.0f} GiB of GPU memory ({memory})",
            f"{kind.ram / GIB:.0f} GiB of host memory for each ({ram})",
        ]


def cluster_of(nodes: int | None, gpus: int | None, name: str | None, here: Machine) -> Cluster:
    """Return the machines that a command names; one of each where it does not say.

    Raises:
        RecipeError: there are none of them, or too many, or no such kind.
    """
    for option, count in (("--nodes", nodes), ("--gpus", gpus)):
        if count is not None and not 1 <= count <= MOST:
            raise RecipeError(
                f"{option} {count}: must be a number from 1 to {MOST}: how many "
                f"{'machines' if option == '--nodes' else 'GPUs each machine has'}."
            )
    name = (name or HERE).lower().replace("-", "").replace(" ", "")
    if name != HERE and name not in KINDS:
        names = [*KINDS, HERE]
        raise RecipeError(
            f"--gpu {name:.40}: is no kind of GPU that is known.{suggest(name, names)} Write one "
            f"of {', '.join(names)}; `{HERE}` is the kind of this machine."
        )
    count = gpus or (max(len(here.gpus), 1) if name == HERE else 1)
    kind = _kind_here(here, count) if name == HERE else KINDS[name]
    return Cluster(nodes or 1, count, name, kind)


def _kind_here(here: Machine, gpus: int) -> Kind:
    """Return what stands for this machine; without a GPU its processes share the cores."""
    profile = here.profile or ASSUMED
    on_host = not here.gpus
    speed = profile.host.float32 / gpus if on_host else profile.gpu.bfloat16
    return Kind(
        memory=min(here.gpus, default=0),
        operations=speed,
        network=1.1e9,
        ram=here.ram // gpus,
        host_operations=profile.host.float64,
        measured=here.profile is not None and (on_host or profile.gpu_measured),
        host_measured=here.profile is not None,
    )
