"""What comes behind a cut: capture, aligners, folds, refits and the table, in whole recipes of pico models."""

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
    final_states,
    pico_folder,
    pico_head,
    pico_samples,
    pico_texts,
    reopen,
    run_recipe,
)

RECIPE = (
    pico_head("cut", "{teacher}", "{student}")
    + """
observers = []
student.save_dtype = "float32"
samples.guard = "texts/guard.tsv"
samples.own_answers = 4
[check]
logits_float32 = 1e-2
[[step]]
use = "chop"
{chop}
[[step]]
use = "residuals"
[[step]]
id = "basis"
use = "procrustes"
[[step]]
id = "fold"
use = "basis-fold"
mode = "canonical"
[[step]]
id = "refit"
use = "writer-refit"
writers = ["heads", "neurons"]
[[step]]
id = "head"
use = "lm-head-ridge"
[[step]]
use = "fidelity"
[variants]
base = []
rotated = ["basis", "fold"]
refit = ["basis", "refit", "head"]
full = ["basis", "fold", "refit", "head"]
"""
)
CUTS = (
    "layers = 4",
    'layers = 4\nchoose = "kl"',
    "neurons = 36",
    "groups = 1",
    "width = 24",
    "layers = 4\nneurons = 40\nwidth = 28",
    "keep = 0.7",
)


def carried(work: Path, chop: str, student: str) -> tuple[RunResult, dict[tuple[str, str], float]]:
    pico_folder(work / "teacher", num_hidden_layers=5)
    pico_folder(work / "other", num_hidden_layers=5, seed=1)
    pico_texts(work / "texts", blurbs=30)
    path = work / "recipe.toml"
    path.write_text(
        RECIPE.format(teacher=work / "teacher", student=work / student, chop=chop), encoding="utf-8"
    )
    outcome = run_recipe(path)
    return outcome, {
        (row.variant, row.metric): row.value
        for row in outcome.rows
        if row.layer is None and row.language is None
    }


@pytest.mark.parametrize("chop", CUTS)
def test_every_later_step_works_behind_every_cut(tmp_path: Path, chop: str) -> None:
    _, found = carried(tmp_path, chop, "teacher")
    assert all(math.isfinite(value) for value in found.values())
    assert found["rotated", "kl"] == pytest.approx(found["base", "kl"], rel=1e-4)
    assert found["rotated", "hidden_cosine"] == pytest.approx(
        found["base", "hidden_cosine"], rel=1e-4
    )
    assert found["refit", "kl"] < found["base", "kl"]
    assert found["refit", "hidden_cosine"] >= found["base", "hidden_cosine"]
    assert found["full", "kl"] == pytest.approx(found["refit", "kl"], rel=0.1)
    assert found["full", "parameters"] <= found["rotated", "parameters"]


@pytest.mark.parametrize("chop", ["neurons = 36", "width = 24"])
def test_a_student_that_is_no_part_of_its_teacher_may_be_cut_too(tmp_path: Path, chop: str) -> None:
    outcome, found = carried(tmp_path, chop, "other")
    assert all(math.isfinite(value) for value in found.values())
    assert found["rotated", "kl"] == pytest.approx(found["base", "kl"], rel=1e-4)
    assert found["full", "kl"] <= found["base", "kl"] + 1e-3
    model = open_model(ModelRef(model=str(tmp_path / "other")))
    view: Weights = reopen(outcome.checkpoints["full"], model.weights)
    assert torch.isfinite(final_states(view, pico_samples(texts=5).layout, torch.float32)).all()
