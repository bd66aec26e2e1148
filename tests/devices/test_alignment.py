"""Captures, aligners and folds compute on a GPU what they compute on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

Devices = Any

CAPTURES = """
step = [
    { id = "plain", use = "residuals" },
    { id = "match", use = "residuals", layer_map = "match" },
    { id = "shuffled", use = "residuals", control = "shuffled" },
    { id = "reversed", use = "residuals", control = "reversed" },
    { id = "narrow", use = "residuals", dtype = "bfloat16", student_texts = 8 },
    { id = "sums", use = "residuals", store = "moments" },
    { id = "basis", use = "procrustes" },
    { use = "fidelity" },
    { use = "answers", max_tokens = 3 },
]
[variants]
plain = ["plain", "answers", "fidelity"]
match = ["match"]
shuffled = ["shuffled"]
reversed = ["reversed"]
narrow = ["narrow"]
sums = ["sums", "fidelity"]
"""
ALIGNERS = """
step = [
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "stages", use = "procrustes", tie = 1 },
    { id = "shrunk", use = "procrustes", shrink = 0.5 },
    { id = "zscore", use = "procrustes", whiten = "zscore", ridge = 0.1 },
    { id = "full", use = "procrustes", whiten = "full", ridge = 0.1 },
    { id = "cca", use = "cca" },
    { id = "cca-stages", use = "cca", tie = 1, min_correlation = 0.5 },
    { id = "random", use = "random-rotation" },
    { id = "reflect", use = "householder" },
    { id = "canonical", use = "basis-fold", mode = "canonical" },
    { id = "widen", use = "basis-fold", mode = "widen" },
    { use = "fidelity", per_layer = false },
]
[variants]
canonical = ["basis", "canonical", "fidelity"]
widen = ["basis", "widen", "fidelity"]
stages = ["stages", "reflect"]
shrunk = ["shrunk"]
zscore = ["zscore"]
full = ["full"]
cca = ["cca", "widen"]
cca-stages = ["cca-stages"]
random = ["random", "reflect", "canonical"]
"""
MATCHING = """
step = [
    { use = "residuals" },
    { id = "weights", use = "weight-matching" },
    { id = "invertible", use = "weight-matching", value_gauge = "invertible", max_rounds = 2 },
    { id = "basis", use = "procrustes" },
    { id = "stages", use = "procrustes", tie = 1 },
    { id = "heads", use = "hungarian-permute" },
    { id = "attention", use = "hungarian-permute", criterion = "activations", max_texts = 4 },
    { id = "across", use = "hungarian-permute", within_stage = 2 },
    { id = "gauge", use = "head-gauge" },
    { id = "any-gauge", use = "head-gauge", value_gauge = "invertible" },
    { id = "tied", use = "basis-fold" },
    { id = "block", use = "basis-fold", mode = "block" },
    { use = "fidelity", per_layer = false },
]
[variants]
weights = ["weights", "tied", "fidelity"]
invertible = ["invertible", "tied"]
heads = ["basis", "heads", "gauge", "tied", "fidelity"]
attention = ["basis", "attention", "any-gauge", "tied"]
across = ["basis", "across"]
block = ["stages", "block", "fidelity"]
"""
RECIPES = {
    "captures": (CAPTURES, {"teacher": "teacher", "student": "student"}),
    "aligners": (ALIGNERS, {"teacher": "teacher", "student": "student"}),
    "matching": (MATCHING, {"teacher": "twin", "student": "student"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_in_float32_it_is_as_on_the_cpu(devices: Devices, name: str) -> None:
    steps, models = RECIPES[name]
    assert devices.differences_from_cpu(steps, **models) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_in_bfloat16_it_runs(devices: Devices, name: str) -> None:
    steps, models = RECIPES[name]
    assert devices.run(steps, **models, dtype="bfloat16").result.failed == {}
