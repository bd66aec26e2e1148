"""A sabotaged recipe is not trusted, and the first lines of its report state why."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.testing import pico_folder, pico_head, pico_texts, run_recipe

RECIPE = (
    pico_head("sabotaged", "{work}/model", "{work}/model", tokens=8)
    + """
samples.own_answers = 8
[[step]]
use = "chop"
layers = [0, 1, 3]
[[step]]
use = "residuals"
{capture}
[[step]]
id = "refit"
use = "writer-refit"
{refit}
[[step]]
use = "fidelity"
[variants]
base = []
full = ["refit"]
"""
)


def run_report(work: Path, capture: str = "", refit: str = "") -> dict[str, Any]:
    """Run the recipe and return report.json, whose verdict begins the other two reports."""
    pico_texts(work / "texts", 40, 8)
    pico_folder(work / "model", num_hidden_layers=4)
    path = work / "sabotaged.toml"
    path.write_text(RECIPE.format(work=work, capture=capture, refit=refit), encoding="utf-8")
    folder = run_recipe(path).folder
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = html.unescape(page.replace("<code>", "").replace("</code>", ""))
    assert report["verdict"].replace("`", "") in text
    first_lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()[:3]
    assert report["verdict"] in "\n".join(first_lines)
    return report


@pytest.mark.parametrize(
    ("capture", "refit", "kind", "subject"),
    [
        ('control = "shuffled"', "", "control", "residuals"),
        ('control = "reversed"', "", "control", "residuals"),
        ("", "ridge = [1e-9]", "no ridge", "refit"),
    ],
    ids=["shuffled teacher", "reversed layer map", "no ridge"],
)
def test_a_sabotaged_run_is_not_trusted(
    tmp_path: Path, capture: str, refit: str, kind: str, subject: str
) -> None:
    report = run_report(tmp_path, capture, refit)
    first = report["issues"][0]
    assert (first["kind"], first["subject"]) == (kind, subject)
    assert report["verdict"] == f"Not to be trusted: `{subject}`: {first['text']}"
    assert report["tone"] == "bad"


def test_the_recipe_without_sabotage_is_trusted(tmp_path: Path) -> None:
    report = run_report(tmp_path)
    assert report["verdict"].startswith("It worked: `full` is nearest to the teacher")
    assert report["tone"] == "good"
