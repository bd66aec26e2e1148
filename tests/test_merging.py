"""benchmarks/merging.py, which is for real models, on a pico one: it runs, and what must hold of any model holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rotdistill_core.testing import pico_folder

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/merging.py"


def test_fine_tunes_are_merged(tmp_path: Path) -> None:
    pico_folder(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=512)
    command = [
        sys.executable,
        str(SCRIPT),
        str(tmp_path / "model"),
        "--layers",
        "2",
        "--limit",
        "30",
        "--texts",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    kl = found["soups"]["held-out KL"]
    assert min(value for name, value in kl.items() if name.startswith("fine-tune")) < kl["base"]
    assert found["soups"]["lora from the dense sum, largest"] <= 1e-6
    assert "same_basis" in found["scrambled"]["refused"]
    aligned, blind = (
        found["scrambled"][f"KL to the soup of the unscrambled, {how}"]
        for how in ("aligned", "blind")
    )
    assert aligned < 1e-4 < blind
    assert len(found["fisher, held-out KL in a random basis"]) == 2
