"""A pico recipe that runs in a second, and an observer that remembers events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core import hookimpl
from rotdistill_core.execution.executor import Executor
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import pico_folder, pico_head, pico_texts

RECIPE = (
    pico_head("{name}", "{model}", "{model}")
    + """
[[step]]
use = "chop"
layers = 2
[[step]]
use = "residuals"
[[step]]
id = "refit"
use = "writer-refit"
[[step]]
use = "fidelity"
[variants]
base = []
full = ["refit"]
"""
)


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
def work(tmp_path: Path) -> Path:
    """Return a folder with texts and a model of three layers."""
    pico_texts(tmp_path / "texts")
    pico_folder(tmp_path / "model", num_hidden_layers=3)
    return tmp_path


@pytest.fixture
def write_recipe(work: Path) -> Callable[..., Path]:
    """Return a function that writes the recipe under a name; `without` is left out of it."""

    def write(name: str, without: str = "") -> Path:
        text = RECIPE.format(name=name, model=work / "model")
        assert without in text
        path = work / f"{name}.toml"
        path.write_text(text.replace(without, ""), encoding="utf-8")
        return path

    return write


@pytest.fixture
def executor(work: Path, write_recipe: Callable[..., Path]) -> Callable[..., Executor]:
    """Return a function that opens a recipe: `executor(name, *sets, observer=...)`."""

    def open_recipe(
        name: str, *sets: str, observer: object | None = None, fresh: bool = False
    ) -> Executor:
        loaded = load_recipe(write_recipe(name), sets)
        watching = observer or Recorder()
        return Executor(loaded, work / "runs", watching, lambda *_: None, fresh)

    return open_recipe
