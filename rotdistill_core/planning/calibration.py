"""The rates of this machine: measured once, and kept in the user's cache.

They are measured in a process of its own, so no plan loads torch for them, and nothing that goes
wrong there stops a run: then times are not known.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter

from rotdistill_core.errors import SetupError
from rotdistill_core.planning.machine import gpu_listing
from rotdistill_core.planning.rates import ASSUMED, Profile
from rotdistill_core.store.files import json_blocks, write_file
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.layout import CALIBRATION, user_cache
from rotdistill_core.store.plain import read_bytes

VARIABLE = "ROTDISTILL_CALIBRATION"
"""The environment variable that says where rates come from; empty for those of this machine."""
FIXED = "assumed"
"""Its value for `ASSUMED`, the same everywhere."""
OFF = "off"
"""Its value for no rates; any other one means the same."""
MEASURE = ("-m", "rotdistill_core.planning.measure")
"""What Python is started with to measure."""
MOST_SECONDS = 300
"""Seconds after which a calibration is given up. On an idle machine it takes about ten."""
MOST_KEPT = 64
"""Machines whose rates are kept, the newest ones: a cache may lie on a disk that many share."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
Log = Callable[[str], None]

_KEPT = TypeAdapter(dict[str, Profile | None])
_MEASURED = TypeAdapter(Profile)


def calibrated(log: Log, again: bool = False) -> Profile | None:
    """Return the rates of this machine, and measure them if they are not known yet.

    Args:
        log: takes a line before they are measured, and one if that fails.
        again: measure them in any case.

    Returns:
        None where they cannot be measured, or should not be.
    """
    if os.environ.get(VARIABLE):
        return kept_profile()
    key, kept = machine_key(), _read()
    if key in kept and not again:
        return kept[key]
    log(
        "calibration: this machine is measured once, about ten seconds if it is idle "
        f"({_path()}; --recalibrate measures again)"
    )
    profile: Profile | None = None
    try:
        profile = measured()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log(
            f"calibration: failed, so times are not known: {_last_line(error)}. --recalibrate "
            "tries again."
        )
    _keep(key, profile, log)
    return profile


def kept_profile() -> Profile | None:
    """Return the rates of this machine if they are known; nothing is measured."""
    asked = os.environ.get(VARIABLE)
    if asked:
        return ASSUMED if asked == FIXED else None
    return _read().get(machine_key())


def measured() -> Profile:
    """Measure the rates of this machine in a process of its own.

    Raises:
        SubprocessError: it failed, or took too long.
        ValueError: what it printed are no rates.
        OSError: no process could be started.
    """
    done = subprocess.run(
        [sys.executable, *MEASURE],
        capture_output=True,
        text=True,
        check=True,
        timeout=MOST_SECONDS,
    )
    return _MEASURED.validate_json(done.stdout)


def machine_key() -> str:
    """Return what the rates of a machine depend on, hashed.

    That is the machine, its processors and GPUs, the threads that torch may use, and torch.
    """
    threads = [os.environ.get(name, "") for name in THREAD_VARIABLES]
    cores = str(os.cpu_count())
    return digest(
        "calibration 1", platform.node(), _processor(), cores, gpu_listing(), *threads,
        version("torch"),
    )  # fmt: skip


def _processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0] if names else platform.processor()}"


def _path() -> Path:
    return user_cache() / CALIBRATION


def _read() -> dict[str, Profile | None]:
    """Return the rates that are kept; none if the file is missing or damaged."""
    try:
        return _KEPT.validate_json(read_bytes(_path()))
    except (OSError, ValueError):
        return {}


def _keep(key: str, profile: Profile | None, log: Log) -> None:
    """Keep rates, or that they cannot be measured."""
    older = {name: each for name, each in _read().items() if name != key}
    newest = dict([*older.items(), (key, profile)][-MOST_KEPT:])
    try:
        write_file(_path(), json_blocks(_KEPT.dump_python(newest), sort_keys=False))
    except SetupError as error:
        log(f"{error} The next plan measures again.")


def _last_line(error: Exception) -> str:
    """Return what went wrong, in one line: of a process the last one that it printed."""
    lines = (getattr(error, "stderr", None) or "").strip().splitlines()
    return (lines or str(error).splitlines() or [type(error).__name__])[-1].rstrip(".")
