"""A finished run that tests may damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.testing import PicoWorkspace

STEPS = """
variants = { base = [], full = ["rotate", "fold"] }
step = [
    { use = "chop", layers = 1 },
    { use = "residuals" },
    { id = "rotate", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
"""


@pytest.fixture(scope="module")
def finished(make_workspace: Callable[..., PicoWorkspace]) -> Path:
    """Return a folder with a finished run."""
    workspace = make_workspace(num_hidden_layers=2)
    workspace.run(workspace.recipe(STEPS, name="trial", tables="check.logits_float32 = 1e-2"))
    return workspace.folder


@pytest.fixture
def run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the run, which a test may damage; its models stay where they are."""
    monkeypatch.chdir(finished)
    kept = finished / "kept"
    if not kept.exists():
        shutil.copytree(finished / "runs", kept)
    shutil.rmtree(finished / "runs")
    shutil.copytree(kept, finished / "runs")
    [found] = (finished / "runs").iterdir()
    return found
