"""Distributions that exist only in a test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rotdistill_core.plugin.registry import STEPS

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts a distribution on sys.path and returns the name of its module."""

    def make(
        distribution: str,
        names: str | list[str],
        source: str,
        group: str = STEPS,
        requires: Sequence[str] = (),
    ) -> str:
        root = tmp_path / distribution
        module = "fake_" + distribution.replace("-", "_")
        info = root / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (root / f"{module}.py").write_text(source, encoding="utf-8")
        required = "".join(f"Requires-Dist: {line}\n" for line in requires)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{required}"
        )
        offered = [names] if isinstance(names, str) else names
        points = "".join(f"{name} = {module}\n" for name in offered)
        (info / "entry_points.txt").write_text(f"[{group}]\n{points}")
        (info / "RECORD").write_text(f"{module}.py,,\n")
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    return make
