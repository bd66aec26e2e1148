"""A refit takes no more memory for more texts, and the same work for each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).parent / "refit_memory.py"


def refitted(work: Path, texts: int) -> dict[str, Any]:
    """Refit on some texts in a process of its own; see the driver."""
    threads = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(DRIVER), str(work), str(texts)]
    done = subprocess.run(command, env=threads, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_texts_and_work_is_the_same_for_each(tmp_path: Path) -> None:
    few, many = refitted(tmp_path / "few", 200), refitted(tmp_path / "many", 2000)
    assert abs(many["peak"] / few["peak"] - 1) < 0.05
    assert many["left"] == few["left"] == []
    # The same passes in the same order; but for the two texts that tell where the streams part,
    # each of a number of texts that is proportional.
    assert len(many["passes"]) == len(few["passes"]) > 8
    for one, ten in zip(few["passes"], many["passes"], strict=True):
        assert one == ten == 2 or ten == pytest.approx(10 * one, rel=0.05)
