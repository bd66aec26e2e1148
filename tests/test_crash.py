"""kill -9 at three random writes in each stage, then run again: the same checkpoints, and no committed step done twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path


def test_a_killed_run_goes_on_to_the_same_checkpoints(tmp_path: Path) -> None:
    driver = Path(__file__).with_name("crash.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr[-2000:]
    assert len(found["golden"]) == 2
    assert {"chop", "residuals", "basis", "fold", "refit", "head", "saving"} <= {
        kill["stage"] for kill in found["kills"]
    }
    for kill in found["kills"]:
        assert kill["killed"] == -signal.SIGKILL, kill
        assert kill["again"] == 0, (kill, done.stderr[-2000:])
        assert kill["same"], kill
        assert kill["steps"] == found["steps"], (
            kill
        )  # every step was committed once, whichever process did it
