"""kill -9 while the teacher writes lessons costs the chunk in flight, and changes no file.

It is killed once while it writes the second block of plain texts, and once while it answers the
questions of the third block.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHUNK = 4
"""Prompts of a chunk, and lessons of a block, in the driver."""
KILLS = ("9", "15")
"""Prompts before which a run is killed."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    words = ["-m", "tests.execution.crash_lessons", str(tmp_path_factory.mktemp("work")), *KILLS]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert printed["undisturbed"]["code"] == 0, done.stderr[-2000:]
    for kill in printed["kills"]:
        ended = (kill["killed"]["code"], kill["again"]["code"])
        assert ended == (-signal.SIGKILL, 0), done.stderr[-2000:]
    return printed


@pytest.mark.slow
def test_at_most_one_chunk_is_written_again(report: dict[str, Any]) -> None:
    undisturbed = report["undisturbed"]["read"]
    assert len(report["kills"]) == len(KILLS)
    for kill in report["kills"]:
        before, after = kill["killed"]["read"], kill["again"]["read"]
        assert 0 < len(before) + len(after) - len(undisturbed) <= CHUNK
        assert undisturbed[-len(after) :] == after


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_files(report: dict[str, Any]) -> None:
    undisturbed = report["undisturbed"]["files"]
    assert {"lessons.json", "samples.tsv"} <= {Path(path).name for path in undisturbed}
    for kill in report["kills"]:
        assert kill["files"] == undisturbed
