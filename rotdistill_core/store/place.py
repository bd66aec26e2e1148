"""Where a process runs, and the temporary files that say so in their names.

A process id means something only on its machine, until that restarts, and in its pid namespace: a
container has ids of its own. So a temporary file is named after the place of the process that
writes it, and no other place takes it for the file of a dead process.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from rotdistill_core.store.plain import read_bytes

INITIAL_NAMESPACE = "pid:[4026531836]"
"""The pid namespace of a Linux machine itself, outside all containers (PROC_PID_INIT_INO)."""
_NAME = re.compile(r".*\.([0-9a-f]{8})([0-9a-f]{8})\.(\d+)\.[0-9a-f]+\.tmp")


@dataclass(frozen=True)
class Place:
    """Where process ids mean the same."""

    machine: str
    """Hash of the machine and the pid namespace, the same after a restart; 8 hex digits."""
    boot: str
    """Hash of those and of this start of the machine; 8 hex digits."""
    outlives: bool = False
    """Whether a process here that an earlier start of the machine left is dead for certain. In a
    container that is not known: another machine may have one of the same name."""

    @classmethod
    def of(cls, host: str, machine: str, boot: str, namespace: str) -> Place:
        """Return the place of a host name, ids of machine and boot, and a pid namespace."""
        lasting = (host, machine, namespace)
        return cls(
            machine=_short(*lasting),
            boot=_short(*lasting, boot),
            outlives=bool(machine) and namespace == INITIAL_NAMESPACE,
        )

    def temporary(self, path: Path, pid: int) -> Path:
        """Return a unique temporary name next to a file, for a process here."""
        name = f"{path.name}.{self.machine}{self.boot}.{pid}.{secrets.token_hex(4)}.tmp"
        return path.with_name(name)

    def has_left(self, path: Path) -> bool:
        """Return whether a path is the temporary file of a process of this place that is dead."""
        match = _NAME.fullmatch(path.name)
        if match is None or match[1] != self.machine:
            return False
        return self.outlives if match[2] != self.boot else not is_alive(int(match[3]))

    def pid_of(self, path: Path) -> int | None:
        """Return the process of this place that a temporary file is named after, if it is one."""
        match = _NAME.fullmatch(path.name)
        is_here = match is not None and (match[1], match[2]) == (self.machine, self.boot)
        return int(match[3]) if match is not None and is_here else None


def pid_in_name(path: Path) -> int | None:
    """Return the process id in the name of a temporary file, of whatever place; None without."""
    match = _NAME.fullmatch(path.name)
    return int(match[3]) if match else None


def this_place() -> Place:
    """Return the place of this process. What the system does not tell counts as empty."""
    return Place.of(
        host=socket.gethostname(),
        machine=_content(Path("/etc/machine-id")),
        boot=_content(Path("/proc/sys/kernel/random/boot_id")),
        namespace=_target(Path("/proc/self/ns/pid")),
    )


def is_alive(pid: int) -> bool:
    """Return whether there is a process with this id here."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # another user's process
    return True


def _short(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _content(path: Path) -> str:
    try:
        return read_bytes(path).decode(errors="replace").strip()
    except OSError:
        return ""


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
