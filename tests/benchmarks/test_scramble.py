"""benchmarks/scramble.py on the real small model: a scrambled model is brought back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/scramble.py"
OPTIONS = ("--limit", "7", "--only", "weights", "--only", "activations")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def test_a_scrambled_model_computes_the_same_and_averages_to_garbage(
    figures: dict[str, Any],
) -> None:
    assert figures["largest change of a logit, float64"] <= 1e-8
    assert figures["barrier before"] > 3


@pytest.mark.parametrize("source", ["weights", "activations"])
def test_a_scrambled_model_is_brought_back(figures: dict[str, Any], source: str) -> None:
    found = figures[f"from {source}"]
    assert found["permutations wrong"] == 0
    assert found["barrier"] <= 1e-3
    assert found["farthest weight"] <= (1e-5 if source == "weights" else 1e-3)
