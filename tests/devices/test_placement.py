"""Teacher and student may compute on different devices."""

from __future__ import annotations

from typing import Any

import pytest

from rotdistill_core.testing import PRETENDED

Devices = Any

STEPS = """
step = [
    { use = "residuals" },
    { id = "basis", use = "procrustes", tie = 1 },
    { id = "refit", use = "writer-refit", guard = 1.5 },
    { id = "attention", use = "hungarian-permute", criterion = "activations", max_texts = 4 },
    { id = "ridge", use = "lm-head-ridge", ridge = [1.0], guard = 1.5 },
    { id = "kl", use = "lm-head-ridge", ridge = [1.0], objective = "kl", max_iter = 4 },
    { id = "style", use = "prompt-kl", max_new_tokens = 3, max_epochs = 1 },
    { use = "fidelity" },
    { use = "answers", max_tokens = 3 },
]
[variants]
refit = ["basis", "refit", "fidelity", "answers"]
attention = ["attention"]
ridge = ["ridge"]
kl = ["kl"]
style = ["style"]
"""
MODELS = {"teacher": "teacher", "student": "student"}
PLACES = {"the teacher": (PRETENDED, "cpu"), "the student": (PRETENDED, "cpu")[::-1]}


@pytest.mark.slow
@pytest.mark.parametrize("on", PLACES.values(), ids=list(PLACES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_one_is_on_the_device(devices: Devices, on: tuple[str, str], dtype: str) -> None:
    run = devices.run(STEPS, **MODELS, dtype=dtype, on=on)
    assert run.result.failed == {}
    assert run.counters.to_device
