"""Whole runs of pico recipes: what is shared between runs, what observers hear, what is left when a step fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rotdistill_core.data.tokenization import shared_prefix_length
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.plugin.markers import hookimpl
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.testing import pico_folder, pico_head, pico_texts

RECIPE = (
    pico_head("{name}", "{model}", "{model}")
    + """
[[step]]
use = "chop"
layers = 2
[[step]]
use = "residuals"
[[step]]
id = "refit"
use = "writer-refit"
[[step]]
use = "fidelity"
[variants]
base = []
full = ["refit"]
"""
)


BROKEN = """
from rotdistill_core import hookimpl

@hookimpl
def before_step(stage, say):
    raise RuntimeError(stage)

@hookimpl
def after_step(step_id, variant, stage, folder):
    raise SystemExit(f"{step_id} of {variant}, {stage}, {folder.name}\\nand more")

@hookimpl
def variant_saved(variant):
    raise ValueError
"""


class Heard:
    """Remembers what observers are told."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.failed: list[str] = []
        self.said: list[str] = []

    def log(self, text: str) -> None:
        self.said.append(text)

    @hookimpl
    def after_step(self, step_id: str, variant: str, seconds: float, reused: bool) -> None:
        if not reused:
            self.ran.append(f"{variant} {step_id}")

    @hookimpl
    def step_failed(self, step_id: str, variant: str, error: Exception) -> None:
        self.failed.append(f"{variant} {step_id}: {error}")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    pico_texts(tmp_path / "texts")
    pico_folder(tmp_path / "model", num_hidden_layers=3)
    return tmp_path


def written(work: Path, name: str) -> Path:
    path = work / f"{name}.toml"
    path.write_text(RECIPE.format(name=name, model=work / "model"), encoding="utf-8")
    return path


def run(work: Path, name: str, *sets: str) -> tuple[RunResult, Heard]:
    heard = Heard()
    made = Executor(load_recipe(written(work, name), sets), work / "runs", heard, lambda *_: None)
    try:
        return made.go(), heard
    except RotdistillError:
        assert heard.failed
        raise


def test_a_second_recipe_shares_the_steps_and_writes_its_own_checkpoints(work: Path) -> None:
    one, first = run(work, "one")
    two, second = run(work, "two")
    assert first.ran
    assert second.ran == []
    assert one.folder != two.folder
    for name in ("base", "full"):
        mine, theirs = two.folder / "checkpoints" / name, one.folder / "checkpoints" / name
        assert (mine / "model.safetensors").read_bytes() == (
            theirs / "model.safetensors"
        ).read_bytes()
        assert "# two:" in (mine / "README.md").read_text()
    assert two.rows == one.rows


def test_an_observer_that_raises_is_one_line_and_loses_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "broken_watch.py").write_text(BROKEN)
    info = work / "broken_watch-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-watch\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rotdistill.observers]\nbroken = broken_watch\n")
    monkeypatch.syspath_prepend(str(work))
    plain, first = run(work, "one")
    watched, second = run(work, "one", 'observers=["broken", "broken"]')
    assert watched.folder == plain.folder
    assert (watched.rows, watched.checkpoints) == (plain.rows, plain.checkpoints)
    told = [line for line in second.said if line.startswith("observer.broken failed")]
    assert (
        f"observer.broken failed in after_step, the run goes on: SystemExit: refit of full, fold, {plain.folder.name}"
        in told
    )
    assert {line.partition(",")[0].rpartition(" ")[2] for line in told} == {
        "before_step",
        "after_step",
        "variant_saved",
    }
    assert all("\n" not in line for line in told)
    assert first.ran
    assert second.ran == []


def test_the_cards_of_a_refit_survive_a_kill(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(work, "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rotdistill_core.checkpoint.weights.Weights.store", killed)
    with pytest.raises(KeyboardInterrupt):
        run(work, "torn", "refit.ridge=[0.5]")
    monkeypatch.undo()
    torn, heard = run(work, "torn", "refit.ridge=[0.5]")
    assert heard.ran == ["full refit", "full toggles"]
    assert (
        torn.steps["full", "refit"].notes["layers"].keys()
        == whole.steps["full", "refit"].notes["layers"].keys()
    )


def test_observers_hear_of_an_evaluator_that_fails(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RotdistillError("no memory for it")

    monkeypatch.setattr("rotdistill_fidelity._method.in_teacher_frame", broken)
    with pytest.raises(RotdistillError, match="no memory for it"):
        run(work, "broken")


def test_a_system_prompt_that_is_not_utf8_is_named(work: Path) -> None:
    (work / "texts/style.md").write_bytes(b"caf\xe9")
    with pytest.raises(RecipeError, match=r"style\.md: the system prompt cannot be read"):
        Executor(load_recipe(written(work, "r")), work / "runs", Heard(), lambda *_: None)


def test_results_of_a_run_name_every_variant(work: Path) -> None:
    outcome, _ = run(work, "one")
    assert {row.variant for row in outcome.rows} == {"base", "full"}
    ledger = [
        json.loads(line) for line in (outcome.folder / "ledger.jsonl").read_text().splitlines()
    ]
    assert {line["id"] for line in ledger if line["kind"] == "step"} >= {
        "chop",
        "residuals",
        "refit",
        "save full",
        "toggles base",
    }


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2, 4]], 1),
        ([[1, 2, 3]], 2),
        ([[5], [5, 6]], 0),
        ([[1, 2], [3, 4]], 0),
    ],
)
def test_every_prompt_keeps_a_token_of_its_own(prompts: list[list[int]], shared: int) -> None:
    assert shared_prefix_length(prompts) == shared


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_says_how_to_go_on(work: Path, number: int, code: int) -> None:
    command = [str(Path(sys.executable).with_name("rotdistill")), "run", str(written(work, "one"))]
    with subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True) as child:
        while not list(work.glob("runs/*/ledger.jsonl")) and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    assert "Go on with:" in said
    assert said.rstrip().endswith("one.toml")


def test_a_judge_that_takes_the_bank_asks_for_a_capture(work: Path) -> None:
    path = written(work, "bare")
    path.write_text(
        path.read_text(encoding="utf-8").replace('[[step]]\nuse = "residuals"\n', ""),
        encoding="utf-8",
    )
    with pytest.raises(RecipeError, match='step "fidelity": needs captured states'):
        Executor(load_recipe(path), work / "runs", Heard(), lambda *_: None).go()
