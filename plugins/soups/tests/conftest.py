"""A pico student, fine-tunes of it, and one call that merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rotdistill_soups.step import Soups

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.store.output import StepOutput
from rotdistill_core.testing import pico_model, pico_output, pico_samples, save_folder

SAMPLES = pico_samples()


class Merged(NamedTuple):
    """A soup, and what its step reported."""

    weights: Weights
    out: StepOutput

    @property
    def notes(self) -> dict[str, Any]:
        return self.out.notes


@pytest.fixture
def student(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "student")


@pytest.fixture
def fine_tune(tmp_path: Path, student: Model) -> Callable[..., str]:
    """Return a function that writes a checkpoint a little way from a model, as a fine-tune is."""

    def write(
        name: str,
        seed: int,
        size: float = 0.02,
        model: Model = student,
        dtype: torch.dtype = torch.float32,
    ) -> str:
        generator = torch.Generator().manual_seed(seed)
        view = model.weights
        moved = {
            n: view[n] + size * view[n].std() * torch.randn(view[n].shape, generator=generator)
            for n in view.entries
        }
        save_folder(view.edit(moved), model.folder, tmp_path / name, dtype)
        return str(tmp_path / name)

    return write


@pytest.fixture
def merge(tmp_path: Path, student: Model) -> Callable[..., Merged]:
    """Return a function that merges ingredients into a student, the fixture's without another."""

    def run(
        *ingredients: str | Path,
        into: Model = student,
        teacher: Model | None = None,
        runs: str = "runs",
        **options: Any,
    ) -> Merged:
        names = tuple(str(ingredient) for ingredient in ingredients)
        step = Soups(ingredients=names, **{"require_improvement": False, **options})
        out = pico_output(tmp_path / runs)
        pair = Pair(teacher or into, into)
        weights = step.fold(into.weights, pair, SAMPLES, out, lambda *_: None)
        return Merged(weights, out)

    return run


@pytest.fixture
def quiet_peft() -> Iterator[None]:
    """Let peft warn of what is meant here, and ask for what transformers has renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
