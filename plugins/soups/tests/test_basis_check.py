"""An ingredient in another basis is measured, refused, or brought to the student's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_soups._align import fold_norms
from rotdistill_soups._basis_check import basis_distances

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Permutation
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    logits,
    pico_folder,
    pico_model,
    pico_samples,
    save_folder,
    scramble,
)

FineTune = Callable[..., str]
Merge = Callable[..., Any]


def kl(one: Weights, two: Weights) -> float:
    layout = pico_samples().layout
    p, q = (logits(view, layout).log_softmax(-1) for view in (one, two))
    return float((p.exp() * (p - q)).sum(-1).mean())


def scrambled(path: str, folder: Path) -> str:
    model = open_model(ModelRef(model=path))
    save_folder(scramble(model.weights, 3)[0], Path(path), folder)
    return str(folder)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_scrambled_ingredient_is_refused_or_brought_back(
    tmp_path: Path, merge: Merge, fine_tune: FineTune, model_type: str
) -> None:
    student = pico_model(tmp_path / "start", model_type)
    one, two, three = (fine_tune(str(k), k, 0.005, student) for k in range(3))
    elsewhere = scrambled(two, tmp_path / "scrambled")
    with pytest.raises(
        RecipeError, match=r'brings the embeddings from 1\.\d\d to 0\.0\d: .* same_basis = "align"'
    ):
        merge(one, elsewhere, three, into=student)
    plain = merge(one, two, three, into=student).weights
    aligned = merge(one, elsewhere, three, into=student, same_basis="align")
    assert aligned.notes["aligned"] == [elsewhere]
    assert kl(plain, aligned.weights) < 1e-4
    blind = merge(one, elsewhere, three, into=student, same_basis="ignore")
    assert kl(plain, blind.weights) > 0.1


def test_neurons_that_are_permuted_in_one_layer_are_noticed(tmp_path: Path, merge: Merge) -> None:
    student = pico_model(tmp_path / "start", num_hidden_layers=8)
    view = student.weights.fold({"neurons.1": Permutation(torch.arange(48).flip(0))})
    distances = basis_distances(view, student.weights)
    assert distances["gate_proj"] > 0.7 > distances["q_proj"]
    save_folder(view, student.folder, tmp_path / "permuted")
    with pytest.raises(
        RecipeError, match="Its stream is the student's, but heads or neurons are not"
    ):
        merge(tmp_path / "permuted", into=student)


def test_a_model_that_was_trained_apart_is_not_aligned(tmp_path: Path, merge: Merge) -> None:
    other = pico_folder(tmp_path / "other", seed=8)
    with pytest.raises(RecipeError, match=r"No rotation of the stream .* trained apart"):
        merge(other)
    with pytest.raises(RecipeError, match=r"could not be aligned: .* still"):
        merge(other, same_basis="align")


def test_a_student_whose_norms_are_folded_takes_plain_ingredients(
    tmp_path: Path, merge: Merge, fine_tune: FineTune, student: Model
) -> None:
    path = fine_tune("a", 1)
    save_folder(fold_norms(student.weights), student.folder, tmp_path / "folded")
    folded = open_model(ModelRef(model=str(tmp_path / "folded")))
    merged = merge("student", path, into=folded).weights
    assert kl(merge("student", path).weights, merged) < 1e-4
