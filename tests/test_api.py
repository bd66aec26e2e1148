"""The Python interface: runs and plans from a notebook, with typed results and no output."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rotdistill_core
from rotdistill_core import MetricRow, RunFailed, hookimpl, load_recipe, plan, run
from rotdistill_core.errors import CheckFailed, RecipeError, SetupError
from rotdistill_core.planning.machine import Machine
from rotdistill_core.recipe.load import with_overrides
from rotdistill_core.testing import PicoWorkspace

STEPS = """
variants = { base = [], full = ["refit"] }
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "refit", use = "writer-refit" },
    { use = "fidelity" },
]
"""


@pytest.fixture(scope="module")
def finished(make_workspace: Callable[..., PicoWorkspace]) -> Path:
    """Return a folder with a recipe that has been run."""
    workspace = make_workspace(num_hidden_layers=3)
    workspace.run(workspace.recipe(STEPS))
    return workspace.folder


@pytest.fixture
def work(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


class Watch:
    """Remembers what a run reports."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.notes: list[str] = []
        self.steps: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, done: int, total: int, note: str) -> None:
        self.notes.append(note)

    @hookimpl
    def after_step(self, step_id: str, variant: str) -> None:
        self.steps.append(f"{variant} {step_id}")


def test_a_run_returns_typed_results_and_prints_nothing(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run("trial.toml")
    assert capfd.readouterr() == ("", "")
    assert all(isinstance(row, MetricRow) for row in result.rows)
    assert {row.variant for row in result.rows} == {"base", "full"}
    assert result.checkpoints.keys() == {"base", "full"}
    assert all((folder / "config.json").is_file() for folder in result.checkpoints.values())
    assert result.steps["full", "refit"].reused
    assert result.failed == {}
    assert result.folder.parent == work / "runs"


def test_an_observer_gets_lines_progress_and_events(work: Path) -> None:
    watch = Watch()
    # A folder of runs may be named by text, as a recipe may.
    result = run(work / "trial.toml", runs=str(work / "other"), fresh=True, observer=watch)
    assert result.folder.parent == work / "other"
    assert watch.steps[:3] == ["base chop", "base residuals", "base fidelity"]
    assert any("answers" in line for line in watch.lines)
    assert watch.notes


def test_a_failed_variant_carries_the_result(work: Path) -> None:
    with pytest.raises(RunFailed, match='variant "full" failed: kl is ') as caught:
        run("trial.toml", set={"check.kl_ratio": 1e-9})
    assert isinstance(caught.value, CheckFailed)
    assert caught.value.exit_code == 4
    outcome = caught.value.outcome
    assert outcome.failed.keys() == {"full"}
    assert outcome.checkpoints.keys() == {"base", "full"}


@pytest.mark.parametrize("load", [str, Path, load_recipe])
def test_overrides_are_python_values(work: Path, load: Callable[[Path], Any]) -> None:
    values = {"chop.layers": 1, "refit.ridge": (0.5, 2.0), "seed": 3, "variants.full": []}
    planned = plan(load(work / "trial.toml"), set=values, runs=str(work / "runs"))
    words = ["chop.layers=1", "refit.ridge=[0.5, 2.0]", "seed=3", "variants.full=[]"]
    expected = load_recipe(work / "trial.toml", words)
    assert planned.folder.name == expected.folder(Path("runs")).name


def test_a_loaded_recipe_takes_overrides_as_its_file_does(work: Path) -> None:
    text = (work / "trial.toml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("samples.")]
    engine = 'engine = { use = "openai", urls = ["http://127.0.0.1:1/v1"], model = "m" }'
    path = work / "bare.toml"
    path.write_text("\n".join([engine, *lines]), encoding="utf-8")
    # Defaults follow what is set, such as the shipped system prompt from the shipped index.
    sets: dict[str, object] = {"samples.index": "texts/index.tsv", "samples.heldout_share": 0.2}
    loaded = with_overrides(load_recipe(path), sets)
    assert loaded.resolved() == load_recipe(path, sets).resolved()
    assert loaded.recipe.samples.style is None
    assert with_overrides(loaded, {"seed": 5}).recipe.seed == 5
    with pytest.raises(RecipeError, match="the overrides that it was read with are not known"):
        with_overrides(replace(loaded, given=None), {"seed": 5})
    # Values go no way through words: None, blanks, and letters beyond 16 bits stay what they are.
    for first in ({"samples.style": None}, [" seed = 3 "], {"samples.index": "t/\U0001f600.tsv"}):
        again = with_overrides(load_recipe(path, first), {"check.kl_ratio": 2.0})
        both = load_recipe(path, first).resolved()
        both["check"]["kl_ratio"] = 2.0
        assert again.resolved() == both
    variants = with_overrides(load_recipe(path, {"variants": {"a": []}}), {"variants.b": ["refit"]})
    assert variants.recipe.variants == {"a": [], "b": ["refit"]}


def test_an_override_that_fits_nothing_is_refused(work: Path) -> None:
    with pytest.raises(RecipeError, match=r"layers: .*it is 'eleven'"):
        plan("trial.toml", set={"chop.layers": "eleven"})
    with pytest.raises(RecipeError, match=r'set chup\.layers: .* Did you mean "chop"'):
        plan(load_recipe("trial.toml"), set={"chup.layers": 1})


def test_a_resolved_recipe_keeps_its_observers(work: Path) -> None:
    loaded = load_recipe(work / "trial.toml", ['observers=["report"]'])
    result = run(loaded, set={"seed": 1}, runs=work / "watched")
    assert len(result.summaries) == 1
    assert (result.folder / "report.html").exists()


def test_a_plan_lists_what_is_reused(work: Path) -> None:
    planned = plan("trial.toml")
    assert planned.todo == []
    assert {line.id for line in planned.lines} >= {"chop", "residuals", "refit", "fidelity"}
    small = plan("trial.toml", fresh=True, machine=Machine(ram=1, gpus=(), disk=1, cores=1))
    assert len(small.todo) > 3
    assert len(small.shortfalls) == 2


def test_rows_become_a_table(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("trial.toml")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SetupError, match="pip install pandas"):
        result.to_pandas()
    stub = ModuleType("pandas")
    stub.DataFrame = lambda rows, columns: (rows, columns)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", stub)
    rows, columns = result.to_pandas()
    assert rows == result.rows
    assert columns[:3] == ["variant", "metric", "value"]


def test_public_names_are_importable() -> None:
    for name in rotdistill_core.__all__:
        assert getattr(rotdistill_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'wish'"):
        rotdistill_core.wish  # noqa: B018


def test_importing_and_planning_load_no_torch(work: Path) -> None:
    code = (
        "import sys, rotdistill_core\n"
        "assert 'torch' not in sys.modules\n"
        "from rotdistill_core import load_recipe, plan, run\n"
        "assert plan('trial.toml', set={'chop.layers': 1}).todo\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
