"""Settings of the whole suite."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

import pytest
import torch

from rotdistill_core.plugin import source_code
from rotdistill_core.plugin.origin import Origin

pytest_plugins = ["rotdistill_core.testing.pytest_plugin"]

ROOT = Path(__file__).parent
LONGEST_FILES = (
    "tests/faults/test_faults.py",
    "tests/recipes/test_tour_guide.py",
    "tests/execution/test_several_processes.py",
    "tests/benchmarks/test_scramble.py",
    "tests/execution/test_crash_answers.py",
    "tests/testing/test_config_checks.py",
    "tests/test_wheels.py",
    "tests/test_cli.py",
    "plugins/scaffold/tests/test_scaffold.py",
    "tests/execution/test_executor.py",
)
"""Files of tests that take 20 s of processor time or more, the longest first. `make test` gives
whole files to two workers in the order of the tests, so short files are left to fill up the end."""

# Tests run small matrices: one thread is faster, and leaves the other core to the other worker.
torch.set_num_threads(1)
# The same for the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def remember_our_code() -> None:
    """Hash the code of this repository once: every run asks for it, and no test edits it."""
    projects = (ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml"))
    ours = {tomllib.loads(path.read_text(encoding="utf-8"))["project"]["name"] for path in projects}
    folder = source_code.CORE_FOLDER

    def once(plain: Callable[..., str]) -> Callable[..., str]:
        kept = cache(plain)

        @wraps(plain)
        def digest(*asked: Origin | str) -> str:
            strangers = any(isinstance(a, Origin) and a.distribution not in ours for a in asked)
            copied = folder != source_code.CORE_FOLDER  # a test edits a copy of the core
            return plain(*asked) if strangers or copied else kept(*asked)

        return digest

    for name in ("source_digest", "core_digest", "package_digest"):
        setattr(source_code, name, once(getattr(source_code, name)))


# Before any module imports these functions.
remember_our_code()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; all others keep their order."""
    places = {ROOT / name: place for place, name in enumerate(LONGEST_FILES)}
    gone = [str(path) for path in places if not path.is_file()]
    if gone:
        raise pytest.UsageError(f"conftest.py: LONGEST_FILES names {', '.join(gone)}: not there")
    items.sort(key=lambda item: places.get(item.path, len(places)))
