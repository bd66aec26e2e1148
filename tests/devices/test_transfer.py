"""Transfer from a teacher in another basis computes on a GPU what it computes on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

Devices = Any

REFIT = """
step = [
    { use = "residuals" },
    { use = "procrustes", tie = 1 },
    { use = "writer-refit", writers = ["heads", "neurons"], alpha = 0.5, ridge = [0.3, 3.0] },
    { use = "fidelity", per_layer = false },
]
"""
HEAD = """
step = [
    { use = "residuals" },
    { id = "plain", use = "lm-head-ridge", ridge = [0.1, 1.0], OPTIONS },
    { id = "guarded", use = "lm-head-ridge", ridge = [1.0], guard = 1.5, max_texts = 6, OPTIONS },
    { use = "fidelity", per_layer = false },
]
[variants]
plain = ["plain"]
guarded = ["guarded", "fidelity"]
"""
HEAD_AFTER_CUT = """
step = [
    { use = "chop", layers = 2 },
    { use = "residuals", student_texts = 6 },
    { use = "lm-head-ridge", objective = "kl", max_tokens = 16, max_rows = 32, max_iter = 4 },
]
"""
PROMPTS = """
step = [
    { use = "residuals", student_texts = 8 },
    { id = "places", use = "prompt-kl", max_epochs = 1, max_new_tokens = 3 },
    { id = "head", use = "prompt-kl", train = "head", prompts_from = ["questions"], OPTIONS },
    { id = "both", use = "prompt-kl", prompts_from = ["places", "questions"], OPTIONS },
    { use = "fidelity", per_layer = false },
]
[variants]
places = ["places"]
head = ["head"]
both = ["both", "fidelity"]
"""
AUTOCAST = """
step = [
    { use = "prompt-kl", prompts_from = ["questions"], bfloat16 = true, max_epochs = 1 },
]
"""
PROMPT_OPTIONS = "max_epochs = 1, max_new_tokens = 3, guard = 1.5, shard = [1, 2]"
PAIR = {"teacher": "teacher", "student": "student"}
SAME = {"teacher": "deep", "student": "deep"}
RECIPES = {
    "writer-refit": (REFIT, PAIR),
    "lm-head-ridge": (HEAD.replace("OPTIONS", 'objective = "ridge"'), PAIR),
    "lm-head-ridge kl": (HEAD.replace("OPTIONS", 'objective = "kl", max_iter = 4'), PAIR),
    "lm-head-ridge next-token": (
        HEAD.replace("OPTIONS", 'objective = "next-token", max_iter = 4'),
        PAIR,
    ),
    "lm-head-ridge after a cut": (HEAD_AFTER_CUT, SAME),
    "prompt-kl": (PROMPTS.replace("OPTIONS", PROMPT_OPTIONS), PAIR),
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_in_bfloat16_runs(devices: Devices, dtype: str) -> None:
    assert devices.run(AUTOCAST, **PAIR, dtype=dtype).result.failed == {}
