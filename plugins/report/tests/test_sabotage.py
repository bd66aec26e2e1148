"""A recipe that was sabotaged says so in the first lines of its report; the same recipe as it should be does not."""

from __future__ import annotations

import html
import json
from pathlib import Path

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


def first_lines(work: Path, capture: str = "", refit: str = "") -> tuple[str, str]:
    """Return the first lines of report.md, and the first sentence of report.json, once it is known that the page has it too."""
    pico_texts(work / "texts", 40, 8)
    pico_folder(work / "model", num_hidden_layers=4)
    path = work / "sabotaged.toml"
    path.write_text(RECIPE.format(work=work, capture=capture, refit=refit), encoding="utf-8")
    folder = run_recipe(path).folder
    verdict = json.loads((folder / "report.json").read_text(encoding="utf-8"))["verdict"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert verdict.replace("`", "") in html.unescape(
        page.replace("<code>", "").replace("</code>", "")
    )
    return "\n".join((folder / "report.md").read_text(encoding="utf-8").splitlines()[:3]), verdict


@pytest.mark.parametrize(("capture", "refit", "words"), [
    ('control = "shuffled"', "", "the teacher's rows were shuffled"),
    ('control = "reversed"', "", "the layer map was turned round"),
    ("", "ridge = [1e-9]", "λ is at most 1e-09"),
], ids=["shuffled teacher", "wrong layer map", "no ridge"])  # fmt: skip
def test_a_sabotaged_run_says_so_in_its_first_lines(
    tmp_path: Path, capture: str, refit: str, words: str
) -> None:
    lines, verdict = first_lines(tmp_path, capture, refit)
    assert "Not to be trusted" in lines
    assert words in lines
    assert verdict.startswith("Not to be trusted")


def test_the_recipe_as_it_should_be_is_trusted(tmp_path: Path) -> None:
    lines, verdict = first_lines(tmp_path)
    assert verdict.startswith("It worked: `full` is nearest to the teacher")
    assert verdict in lines
