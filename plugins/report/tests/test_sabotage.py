"""A sabotaged recipe is not trusted, and the first lines of its report state why."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.testing import PicoWorkspace

STEPS = """
variants = { base = [], full = ["refit"] }
samples.own_answers = 8
step = [
    { use = "chop", layers = [0, 1, 3] },
    { use = "residuals" },
    { id = "refit", use = "writer-refit" },
    { use = "fidelity" },
]
"""


def run_report(work: Path, *sets: str) -> dict[str, Any]:
    """Run the recipe with these overrides and return report.json.

    Its verdict begins the other two reports.
    """
    workspace = PicoWorkspace(work)
    workspace.texts(40, 8)
    workspace.model(num_hidden_layers=4)
    recipe = workspace.recipe(STEPS, answer_tokens=8, observers=("report",))
    folder = workspace.run(recipe, sets).folder
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = html.unescape(page.replace("<code>", "").replace("</code>", ""))
    assert report["verdict"].replace("`", "") in text
    first_lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()[:3]
    assert report["verdict"] in "\n".join(first_lines)
    return report


@pytest.mark.parametrize(
    ("override", "kind", "subject"),
    [
        ("residuals.control=shuffled", "control", "residuals"),
        ("residuals.control=reversed", "control", "residuals"),
        ("refit.ridge=[1e-9]", "no ridge", "refit"),
    ],
    ids=["shuffled teacher", "reversed layer map", "no ridge"],
)
def test_a_sabotaged_run_is_not_trusted(
    tmp_path: Path, override: str, kind: str, subject: str
) -> None:
    report = run_report(tmp_path, override)
    first = report["issues"][0]
    assert (first["kind"], first["subject"]) == (kind, subject)
    assert report["verdict"] == f"Not to be trusted: `{subject}`: {first['text']}"
    assert report["tone"] == "bad"


def test_the_recipe_without_sabotage_is_trusted(tmp_path: Path) -> None:
    report = run_report(tmp_path)
    assert report["verdict"].startswith("It worked: `full` is nearest to the teacher")
    assert report["tone"] == "good"
