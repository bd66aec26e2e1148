"""Soups conform, are chosen by validation KL, and refuse ingredients that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rotdistill_soups._ingredients import digest_of
from rotdistill_soups.step import Soups
from safetensors.torch import load_file, save_file
from torch import Tensor

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.errors import RecipeError, RotdistillError, SetupError
from rotdistill_core.evaluation.kl_scorer import KLScorer
from rotdistill_core.plugin.step import stage_of, validator_of
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    parametrize_with_checks,
    pico_folder,
    pico_model,
    pico_output,
    pico_samples,
    reopen,
    save_folder,
)

FineTune = Callable[..., str]
Merge = Callable[..., Any]


@parametrize_with_checks(
    Soups,
    {"ingredients": ["student"]},
    {"ingredients": ["student", "student"], "method": "fisher", "fisher_texts": 4},
)
def test_soups_conform(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_soups_are_an_inexact_fold() -> None:
    assert (stage_of(Soups), Soups.exact) == ("fold", False)


def test_greedy_leaves_out_an_ingredient_that_does_not_help(
    tmp_path: Path, merge: Merge, fine_tune: FineTune
) -> None:
    teacher = pico_model(tmp_path / "teacher")
    good = [fine_tune(f"good{k}", k, 0.15, teacher) for k in range(3)]
    bad = fine_tune("bad", 9, 1.5, teacher)
    student = open_model(ModelRef(model=fine_tune("start", 5, 0.3, teacher)))
    merged = merge(
        bad,
        *good,
        into=student,
        teacher=teacher,
        method="greedy",
        same_basis="ignore",
        require_improvement=True,
    )
    assert set(merged.out.report.members) == set(good)
    out = pico_output(tmp_path / "runs")
    score = KLScorer(Pair(teacher, student), pico_samples(), "validation", out, lambda *_: None)
    alone = min(merged.notes["validation KL alone"].values())
    assert score(merged.weights).mean < 0.7 * alone
    assert merged.notes["validation KL after"] == pytest.approx(score(merged.weights).mean)


def test_a_soup_that_is_no_better_is_dropped(
    merge: Merge, fine_tune: FineTune, student: Model
) -> None:
    merged = merge(fine_tune("a", 1), require_improvement=True)
    assert merged.weights is student.weights
    assert "no gain" in merged.out.report.refused


def test_a_saved_soup_reads_the_same(
    tmp_path: Path, merge: Merge, fine_tune: FineTune, student: Model
) -> None:
    merged = merge(fine_tune("a", 1), fine_tune("b", 2)).weights
    save_folder(merged, student.folder, tmp_path / "saved")
    again = reopen(tmp_path / "saved", student.weights)
    assert all(torch.equal(again[n], merged[n]) for n in merged.entries)


def test_the_content_of_an_ingredient_is_an_input(fine_tune: FineTune) -> None:
    path = fine_tune("a", 1)
    before = digest_of(path)
    assert Soups(ingredients=(path, "student")).inputs() == [before, "student"]
    fine_tune("a", 2)
    assert digest_of(path) != before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "ingredients"),
    "sum": ({"ingredients": ["a", "b"], "weights": [1.0, -1.0]}, "sum to 0"),
    "sum of a pattern": ({"ingredients": ["a", "b"], "tensors": {"*": [1.0, -1.0]}}, "sum to 0"),
    "count": ({"ingredients": ["a", "b"], "weights": [1.0]}, "1 weights for 2 ingredients"),
    "count of a pattern": (
        {"ingredients": ["a", "b"], "tensors": {"*": []}},
        "0 weights for 2 ingredients",
    ),
    "slerp": ({"ingredients": ["a"], "method": "slerp"}, "name two, not 1"),
    "greedy": (
        {"ingredients": ["a", "b"], "method": "greedy", "weights": [1.0, 2.0]},
        "greedy chooses",
    ),
    "rank": ({"ingredients": ["a", "b"], "rank": 4}, 'needs method = "lora"'),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=list(REFUSED))
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validator_of(Soups).validate_json(json.dumps({"use": "soups", **options}))


def unfit_ingredient(kind: str, folder: Path, fine_tune: FineTune) -> str:
    if kind == "architecture":
        return str(pico_folder(folder, "qwen2"))
    if kind == "shape":
        return str(pico_folder(folder, intermediate_size=40))
    path = fine_tune(folder.name, 1)
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    if kind == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.1.mlp.up_proj.weight"][7, 5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("architecture", RecipeError, "is a qwen2 model and the student llama"),
        ("shape", RecipeError, r"neurons\.0 is 40, and 48 in the student"),
        ("missing", SetupError, r"up_proj\.weight is missing"),
        ("nan", SetupError, r"up_proj\.weight has 1 values that are NaN or Inf"),
    ],
)
def test_an_ingredient_that_does_not_fit_is_refused_by_name(
    tmp_path: Path,
    merge: Merge,
    fine_tune: FineTune,
    student: Model,
    kind: str,
    error: type[RotdistillError],
    message: str,
) -> None:
    good, bad = fine_tune("good", 4), unfit_ingredient(kind, tmp_path / kind, fine_tune)
    with pytest.raises(error, match=message) as caught:
        save_folder(merge(good, bad).weights, student.folder, tmp_path / "merged")
    assert bad in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged" / "model.safetensors").exists()


def test_the_folder_that_the_run_writes_is_no_ingredient(merge: Merge, fine_tune: FineTune) -> None:
    inside = fine_tune("runs/run/checkpoints/full", 1)
    with pytest.raises(RecipeError, match="inside the folder that this run writes"):
        merge(inside)
