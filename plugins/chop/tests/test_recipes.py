"""Whole recipes of pico models: capture, aligners, folds, refits and scores after a cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    PicoWorkspace,
    final_states,
    pico_samples,
    reopen,
)

STEPS = """
variants.base = []
variants.rotated = ["basis", "fold"]
variants.refit = ["basis", "refit", "head"]
variants.full = ["basis", "fold", "refit", "head"]
student.save_dtype = "float32"
samples.guard = "texts/guard.tsv"
samples.own_answers = 4
check.logits_float32 = 1e-2
step = [
    { use = "chop", CUT },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold", mode = "canonical" },
    { id = "refit", use = "writer-refit", writers = ["heads", "neurons"], guard = "off" },
    { id = "head", use = "lm-head-ridge", guard = "off" },
    { use = "fidelity" },
]
"""
CUTS = (
    "layers = 4",
    'layers = 4, criterion = "kl"',
    "neurons = 36",
    "kv_heads = 1",
    "width = 24",
    "layers = 4, neurons = 40, width = 28",
    "keep_fraction = 0.7",
)


def run_cut(work: Path, cut: str, student: str) -> tuple[RunResult, dict[tuple[str, str], float]]:
    """Run the recipe; return the result, and the value of each (variant, metric) over all texts."""
    workspace = PicoWorkspace(work)
    workspace.model("teacher", num_hidden_layers=5)
    workspace.model("other", num_hidden_layers=5, seed=1)
    workspace.texts(blurbs=30)
    steps = STEPS.replace("CUT", cut)
    outcome = workspace.run(workspace.recipe(steps, teacher="teacher", student=student))
    values = {
        (row.variant, row.metric): row.value
        for row in outcome.rows
        if row.layer is None and row.language is None
    }
    return outcome, values


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_every_later_step_works_after_every_cut(tmp_path: Path, cut: str) -> None:
    _, values = run_cut(tmp_path, cut, "teacher")
    assert all(math.isfinite(value) for value in values.values())
    for metric in ("kl", "hidden_cosine"):
        assert values["rotated", metric] == pytest.approx(values["base", metric], rel=1e-4)
    assert values["refit", "kl"] < values["base", "kl"]
    assert values["refit", "hidden_cosine"] >= values["base", "hidden_cosine"]
    assert values["full", "kl"] == pytest.approx(values["refit", "kl"], rel=0.1)
    assert values["full", "parameters"] <= values["rotated", "parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["neurons = 36", "width = 24"])
def test_student_of_another_model_can_be_cut_too(tmp_path: Path, cut: str) -> None:
    outcome, values = run_cut(tmp_path, cut, "other")
    assert all(math.isfinite(value) for value in values.values())
    assert values["rotated", "kl"] == pytest.approx(values["base", "kl"], rel=1e-4)
    assert values["full", "kl"] <= values["base", "kl"] + 1e-3
    model = open_model(ModelRef(model=str(tmp_path / "other")))
    view: Weights = reopen(outcome.checkpoints["full"], model.weights)
    assert torch.isfinite(final_states(view, pico_samples(texts=5).layout, torch.float32)).all()
