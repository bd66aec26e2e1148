"""A context of pico models, and a pico recipe before and after its run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.planning.cost import CostContext
from rotdistill_core.planning.shape import ModelShape
from rotdistill_core.planning.text_counts import TextCounts
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import PICO, PicoWorkspace

STEPS = """
variants = { base = [], full = ["basis", "fold"] }
student.save_dtype = "bfloat16"
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
"""


@pytest.fixture
def pico_context() -> CostContext:
    """Return two pico models of different depths, and 30 texts."""
    adapter = adapter_for("llama")
    config = {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 8, **PICO}
    return CostContext(
        teacher=ModelShape(adapter, {**config, "num_hidden_layers": 3}, "float32"),
        student=ModelShape(adapter, config, "float32"),
        texts=TextCounts(
            prefix=12,
            rows={"fit": 400, "validation": 100, "heldout": 80, "guard": 40},
            texts={"fit": 16, "validation": 4, "heldout": 5, "guard": 5},
            questions_asked=5,
            answer_tokens=40,
        ),
        teacher_bytes=4,
        student_bytes=4,
        same=False,
    )


@pytest.fixture(scope="session")
def finished_run(make_workspace: Callable[..., PicoWorkspace]) -> Path:
    """Return a folder in which the recipe has run once."""
    workspace = make_workspace(num_hidden_layers=3)
    workspace.run(workspace.recipe(STEPS))
    return workspace.folder


@pytest.fixture
def after_run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the finished run, which is the current folder."""
    folder = shutil.copytree(finished_run, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def before_run(after_run: Path) -> Path:
    """Return the same folder without any run."""
    shutil.rmtree(after_run / "runs")
    return after_run
