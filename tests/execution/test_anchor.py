"""An anchor: the student is aligned to another checkpoint of its shape, scored on the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import SetupError
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import PicoWorkspace, reopen, save_folder, scramble

STEPS = """
anchor.model = "{anchor}"
student.save_dtype = "float32"
[[step]]
use = "residuals"
{aligners}
[[step]]
use = "basis-fold"
mode = "{mode}"
[[step]]
use = "fidelity"
"""
ALIGNERS = {
    "weights": ["weight-matching"],
    "activations": ["procrustes", "hungarian-permute", "head-gauge"],
    "stream": ["cca"],
}


@pytest.fixture
def workspace(tmp_path: Path) -> PicoWorkspace:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model("teacher", seed=9, hidden_size=48, num_hidden_layers=3)
    workspace.model("deeper", seed=1, num_hidden_layers=3)
    original = open_model(ModelRef(model=str(workspace.model("original", seed=1))))
    save_folder(scramble(original.weights, 3)[0], original.folder, tmp_path / "scrambled")
    return workspace


def run(
    workspace: PicoWorkspace, kind: str, anchor: str = "original", mode: str = "tied"
) -> RunResult:
    aligners = "\n".join(f'[[step]]\nuse = "{use}"' for use in ALIGNERS[kind])
    steps = STEPS.format(aligners=aligners, anchor=anchor, mode=mode)
    return workspace.run(workspace.recipe(steps, teacher="teacher", student="scrambled"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "activations"])
def test_a_scrambled_student_is_brought_to_its_anchor(workspace: PicoWorkspace, kind: str) -> None:
    outcome = run(workspace, kind)
    certificate = outcome.steps["full", "basis-fold"].report.certificate
    assert certificate is not None
    assert certificate.logits_float64 <= 1e-9
    original = open_model(ModelRef(model=str(workspace.folder / "original"))).weights
    canonical = original.fold({"residual": Rotation(torch.eye(32, dtype=torch.float64))})
    back = reopen(outcome.checkpoints["full"], original)
    for name in canonical.entries:
        assert float((back[name] - canonical[name]).norm() / canonical[name].norm()) < 1e-3, name
    assert {"kl", "top1"} <= {row.metric for row in outcome.rows}


def test_the_principal_frame_is_that_of_the_anchor(workspace: PicoWorkspace) -> None:
    notes = run(workspace, "stream", mode="canonical").steps["full", "basis-fold"].notes
    # all 32 directions of the anchor, not 32 of the teacher's 48
    assert notes["teacher variance in the frame"] == pytest.approx(1.0)


def test_an_anchor_of_another_shape_is_refused(workspace: PicoWorkspace) -> None:
    with pytest.raises(
        SetupError,
        match=r"an anchor is a checkpoint of the student's shape; .* in layers: 3, and 2",
    ):
        run(workspace, "weights", anchor="deeper")
