"""The shipped recipes that make, merge and align fine-tunes run in turn on pico models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rotdistill_core.evaluation.rows import overall_figures
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import build_plan
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import SilentObserver, pico_folder

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = (
    "samples.limit=30",
    "samples.own_answers=4",
    "samples.answer_tokens=4",
    "samples.max_tokens=320",
    'teacher.model="model"',
)


def run_shipped(name: str, *sets: str) -> RunResult:
    resolved = load_recipe(RECIPES / name, [*SMALL, *sets])
    # `run` makes a plan before it begins.
    assert build_plan(resolved, Path("runs"), this_machine(Path("runs"))).todo
    return Executor(resolved, Path("runs"), SilentObserver(), lambda *_: None).go()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the fine-tunes of ingredients.toml have been made."""
    folder = tmp_path_factory.mktemp("soups")
    pico_folder(folder / "model", num_hidden_layers=3, max_position_embeddings=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tuned = run_shipped(
            "ingredients.toml",
            'student.model="model"',
            "chop.layers=2",
            "one.learning_rate=3e-3",
            "two.learning_rate=3e-3",
            "three.learning_rate=1e-3",
        )
    assert set(tuned.checkpoints) >= {"base", "first", "second", "third", "elsewhere"}
    return folder


@pytest.mark.slow
def test_fine_tunes_are_merged_in_every_way(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    soup = run_shipped("soup.toml")
    kl = {variant: figures["kl"] for variant, figures in overall_figures(soup.rows).items()}
    assert kl["lora"] == pytest.approx(kl["uniform"], abs=1e-5)
    assert max(kl["uniform"], kl["fisher"]) < kl["base"]
    [curve] = soup.steps["uniform", "barrier"].report.curves
    assert len(curve.losses) == 11
    ends = (curve.losses[0], curve.losses[-1])
    assert ends == pytest.approx((kl["first"], kl["second"]), rel=1e-3)


@pytest.mark.slow
def test_a_fine_tune_in_another_basis_is_aligned_and_merged(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    anchor = run_shipped("merge_anchor.toml")
    figures = overall_figures(anchor.rows)
    assert figures["aligned"]["barrier"] < 0.01 * figures["base"]["barrier"]
    kl = {variant: each["kl"] for variant, each in figures.items()}
    assert kl["aligned"] == pytest.approx(kl["base"], rel=1e-3)
    assert kl["merged"] == pytest.approx(kl["one-step"], rel=0.05)
    assert kl["blind"] > max(kl["merged"], kl["base"])

    page = (anchor.folder / "report.html").read_text(encoding="utf-8")
    for variant in ("base", "aligned"):  # once each, in the legend of the plot
        assert page.count(f">{variant} to ingredients/first<") == 1
    assert re.search(r"Barrier, [^:]*: base to ingredients/first: [\d.]+", page)
