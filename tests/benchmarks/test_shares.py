"""benchmarks/shares.py counts each moment once, and finds every function that it times."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

from rotdistill_core.testing import PicoWorkspace

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/shares.py"
STEPS = """
variants = { base = [], full = ["basis", "fold", "head"] }
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { id = "head", use = "lm-head-ridge" },
    { use = "fidelity" },
]
check.logits_float32 = 1e-2
"""


@pytest.fixture(scope="module")
def shares() -> ModuleType:
    specification = spec_from_file_location("shares", SCRIPT)
    assert specification
    assert specification.loader
    module = module_from_spec(specification)
    sys.modules["shares"] = module
    specification.loader.exec_module(module)
    return module


def ticking(*times: float) -> Callable[[], float]:
    """Return a clock that shows these times, one after the other."""
    shown: Iterator[float] = iter(times)
    return lambda: next(shown)


def test_nested_work_counts_for_the_inner_kind(shares: ModuleType) -> None:
    watch = shares.Stopwatch(ticking(0.0, 1.0, 3.0, 7.0, 100.0, 101.0))

    def hash_it() -> None:
        with watch.timed("hashing"):
            pass

    watch.wrap("forward", hash_it)()  # from 0 to 7, with hashing from 1 to 3
    with watch.timed("forward"):  # from 100 to 101
        pass
    assert watch.times == {
        "forward": shares.Time(seconds=6.0, calls=2),
        "hashing": shares.Time(seconds=2.0, calls=1),
    }


def test_other_threads_are_counted_apart(shares: ModuleType) -> None:
    watch = shares.Stopwatch(ticking(0.0, 4.0))
    thread = Thread(target=watch.wrap("fsync", lambda: None))
    thread.start()
    thread.join()
    assert watch.times == {"fsync": shares.Time(beside=4.0, calls=1)}


def test_the_table_adds_up(shares: ModuleType) -> None:
    solves = {"solves": shares.Time(seconds=3.0, calls=1200, beside=0.5)}
    lines = shares.table(solves, wall=12.0).splitlines()
    assert "| solves | 3.0 | 25.0 % | 1,200 | 0.5 |" in lines
    assert "| the rest | 9.0 | 75.0 % | | |" in lines
    assert lines[-1] == "| the run | 12.0 | 100 % | | |"


@pytest.mark.slow
def test_a_pico_run_is_measured(tmp_path: Path) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model(num_hidden_layers=3)
    recipe = workspace.recipe(STEPS, teacher=tmp_path / "model", student=tmp_path / "model")
    command = [sys.executable, str(SCRIPT), str(recipe), "--limit", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \| (\S+) % \| ([\d,]*) ?\|", done.stdout, re.MULTILINE)
    calls = {kind: int(count.replace(",", "")) for kind, _, _, count in rows if count}
    assert calls.pop("loading whole models") > 0
    assert len(calls) == 7
    assert all(count > 0 for count in calls.values())
    assert sum(float(share) for _, _, share, _ in rows[:-1]) == pytest.approx(100, abs=0.5)
