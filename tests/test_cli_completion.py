"""The shell completes verbs, of third parties too, and the values of their arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import CheckpointRecord

VERB = '''
from typing import Annotated

import typer

from rotdistill_core import hookimpl


Place = Annotated[str, typer.Argument(autocompletion=lambda: ["here", "there"])]


def where(place: Place, deep: bool = False) -> None:
    """Say where."""


@hookimpl
def commands() -> list[object]:
    return [where]
'''
RECIPE = """
name = "trial"
[teacher]
model = "model"
[student]
model = "model"
[[step]]
id = "basis"
use = "procrustes"
[[step]]
id = "base-fold"
use = "basis-fold"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, a run, and `site`.

    `site` holds a distribution with a verb that works and a verb that cannot be imported.
    """
    root = tmp_path_factory.mktemp("completion")
    info = root / "site/somebody_where-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody-where\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[rotdistill.commands]\nwhere = somebody_where\nwherever = nothing_there\n"
    )
    (root / "site/somebody_where.py").write_text(VERB)
    (root / "recipe.toml").write_text(RECIPE)
    ledger = Ledger(root / "runs/trial-1")
    for variant in ("base", "full"):
        folder = f"trial-1/checkpoints/{variant}"
        (root / "runs" / folder).mkdir(parents=True)
        ledger.append(CheckpointRecord(key=variant, variant=variant, folder=folder, files=()))
    return root


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ru", ["run", "runs"]),  # a verb of the core and one of a plugin
        ("whe", ["where", "wherever"]),
        ("where ", ["here", "there"]),
        ("where --de", ["--deep"]),
        ("wherever ", []),
        ("nowhere ", []),
        ("show t", ["trial-1"]),
        ("chat trial --variant f", ["full"]),
        ("chat other --variant ", []),
        ("new step mine --stage e", ["evaluate"]),
        ("run recipe.toml --set basis.w", ["basis.whiten="]),
        (
            "plan recipe.toml --set basis.tie=1 --set bas",
            [*(f"basis.{key}=" for key in ("tie", "shrink", "whiten", "ridge")), "base-fold.mode="],
        ),
        ("run no.toml --set ", []),
    ],
)
def test_a_line_is_completed(folder: Path, line: str, offered: list[str]) -> None:
    words = f"rotdistill {line}"
    asked = {
        "_ROTDISTILL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    program = [sys.executable, "-c", "from rotdistill_core.cli import main; main()"]
    made = subprocess.run(
        program,
        env={**os.environ, **asked, "PYTHONPATH": "site"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (made.stdout.split(), made.stderr) == (offered, "")
