"""Cuts, and refits of writers after them, compute on a GPU what they compute on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

Devices = Any

CUTS = """
step = [
    { id = "angle", use = "chop", layers = 2 },
    { id = "kl", use = "chop", layers = 2, criterion = "kl", max_kl_rows = 32 },
    { id = "listed", use = "chop", layers = [0, 2] },
    { id = "width", use = "chop", width = 24 },
    { id = "all", use = "chop", layers = 2, neurons = 40, kv_heads = 1, width = 28 },
    { id = "share", use = "chop", keep_fraction = 0.7, criterion = "kl", max_kl_rows = 32 },
    { id = "capture", use = "residuals", student_texts = 8 },
    { use = "fidelity", per_layer = false },
]
[variants]
angle = ["angle"]
kl = ["kl"]
listed = ["listed"]
width = ["width", "capture", "fidelity"]
all = ["all"]
share = ["share"]
"""
REFITS = """
step = [
    { use = "chop", layers = [0, 2] },
    { id = "capture", use = "residuals" },
    { id = "self", use = "residuals", control = "self" },
    { id = "both", use = "writer-refit", writers = ["heads", "neurons"], guard = 1.5 },
    { id = "plain", use = "writer-refit", row_weighting = "plain", layers = "cut" },
    { id = "distinct", use = "writer-refit", row_weighting = "distinct", layers = "cut" },
    { id = "output", use = "writer-refit", features = "output", layers = "cut", alpha = 0.5 },
    { use = "fidelity" },
]
[variants]
both = ["capture", "both", "fidelity"]
plain = ["capture", "plain"]
distinct = ["capture", "distinct"]
output = ["capture", "output"]
self = ["self", "plain"]
"""
RECIPES = {"cuts": CUTS, "refits": REFITS}
MODELS = {"teacher": "deep", "student": "deep"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_in_float32_it_is_as_on_the_cpu(devices: Devices, name: str) -> None:
    assert devices.differences_from_cpu(RECIPES[name], **MODELS) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_in_bfloat16_it_runs(devices: Devices, name: str) -> None:
    assert devices.run(RECIPES[name], **MODELS, dtype="bfloat16").result.failed == {}
