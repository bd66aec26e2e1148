"""benchmarks/merging.py, which is for real models, runs on a pico one and keeps what must hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rotdistill_core.testing import pico_folder

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/merging.py"
OPTIONS = {"--layers": "2", "--limit": "30", "--texts": "4"}


@pytest.mark.slow
def test_fine_tunes_of_a_pico_model_are_merged(tmp_path: Path) -> None:
    model = pico_folder(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=512)
    options = [word for option in OPTIONS.items() for word in option]
    command = [sys.executable, str(SCRIPT), str(model), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])

    kl = found["soups"]["held-out KL"]
    assert min(value for name, value in kl.items() if name.startswith("fine-tune")) < kl["base"]
    assert found["soups"]["lora from the dense sum, largest"] <= 1e-6
    assert "same_basis" in found["scrambled"]["refused"]
    distance = "KL to the soup of the unscrambled"
    aligned = found["scrambled"][f"{distance}, aligned"]
    blind = found["scrambled"][f"{distance}, blind"]
    assert aligned < 1e-4 < blind
    assert len(found["fisher, held-out KL in a random basis"]) == 2
