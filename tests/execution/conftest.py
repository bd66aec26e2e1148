"""A pico recipe that runs in a second, and an observer that remembers events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core import hookimpl
from rotdistill_core.execution.executor import Executor
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import PicoWorkspace

STEPS = """
variants = { base = [], full = ["refit"] }
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "refit", use = "writer-refit" },
    { use = "fidelity" },
]
"""


class Recorder:
    """Remembers the lines and events of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ran: list[str] = []
        self.failed: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    @hookimpl
    def after_step(self, step_id: str, variant: str, reused: bool) -> None:
        if not reused:
            self.ran.append(f"{variant} {step_id}")

    @hookimpl
    def step_failed(self, step_id: str, variant: str, error: Exception) -> None:
        self.failed.append(f"{variant} {step_id}: {error}")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def work(pico_workspace: PicoWorkspace) -> Path:
    """Return a folder with texts and a model of three layers."""
    pico_workspace.model(num_hidden_layers=3)
    return pico_workspace.folder


@pytest.fixture
def write_recipe(work: Path) -> Callable[[str], Path]:
    """Return a function that writes the recipe under a name."""

    def write(name: str) -> Path:
        model = work / "model"
        return PicoWorkspace(work).recipe(STEPS, name=name, teacher=model, student=model)

    return write


@pytest.fixture
def executor(work: Path, write_recipe: Callable[[str], Path]) -> Callable[..., Executor]:
    """Return a function that opens a recipe: `executor(name, *sets, observer=...)`."""

    def open_recipe(
        name: str, *sets: str, observer: object | None = None, fresh: bool = False
    ) -> Executor:
        loaded = load_recipe(write_recipe(name), sets)
        watching = observer or Recorder()
        return Executor(loaded, work / "runs", watching, lambda *_: None, fresh)

    return open_recipe
