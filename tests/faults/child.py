"""One call of the command line in a forked child, with a fault in it.

The parent has imported everything and has one thread, so a fork is safe and a call costs what the
run costs and no start of an interpreter.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from rotdistill_core import cli
from rotdistill_core.execution import executor

WALL_SECONDS = 90.0
"""A call that takes longer hangs; the machine may be busy."""
CPU_SECONDS = 30
"""A call that computes longer never ends."""
MEMORY = 3 << 30
"""Bytes of address space that a call may take beyond those of the parent."""


@dataclass(frozen=True)
class Ended:
    """How a call ended."""

    words: tuple[str, ...]
    code: int
    """Exit code; minus the signal where one ended it."""
    out: str
    err: str
    seconds: float
    hung: bool = False

    @property
    def text(self) -> str:
        """All that was printed."""
        return self.out + self.err


@dataclass(frozen=True)
class Signal:
    """A signal that is sent to a call."""

    number: int
    after: float
    """Seconds from the start of the call."""


def call(
    folder: Path,
    *words: str,
    fault: Callable[[], None] = lambda: None,
    signals: Sequence[Signal] = (),
    limited: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Call the command line in a folder.

    Args:
        folder: the current folder of the call.
        words: its words.
        fault: called in the child before the call; it may plant a fault.
        signals: what is sent to it, and when.
        limited: whether memory is limited, for inputs that may ask for all of it.
        environment: variables to set.
    """
    started = begin(folder, *words, fault=fault, limited=limited, environment=environment)
    return started.end(signals)


def begin(
    folder: Path,
    *words: str,
    fault: Callable[[], None] = lambda: None,
    limited: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Running:
    """Begin a call of the command line; see `call`."""
    out, err = _unnamed("out"), _unnamed("err")
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        _become(folder, words, (out, err), tell, limited, {**(environment or {})}, fault)
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    return Running(pid, words, out, err, time.monotonic())


def _unnamed(name: str) -> int:
    return os.memfd_create(name)


@dataclass
class Running:
    """A call in progress."""

    pid: int
    words: tuple[str, ...]
    out: int
    err: int
    started: float

    def send(self, number: int) -> None:
        """Send a signal, if the call still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self, signals: Sequence[Signal] = ()) -> Ended:
        """Wait for the end; send signals meanwhile."""
        waiting = os.pidfd_open(self.pid)
        hung = True
        try:
            for each in signals:
                left = max(0.0, self.started + each.after - time.monotonic())
                if select.select([waiting], [], [], left)[0]:
                    break
                self.send(each.number)
            left = max(0.0, self.started + WALL_SECONDS - time.monotonic())
            if select.select([waiting], [], [], left)[0]:
                hung = False
            else:
                self.send(signal.SIGKILL)
        finally:
            os.close(waiting)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        seconds = time.monotonic() - self.started
        hung = hung or code in (-signal.SIGXCPU, -signal.SIGALRM)
        return Ended(self.words, code, _text(self.out), _text(self.err), seconds, hung)


def _text(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    with open(handle, "rb") as stream:
        return stream.read().decode("utf-8", "surrogateescape")


def _become(
    folder: Path,
    words: Sequence[str],
    streams: tuple[int, int],
    tell: int,
    limited: bool,
    environment: dict[str, str],
    fault: Callable[[], None],
) -> None:
    """Turn this child into the command line; it never returns."""
    code = 1
    try:
        # After a fork torch makes its pool of threads anew, when a thread first computes. Two that
        # begin together would meet half of it, so the only thread does it now.
        torch.set_num_threads(1)
        os.chdir(folder)
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ.update(environment)
        sys.argv = ["rotdistill", *words]
        # What is measured of steps is in results and reports; it is no part of a comparison.
        executor.time = SimpleNamespace(monotonic=lambda: 0.0)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
        fault()
        os.write(tell, b"1")
        os.close(tell)
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    return pages * resource.getpagesize()
