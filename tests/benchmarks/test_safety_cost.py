"""benchmarks/safety_cost.py measures two runs, and its shares add up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/safety_cost.py"


@pytest.mark.slow
def test_shares_of_both_runs_add_up(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "--runs", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "%" in line]
    assert [row[0] for row in rows] == ["first", "again, all reused"]
    for row in rows:
        hashing, fsync, ledger, together = (float(cell.rstrip(" %")) for cell in row[2:6])
        assert min(hashing, fsync, ledger) >= 0
        assert 0 < together < 100
        assert together == pytest.approx(hashing + fsync + ledger, abs=0.2)
    assert float(rows[1][1]) < float(rows[0][1])
    assert list(tmp_path.iterdir()) == []
