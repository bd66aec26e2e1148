"""A sample of the fault matrix: some cases of every class, all of them right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = 24


@pytest.mark.slow
def test_a_sample_of_the_fault_matrix_is_right(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    words = ["-m", "tests.faults", "--sample", str(CASES), "--workers", "1", "--json", str(rows)]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    assert rows.exists(), done.stderr[-3000:]
    wrong = [row for row in json.loads(rows.read_text(encoding="utf-8")) if row["wrong"]]
    assert not wrong, json.dumps(wrong, indent=1)[:6000]
    assert done.returncode == 0
