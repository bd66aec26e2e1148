"""The shipped recipes that make, merge and align fine-tunes, carried out one behind the other on pico models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import build_plan
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import SilentObserver, pico_folder

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def carried_out(name: str, *sets: str) -> RunResult:
    small = (
        "samples.limit=30",
        "samples.own_answers=4",
        "samples.answer_tokens=4",
        "samples.max_tokens=320",
        'teacher.model="model"',
    )
    loaded = load_recipe(RECIPES / name, [*small, *sets])
    assert build_plan(
        loaded, Path("runs"), this_machine(Path("runs"))
    ).todo  # as `run` does before it begins
    return Executor(loaded, Path("runs"), SilentObserver(), lambda *_: None).go()


def kl_of(outcome: RunResult) -> dict[str, float]:
    return {
        row.variant: row.value
        for row in outcome.rows
        if row.metric == "kl" and row.language is None and row.text is None
    }


def test_fine_tunes_are_made_merged_and_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pico_folder(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=512)
    tuned = carried_out(
        "ingredients.toml",
        'student.model="model"',
        "chop.layers=2",
        "one.learning_rate=3e-3",
        "two.learning_rate=3e-3",
        "three.learning_rate=1e-3",
    )
    assert set(tuned.checkpoints) >= {"base", "first", "second", "third", "elsewhere"}
    soup = carried_out("soup.toml")
    kl = kl_of(soup)
    assert kl["lora"] == pytest.approx(kl["uniform"], abs=1e-5)
    assert max(kl["uniform"], kl["fisher"]) < kl["base"]
    [line] = soup.steps["uniform", "barrier"].notes["lines"]
    assert (len(line["loss"]), line["loss"][0], line["loss"][-1]) == pytest.approx(
        (11, kl["first"], kl["second"]), rel=1e-3
    )
    anchor = carried_out("merge_anchor.toml")
    page = (anchor.folder / "report.html").read_text(encoding="utf-8")
    assert (
        page.count(">base to ingredients/first<")
        == page.count(">aligned to ingredients/first<")
        == 1
    )  # the legend of the plot
    assert re.search(r"Barrier, [^:]*: base to ingredients/first: [\d.]+", page)
    barrier = {row.variant: row.value for row in anchor.rows if row.metric == "barrier"}
    assert barrier["aligned"] < 0.01 * barrier["base"]
    kl = kl_of(anchor)
    assert kl["aligned"] == pytest.approx(kl["base"], rel=1e-3)
    assert kl["merged"] == pytest.approx(kl["one-step"], rel=0.05)
    assert kl["blind"] > max(kl["merged"], kl["base"])
