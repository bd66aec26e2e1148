"""A pico model, a LoRA of it, and one call that carries a fine-tune into a student."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rotdistill_transport.step import Transport
from safetensors.torch import save_file

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.open import open_checkpoint
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.linalg.maps import Maps
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import pico_model, pico_output, pico_samples, save_folder

SAMPLES = pico_samples(guard=4)
PREFIX = "base_model.model."
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Transported(NamedTuple):
    """The student afterwards, and what the step reported."""

    weights: Weights
    out: StepOutput

    @property
    def notes(self) -> dict[str, Any]:
        return self.out.notes


def modules_of(model: Model, projections: Sequence[str] = PROJECTIONS) -> list[str]:
    names = (name.removesuffix(".weight") for name in model.weights.entries)
    return [name for name in names if name.endswith(tuple(f".{p}_proj" for p in projections))]


def write_adapter(
    folder: Path,
    model: Model,
    modules: Sequence[str] | None = None,
    rank: int = 4,
    size: float = 0.1,
    **config: Any,
) -> Path:
    """Write a random LoRA of a model in peft's format, float64."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    weights = model.weights.untie()
    modules = modules or modules_of(model)
    for module in modules:
        out, inner = weights.entries[f"{module}.weight"].shape
        draw = [
            size * torch.randn(shape, generator=generator).double()
            for shape in ((rank, inner), (out, rank))
        ]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = draw[0]
        tensors[f"{PREFIX}{module}.lora_B.weight"] = draw[1]
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def saved(view: Weights, model: Model, folder: Path) -> Model:
    """Return a view of a model as a checkpoint of its own, float64."""
    save_folder(view, model.folder, folder, torch.float64)
    return open_checkpoint(folder)


@pytest.fixture
def base(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "base", num_hidden_layers=3)


@pytest.fixture
def transport(tmp_path: Path) -> Callable[..., Transported]:
    """Return a function that carries a fine-tune into a student, whatever it does there."""

    def run(
        source: str | Path,
        student: Model,
        base: Model | str | None = None,
        *,
        weights: Weights | None = None,
        teacher: Model | None = None,
        maps: Maps | None = None,
        **options: Any,
    ) -> Transported:
        named = str(base.folder) if isinstance(base, Model) else base
        chosen = {"require_improvement": False, "strengths": (1.0,), **options}
        step = Transport(source=str(source), base=named, **chosen)
        pair = Pair(teacher or student, student)
        step.check_models(pair)
        out = pico_output(tmp_path / "runs")
        view = weights or student.weights
        edited = step.fold(view, maps or Maps(), pair, SAMPLES, out, lambda *_: None)
        return Transported(edited, out)

    return run
