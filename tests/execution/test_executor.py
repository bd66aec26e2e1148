"""Whole runs of a pico recipe: what is shared and reused, and what a failure leaves."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core import hookimpl
from rotdistill_core.errors import RecipeError, RotdistillError
from rotdistill_core.evaluation.rows import MetricRow
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import ActivationsRef, RowsRef, WeightsRef
from rotdistill_core.testing import PicoWorkspace

Open = Callable[..., Executor]
STEPS = """
step = [
    { use = "residuals" },
    { use = "procrustes" },
    { use = "basis-fold" },
    { use = "chop", layers = 1 },
    { use = "fidelity" },
]
"""


@pytest.mark.slow
def test_a_second_recipe_shares_steps_and_writes_its_own_checkpoints(
    executor: Open, recorder: Any
) -> None:
    one = executor("one", observer=recorder).go()
    assert recorder.ran
    recorder.ran.clear()
    two = executor("two", 'observers=["report"]', observer=recorder).go()
    assert recorder.ran == []
    assert one.folder != two.folder
    assert two.rows == one.rows
    for name in ("base", "full"):
        first, second = (run.checkpoints[name] for run in (one, two))
        assert second == two.folder / "checkpoints" / name
        weights = "model.safetensors"
        assert (first / weights).read_bytes() == (second / weights).read_bytes()
        assert "# two:" in (second / "README.md").read_text()


@pytest.mark.slow
def test_a_finished_run_is_reused_and_fresh_makes_each_step_once(
    executor: Open, recorder: Any
) -> None:
    executor("one").go()
    again = executor("one", observer=recorder).go()
    assert recorder.ran == []
    assert all(again.steps["base", step].reused for step in ("chop", "residuals", "fidelity"))
    fresh = executor("one", observer=recorder, fresh=True).go()
    assert recorder.ran == [
        "base chop",
        "base residuals",
        "base fidelity",
        "full refit",
        "full fidelity",
    ]
    assert not any(step.reused for step in fresh.steps.values())


@pytest.mark.slow
def test_fresh_writes_every_file_of_a_step_again(executor: Open) -> None:
    folder = executor("one").go().folder

    def written() -> dict[Path, int]:
        files = (path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
        return {path: path.stat().st_mtime_ns for path in files}

    before = written()
    executor("one").go()
    assert written() == before
    executor("one", fresh=True).go()
    after = written()
    kept = {path.relative_to(folder).as_posix() for path in before if after[path] == before[path]}
    assert {path.relative_to(folder).parts[0] for path in before} >= {
        "answers",
        "checkpoints",
        "shards",
        "weights",
    }
    assert not kept
    assert after.keys() == before.keys()


def test_the_ledger_types_every_result(executor: Open) -> None:
    ledger = Ledger(executor("one").go().folder)
    results = {(record.id, record.variant): type(record.result) for record in ledger.steps}
    assert results == {
        ("chop", ""): WeightsRef,
        ("residuals", ""): ActivationsRef,
        ("refit", ""): WeightsRef,
        ("fidelity", "base"): RowsRef,
        ("fidelity", "full"): RowsRef,
    }
    root = ledger.folder.parent
    checkpoints = {record.variant: root / record.folder for record in ledger.checkpoints}
    assert checkpoints == {name: ledger.folder / "checkpoints" / name for name in ("base", "full")}
    assert len(ledger.starts) == 1
    assert all((root / path).is_file() for record in ledger.records for path in record.paths())


@pytest.mark.slow
def test_a_refit_goes_on_after_a_kill(
    executor: Open, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = executor("whole").go()

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rotdistill_core.checkpoint.weights.Weights.store", kill)
    with pytest.raises(KeyboardInterrupt):
        executor("torn", "refit.ridge=[0.5]").go()
    monkeypatch.undo()
    torn = executor("torn", "refit.ridge=[0.5]", observer=recorder).go()
    assert recorder.ran == ["full refit", "full fidelity"]
    layers = [run.steps["full", "refit"].notes["layers"] for run in (torn, whole)]
    assert layers[0].keys() == layers[1].keys()


def test_a_failing_evaluator_ends_the_run_and_is_reported(
    executor: Open, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @hookimpl
    def fail(self: object, variant: object) -> None:
        raise RotdistillError("no memory for it")

    monkeypatch.setattr("rotdistill_fidelity.step.Fidelity.evaluate", fail)
    with pytest.raises(RotdistillError, match="no memory for it"):
        executor("broken", observer=recorder).go()
    assert recorder.failed == ["base fidelity: no memory for it"]


def test_a_step_that_fails_is_in_the_ledger_until_it_is_made(
    executor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    @hookimpl
    def fail(self: object, weights: object) -> None:
        raise ZeroDivisionError("a " + "very " * 2000 + "long tale")

    began = datetime.now(UTC).replace(microsecond=0)
    broken = executor("broken")
    with monkeypatch.context() as patch:
        patch.setattr("rotdistill_writer_refit.step.WriterRefit.fold", fail)
        for _ in range(2):  # the second run finds what the first one made before it failed
            with pytest.raises(ZeroDivisionError):
                executor("broken").go()
    run = RunFolder(broken.folder)
    assert [(each.variant, each.id) for each in run.ledger.failures] == [("full", "refit")] * 2
    (failure,) = run.failures
    assert (failure.error, failure.message[:6]) == ("ZeroDivisionError", "a very")
    assert failure.message.endswith("long tale")
    assert len(failure.message) < 5000
    assert began <= datetime.fromisoformat(failure.when) <= datetime.now(UTC)
    assert run.ledger.faults == []
    assert [record.id for record in run.ledger.steps if not record.variant] == ["chop", "residuals"]

    whole = executor("broken").go()
    assert whole.steps["full", "residuals"].reused
    assert not whole.steps["full", "refit"].reused
    assert RunFolder(broken.folder).failures == []

    with monkeypatch.context() as patch:
        patch.setattr("rotdistill_writer_refit.step.WriterRefit.fold", fail)
        with pytest.raises(ZeroDivisionError):
            executor("broken", fresh=True).go()
    assert [each.id for each in RunFolder(broken.folder).failures] == ["refit"]
    again = executor("broken").go()  # finds what was made before
    assert again.steps["full", "refit"].reused
    assert RunFolder(broken.folder).failures == []


def test_a_kill_is_no_failure_of_a_step(executor: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    killed = executor("killed")
    monkeypatch.setattr("rotdistill_core.checkpoint.weights.Weights.store", kill)
    with pytest.raises(KeyboardInterrupt):
        killed.go()
    assert Ledger(killed.folder).failures == []


def test_a_full_disk_does_not_hide_why_a_step_failed(
    executor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = executor("full-disk")

    @hookimpl
    def fail(self: object, weights: object) -> None:
        monkeypatch.setattr("rotdistill_core.store.ledger.os.write", refuse)
        raise RotdistillError("no such layer")

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rotdistill_chop.step.Chop.fold", fail)
    with pytest.raises(RotdistillError, match="no such layer"):
        full.go()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("samples.answer_tokens=900", "with an answer of up to 900 it passes 128"),
        ("teacher.device=cuda:7", "cuda:7"),
    ],
)
def test_a_run_that_is_refused_before_its_first_step_leaves_no_folder(
    work: Path, executor: Open, override: str, message: str
) -> None:
    with pytest.raises(RotdistillError, match=message):
        executor("refused", override).go()
    assert list(work.glob("runs/*")) == []


def test_a_refused_run_leaves_what_an_earlier_one_has_made(
    executor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = executor("one")
    samples = first.samples()  # the teacher answers
    answers = set(first.folder.rglob("answers/*/*.json"))
    assert samples.layout.texts
    assert answers

    def refuse(*_: Any) -> None:
        raise RecipeError("no texts like these.")

    monkeypatch.setattr("rotdistill_core.execution.executor.prepare_samples", refuse)
    with pytest.raises(RecipeError, match="no texts like these"):
        executor("one").go()
    assert set(first.folder.rglob("answers/*/*.json")) == answers
    assert Ledger(first.folder).named("recipe.toml")


def test_a_system_prompt_that_is_not_utf8_is_named(work: Path, executor: Open) -> None:
    (work / "texts/style.md").write_bytes(b"caf\xe9")
    with pytest.raises(RecipeError, match=r"style\.md: the system prompt is not UTF-8"):
        executor("r")


@pytest.mark.slow
def test_a_terminated_run_prints_the_line_that_resumes_it(
    work: Path, write_recipe: Callable[..., Path]
) -> None:
    """SIGINT is sent in `test_cli_errors.py`."""
    command = [sys.executable, "-m", "rotdistill_core", "run", str(write_recipe("one"))]
    with subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True) as child:
        while not list(work.glob("runs/*/ledger.jsonl")) and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        _, printed = child.communicate(timeout=60)
    assert child.returncode == 143, printed
    assert "Go on with:" in printed
    assert printed.rstrip().endswith("one.toml")


@pytest.mark.slow
def test_rows_depend_neither_on_repetition_nor_on_the_order_of_variants(
    make_workspace: Callable[..., PicoWorkspace],
) -> None:
    variants = {
        "base": "variants.base = []",
        "rotated": 'variants.rotated = ["procrustes", "basis-fold"]',
        "cut": 'variants.cut = ["chop"]',
    }

    def rows(workspace: PicoWorkspace, order: Sequence[str]) -> set[MetricRow]:
        table = "\n".join(variants[name] for name in order)
        run = workspace.run(workspace.recipe(STEPS, tables=table))
        return {row for row in run.rows if row.metric != "seconds"}

    one = make_workspace()
    two = make_workspace()
    first = rows(one, ["base", "rotated", "cut"])
    assert rows(one, ["base", "rotated", "cut"]) == first
    assert rows(two, ["cut", "rotated", "base"]) == first


def test_a_lost_checkpoint_is_made_again(executor: Open) -> None:
    outcome = executor("one").go()
    lost = outcome.checkpoints["full"] / "model.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    again = executor("one").go()
    assert again.checkpoints == outcome.checkpoints
    assert lost.read_bytes() == before
    assert again.rows == outcome.rows


@pytest.mark.parametrize("place", [0, 7, -1])
def test_a_damaged_file_that_only_saves_work_is_made_again(
    pico_workspace: PicoWorkspace, place: int
) -> None:
    steps = 'step = [{ use = "chop", layers = 1 }, { use = "answers" }]'
    recipe = pico_workspace.recipe(steps, answer_tokens=2)
    folder = pico_workspace.run(recipe).folder
    (path,) = folder.glob("answers/variant-full/*.json")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    again = pico_workspace.run(recipe)
    assert path.read_bytes() == whole
    assert again.steps["full", "chop"].reused
    assert not again.steps["full", "answers"].reused
    assert pico_workspace.run(recipe).steps["full", "answers"].reused
