"""Soups and barriers compute on a GPU what they compute on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import save_folder

Devices = Any

SOUPS = """
[[step]]
use = "residuals"
student_texts = 8
[[step]]
id = "mean"
use = "soups"
ingredients = ["one", "student"]
OPTIONS
[[step]]
id = "ties"
use = "soups"
ingredients = ["one", "two"]
method = "ties"
OPTIONS
[[step]]
id = "slerp"
use = "soups"
ingredients = ["one", "two"]
method = "slerp"
OPTIONS
[[step]]
id = "greedy"
use = "soups"
ingredients = ["one", "two"]
method = "greedy"
[[step]]
id = "fisher"
use = "soups"
ingredients = ["one", "two"]
method = "fisher"
fisher_texts = 3
OPTIONS
[[step]]
id = "empirical"
use = "soups"
ingredients = ["one", "student"]
method = "fisher"
fisher_labels = "texts"
fisher_texts = 3
OPTIONS
[[step]]
id = "align"
use = "soups"
ingredients = ["two", "student"]
same_basis = "align"
[[step]]
id = "lora"
use = "soups"
ingredients = ["adapter"]
method = "lora"
OPTIONS
[[step]]
id = "line"
use = "interpolation-barrier"
between = ["variant", "one"]
points = 3
[[step]]
use = "fidelity"
per_layer = false
[variants]
mean = ["mean", "line", "fidelity"]
ties = ["ties"]
slerp = ["slerp"]
greedy = ["greedy"]
fisher = ["fisher", "fidelity"]
empirical = ["empirical"]
align = ["align"]
lora = ["lora"]
"""
STEPS = SOUPS.replace("OPTIONS", "require_improvement = false")
MODELS = {"teacher": "twin", "student": "student"}
RANK = 2


@pytest.fixture(scope="module")
def kitchen(devices: Devices) -> Devices:
    """Two fine-tunes of the student, and a LoRA."""
    folder = devices.workspace.folder
    for seed, name in enumerate(("one", "two")):
        write_fine_tune(folder / "student", folder / name, seed)
    write_adapter(folder / "adapter")
    return devices


def write_fine_tune(student: Path, folder: Path, seed: int) -> None:
    """Write a checkpoint a little way from a model."""
    draws = torch.Generator().manual_seed(seed)
    view = open_model(ModelRef(model=str(student))).weights
    moved = {
        name: view[name] + 0.02 * torch.randn(view[name].shape, generator=draws)
        for name in view.entries
    }
    save_folder(view.edit(moved), student, folder)


def write_adapter(folder: Path) -> None:
    """Write a LoRA on one layer in peft's format."""
    module = "base_model.model.model.layers.0.mlp.down_proj"
    halves = {"A": torch.full((RANK, 48), 0.1), "B": torch.full((32, RANK), 0.1)}
    folder.mkdir()
    save_file(
        {f"{module}.lora_{half}.weight": tensor for half, tensor in halves.items()},
        folder / "adapter_model.safetensors",
    )
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")


@pytest.mark.slow
def test_in_float32_it_is_as_on_the_cpu(kitchen: Devices) -> None:
    assert kitchen.differences_from_cpu(STEPS, **MODELS) == []


@pytest.mark.slow
def test_in_bfloat16_it_runs(kitchen: Devices) -> None:
    assert kitchen.run(STEPS, **MODELS, dtype="bfloat16").result.failed == {}
