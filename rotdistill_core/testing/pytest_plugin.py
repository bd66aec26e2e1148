"""Fixtures for tests of plugins. Load them in `conftest.py`:

pytest_plugins = ["rotdistill_core.testing.pytest_plugin"]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.planning.calibration import FIXED, VARIABLE
from rotdistill_core.testing.workspace import PicoWorkspace

# No test, and no program that one starts, measures the machine: that takes ten seconds.
os.environ.setdefault(VARIABLE, FIXED)


@pytest.fixture
def pico_workspace(tmp_path: Path) -> PicoWorkspace:
    """A workspace with texts and one pico model, `model/`, of two layers."""
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model()
    return workspace


@pytest.fixture(scope="session")
def make_workspace(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., PicoWorkspace]:
    """A function that makes a workspace which outlives one test, for runs that several tests read.

    Its arguments are config keys of `model/`.
    """

    def make(**config: Any) -> PicoWorkspace:
        workspace = PicoWorkspace(tmp_path_factory.mktemp("workspace"))
        workspace.texts()
        workspace.model(**config)
        return workspace

    return make
