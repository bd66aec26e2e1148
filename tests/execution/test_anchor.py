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
from rotdistill_core.testing import (
    pico_folder,
    pico_head,
    pico_texts,
    reopen,
    run_recipe,
    save_folder,
    scramble,
)

RECIPE = (
    pico_head("anchored", "{root}/teacher", "{root}/scrambled")
    + """
anchor.model = "{root}/{anchor}"
student.save_dtype = "float32"
[[step]]
use = "residuals"
{align}
[[step]]
use = "basis-fold"
mode = "{mode}"
[[step]]
use = "fidelity"
"""
)
ALIGNERS = {
    "weights": ["weight-matching"],
    "activations": ["procrustes", "hungarian-permute", "head-gauge"],
    "stream": ["cca"],
}


def run(root: Path, aligners: str, anchor: str = "original", mode: str = "tied") -> RunResult:
    align = "\n".join(f'[[step]]\nuse = "{use}"' for use in ALIGNERS[aligners])
    (root / "r.toml").write_text(
        RECIPE.format(root=root, align=align, anchor=anchor, mode=mode), encoding="utf-8"
    )
    return run_recipe(root / "r.toml")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pico_texts(tmp_path / "texts")
    pico_folder(tmp_path / "teacher", seed=9, hidden_size=48, num_hidden_layers=3)
    pico_folder(tmp_path / "original", seed=1)
    pico_folder(tmp_path / "deeper", seed=1, num_hidden_layers=3)
    original = open_model(ModelRef(model=str(tmp_path / "original")))
    save_folder(scramble(original.weights, 3)[0], original.folder, tmp_path / "scrambled")
    return tmp_path


@pytest.mark.parametrize("aligners", ["weights", "activations"])
def test_a_scrambled_student_is_brought_to_its_anchor(root: Path, aligners: str) -> None:
    outcome = run(root, aligners)
    certificate = outcome.steps["full", "basis-fold"].report.certificate
    assert certificate is not None
    assert certificate.logits_float64 <= 1e-9
    original = open_model(ModelRef(model=str(root / "original"))).weights
    canonical = original.fold({"residual": Rotation(torch.eye(32, dtype=torch.float64))})
    back = reopen(outcome.checkpoints["full"], original)
    for name in canonical.entries:
        assert float((back[name] - canonical[name]).norm() / canonical[name].norm()) < 1e-3, name
    assert {"kl", "top1"} <= {row.metric for row in outcome.rows}


def test_the_principal_frame_is_that_of_the_anchor(root: Path) -> None:
    notes = run(root, "stream", mode="canonical").steps["full", "basis-fold"].notes
    # all 32 directions of the anchor, not 32 of the teacher's 48
    assert notes["teacher variance in the frame"] == pytest.approx(1.0)


def test_an_anchor_of_another_shape_is_refused(root: Path) -> None:
    with pytest.raises(
        SetupError,
        match=r"an anchor is a checkpoint of the student's shape; .* in layers: 3, and 2",
    ):
        run(root, "weights", anchor="deeper")
