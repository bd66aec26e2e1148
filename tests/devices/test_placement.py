"""Teacher and student may compute on different devices, and on a GPU that lacks something."""

from __future__ import annotations

from typing import Any

import pytest

from rotdistill_core.forward.layerwise import _Batch
from rotdistill_core.linalg import precision
from rotdistill_core.testing import PRETENDED, count_within

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
FOLD = """
step = [
    { use = "residuals" },
    { use = "procrustes" },
    { use = "basis-fold", mode = "widen" },
]
"""
MODELS = {"teacher": "teacher", "student": "student"}
PLACES = {
    "the teacher": ((PRETENDED, "cpu"), "float32"),
    "the student": (("cpu", PRETENDED), "bfloat16"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("on", "dtype"), PLACES.values(), ids=list(PLACES))
def test_only_one_is_on_the_device(devices: Devices, on: tuple[str, str], dtype: str) -> None:
    run = devices.run(STEPS, **MODELS, dtype=dtype, on=on)
    assert run.result.failed == {}
    assert run.counters.to_device


@pytest.mark.slow
def test_states_stay_on_the_host_where_the_device_is_full(devices: Devices) -> None:
    run = devices.run(STEPS, **MODELS, fresh=True, free_bytes=0)
    assert run.result.failed == {}
    assert count_within(run.counters.to_device, _Batch.gather) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "works"), [((9, 0), True), ((8, 9), False)])
def test_float64_is_for_the_host_where_the_device_is_slow_at_it(
    devices: Devices, capability: tuple[int, int], works: bool
) -> None:
    run = devices.run(FOLD, **MODELS, fresh=True, capability=capability)
    assert bool(run.counters.float64_operations) == works


@pytest.mark.slow
def test_a_device_without_float64_runs_everything(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", frozenset({PRETENDED}))
    without = {"fresh": True, "float64": False, "capability": (0, 0)}
    assert devices.run(STEPS, **MODELS, **without).counters.float64_operations == {}


@pytest.mark.slow
def test_a_device_without_float64_folds(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", frozenset({PRETENDED}))
    without = {"fresh": True, "float64": False, "capability": (0, 0)}
    assert devices.run(FOLD, **MODELS, **without).counters.float64_operations == {}
