"""kill -9 at writes of each stage: the next run ends with the same files, byte by byte.

No committed step is made twice.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_files(tmp_path: Path) -> None:
    driver = Path(__file__).with_name("crash.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["code"] == 0, done.stderr[-2000:]
    names = {Path(path).name for path in report["golden"]}
    assert names >= {"recipe.toml", "recipe.resolved.json", "samples.tsv", "system.md", "COMPLETE"}
    assert names >= {"results.jsonl", "ledger.jsonl", "model.safetensors"}
    stages = {kill["stage"] for kill in report["kills"]}
    assert stages >= {
        "before the steps",
        "chop",
        "residuals",
        "basis",
        "fold",
        "refit",
        "head",
        "saving",
    }
    for kill in report["kills"]:
        assert kill["killed"] == -signal.SIGKILL, kill
        assert kill["again"] == 0, (kill, done.stderr[-2000:])
        assert kill["differences"] == [], kill
        # every step was committed once, by the killed process or by the next
        assert kill["steps"] == report["steps"], kill
