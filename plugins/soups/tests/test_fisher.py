"""Fisher information weighs parameters, and belongs to one basis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rotdistill_soups._fisher import FisherSettings, fisher_information
from safetensors.torch import load_file

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import pico_output, pico_samples, random_rotation, save_folder

FineTune = Callable[..., str]
Merge = Callable[..., Any]


def test_fisher_weighs_by_information(tmp_path: Path, merge: Merge, fine_tune: FineTune) -> None:
    one, two = fine_tune("a", 1), fine_tune("b", 2)
    merged = merge(one, two, method="fisher", fisher_texts=6)
    assert set(merged.notes["mean Fisher"]) == {one, two}
    files = sorted((tmp_path / "runs").glob("*/weights/step/fisher_*.safetensors"))
    F, G = ({n: t.double() for n, t in load_file(file).items()} for file in files)
    A, B = (open_model(ModelRef(model=path)).weights for path in (one, two))
    for n in A.entries:
        wanted = (F[n] * A[n] + G[n] * B[n]) / (F[n] + G[n]).clamp_min(1e-30)
        informed = (F[n] + G[n]) > 1e-20
        torch.testing.assert_close(
            merged.weights[n].double()[informed], wanted[informed], rtol=0, atol=1e-6
        )


def test_fisher_is_the_mean_of_equal_ingredients(merge: Merge, fine_tune: FineTune) -> None:
    path = fine_tune("a", 1)
    merged = merge(path, path, method="fisher", fisher_texts=6).weights
    A = open_model(ModelRef(model=path)).weights
    assert max(float((merged[n] - A[n]).abs().max()) for n in A.entries) < 1e-6


def test_fisher_information_belongs_to_one_basis(tmp_path: Path, student: Model) -> None:
    settings = FisherSettings(
        max_texts=24, sampled=False, seed=0, device=torch.device("cpu"), dtype=torch.float32
    )
    informations = []
    for k, Q in enumerate((random_rotation(32), torch.eye(32, dtype=torch.float64))):
        view = student.weights.fold({"residual": Rotation(Q)})
        out = pico_output(tmp_path / "runs", str(k))
        F = fisher_information(
            view, pico_samples().layout, settings, out, "fisher", lambda *_: None
        )
        informations.append(F["model.layers.0.mlp.down_proj.weight"].read().float())
    after, before = informations  # [32, 48]: what writes into the stream
    # A rotation moves information between channels, and keeps the sum over them.
    torch.testing.assert_close(after.sum(0), before.sum(0), rtol=0.02, atol=0)
    assert float((after - before).norm() / before.norm()) > 0.3


def test_sampled_labels_are_those_that_the_model_expects(
    tmp_path: Path, merge: Merge, student: Model
) -> None:
    confident = student.weights.untie().edit({"lm_head.weight": 8 * student.weights.head()})
    save_folder(confident, student.folder, tmp_path / "confident")
    into = open_model(ModelRef(model=str(tmp_path / "confident")))
    information = {
        labels: merge(
            "student",
            into=into,
            runs=labels,
            method="fisher",
            fisher_texts=8,
            fisher_labels=labels,
        ).notes["mean Fisher"]["student"]
        for labels in ("sampled", "texts")
    }
    # Random texts surprise a model that is confident; its own words do not.
    assert information["texts"] > 2 * information["sampled"]
