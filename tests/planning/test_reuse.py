"""Existing results are found by their keys, and a missing one states why it has to be made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.execution.keys import KeyedStep, checkpoint_key
from rotdistill_core.planning import reuse
from rotdistill_core.planning.machine import this_machine
from rotdistill_core.planning.plan import Plan, build_plan
from rotdistill_core.planning.reuse import UNKNOWN, ReuseIndex, step_statuses
from rotdistill_core.plugin.origin import Origin
from rotdistill_core.plugin.registry import step_class
from rotdistill_core.plugin.source_code import source_digest
from rotdistill_core.plugin.step import options_of
from rotdistill_core.recipe import resolved
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.recipe.resolved import RecipeStep
from rotdistill_core.store.files import CommittedFile
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import CheckpointRecord, RowsRef, StartRecord, StepRecord
from rotdistill_core.store.results import StepReport
from rotdistill_core.testing import run_recipe


def plan_of(*sets: str, path: str = "trial.toml", fresh: bool = False) -> Plan:
    machine = this_machine(Path("runs"))
    return build_plan(load_recipe(Path(path), sets), Path("runs"), machine, fresh)


def reasons(planned: Plan) -> dict[str, str]:
    """Return step and first variant -> the reason why it has to be made."""
    return {" ".join([line.id, *line.variants[:1]]): line.why for line in planned.todo}


def run_name() -> str:
    """Return the name of the only run there is."""
    (folder,) = (path.parent for path in Path("runs").glob("*/ledger.jsonl"))
    return folder.name


def test_a_changed_option_is_the_reason_of_its_step_and_of_all_after_it(after_run: Path) -> None:
    planned = plan_of("basis.tie=1")
    assert reasons(planned)["basis full"] == f"unlike {run_name()}: tie all → 1"
    assert reasons(planned)["fold full"] == "depends on basis"
    reused = [line for line in planned.lines if line.id in ("chop", "residuals") and line.reused]
    assert {line.why.partition("-")[0] for line in reused} == {"trial"}  # the other run's name


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("chop.layers=3", "unlike RUN: layers 2 → 3"),
        ("seed=5", "seed changed"),
        ("student.dtype=float64", "compute changed"),
    ],
)
def test_a_change_at_the_start_is_the_reason_of_the_first_step(
    after_run: Path, override: str, reason: str
) -> None:
    assert reasons(plan_of(override))["chop base"] == reason.replace("RUN", run_name())


def test_fresh_reuses_nothing(after_run: Path) -> None:
    plan = plan_of(fresh=True)
    assert not any(line.reused for line in plan.lines)
    assert {line.why for line in plan.lines} == {"asked for with --fresh"}
    assert {line.id for line in plan.lines} >= {"teacher's answers", "checkpoints", "chop"}


def test_a_changed_text_is_the_reason_of_everything(after_run: Path) -> None:
    index = after_run / "texts" / "index.tsv"
    index.write_text(index.read_text().replace("place 3", "place three"))
    assert reasons(plan_of())["chop base"] == "texts changed"


def test_a_changed_weight_is_the_reason_of_everything(after_run: Path) -> None:
    model = after_run / "model" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-2] ^= 1
    model.write_bytes(data)
    assert reasons(plan_of())["chop base"] == "teacher, student changed"


def test_a_missing_file_is_the_reason_of_its_step(after_run: Path) -> None:
    next(after_run.rglob("shards/student/residual/00001.safetensors")).unlink()
    assert reasons(plan_of())["residuals base"] == "its files are gone, or made from something else"


def test_changed_code_is_the_reason_of_its_steps(
    after_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edited(origin: Origin) -> str:
        return "edited" if origin.name == "procrustes" else source_digest(origin)

    monkeypatch.setattr(resolved, "source_digest", edited)
    assert reasons(plan_of())["basis full"] == (
        f"unlike {run_name()}: the code of rotdistill-procrustes"
    )


@pytest.mark.slow
def test_a_result_that_a_plan_calls_reused_is_reused(after_run: Path) -> None:
    text = (after_run / "trial.toml").read_text()
    text = text.replace('name = "trial"', 'name = "other"')
    (after_run / "other.toml").write_text(text.replace('"procrustes"', '"random-rotation"'))
    planned = plan_of(path="other.toml")
    outcome = run_recipe(after_run / "other.toml")
    for line in planned.lines:
        if line.use and line.variants:
            assert outcome.steps[line.variants[0], line.id].reused is line.reused, line


@pytest.mark.slow
def test_an_evaluator_before_an_edit_scores_the_finished_variant(before_run: Path) -> None:
    recipe = before_run / "trial.toml"
    evaluator = '{ use = "fidelity" },'
    capture = '{ use = "residuals" },'
    text = recipe.read_text().replace(evaluator, "")
    recipe.write_text(text.replace(capture, capture + evaluator))
    run_recipe(recipe)
    assert plan_of().todo == []


def step_record(key: str, **changes: Any) -> StepRecord:
    fields = {
        "key": key,
        "before": "",
        "id": "basis",
        "use": "procrustes",
        "options": {},
        "plugin": "rotdistill-procrustes 0.1.0",
        "seconds": 1.0,
        "files": (),
        "result": RowsRef(rows=()),
        "notes": {},
        "report": StepReport(),
    }
    return StepRecord(**{**fields, **changes})


def test_results_of_the_run_itself_come_first(tmp_path: Path) -> None:
    for name, seconds in (("one", 1.0), ("two", 2.0)):
        Ledger(tmp_path / name).append(step_record("k", seconds=seconds))
    ledgers = [Ledger(tmp_path / "one"), Ledger(tmp_path / "two")]
    for run, seconds in (("one", 1.0), ("two", 2.0)):
        index = ReuseIndex(ledgers, run)
        existing = index.find("k")
        newest = index.newest("basis")
        assert existing is not None
        assert newest is not None
        assert (existing.run, newest.run, newest.record.seconds) == (run, run, seconds)
        assert index.find("other") is None


def test_an_evaluator_has_a_newest_result_for_each_variant(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "one")
    for variant in ("base", "full"):
        ledger.append(step_record(f"key of {variant}", id="fidelity", variant=variant))
    index = ReuseIndex([ledger], "one")
    newest = index.newest("fidelity", "base")
    assert newest is not None
    assert newest.record.key == "key of base"
    assert index.newest("fidelity") is None


@pytest.mark.parametrize("fresh", [False, True])
def test_a_result_that_was_made_before_has_a_measured_time(tmp_path: Path, fresh: bool) -> None:
    cls, origin = step_class("procrustes")
    step = RecipeStep("basis", cls(), origin)
    ledger = Ledger(tmp_path / "one")
    ledger.append(step_record("k", options=options_of(step.step), seconds=12.5))
    keyed = [
        KeyedStep("full", step, "k", "before", ()),
        # The same options on other models or texts take another time.
        KeyedStep("free", step, "another key", "before", ()),
    ]
    index = ReuseIndex([ledger], "one")
    measured, unmeasured = step_statuses(keyed, index, [], fresh)
    assert measured.measured_seconds == 12.5
    assert unmeasured.measured_seconds is None


def test_inputs_are_known_only_when_all_are_equal(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "one")
    index = ReuseIndex([ledger], "one")
    assert index.changed_inputs({"texts": "a"}) == []  # nothing has run before
    ledger.append(StartRecord(key="start", inputs={"texts": "a", "seed": "0"}))
    index = ReuseIndex([ledger], "one")
    assert index.start_key({"texts": "a", "seed": "0"}) == "start"
    assert index.start_key({"texts": "a", "seed": "1"}) == UNKNOWN
    assert index.start_key(None) == UNKNOWN
    assert index.changed_inputs({"texts": "a", "seed": "1"}) == ["seed"]
    assert index.changed_inputs(None) == []


def test_a_result_whose_file_is_not_as_committed_does_not_exist(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "one")
    ledger.folder.mkdir()
    path = ledger.folder / "file"
    path.write_text("four")
    files = {
        "whole": CommittedFile("one/file", 4, sha256_of(path)),
        "torn": CommittedFile("one/file", 9, sha256_of(path)),
        "flipped": CommittedFile("one/file", 4, "0" * 64),
        "gone": CommittedFile("one/other", 4, sha256_of(path)),
    }
    for key, file in files.items():
        ledger.append(step_record(key, files=(file,)))
    index = ReuseIndex([ledger], "one")
    assert [key for key in files if index.find(key)] == ["whole"]


def test_a_large_file_is_not_read_by_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reuse, "HASHED_BYTES", 3)
    ledger = Ledger(tmp_path / "one")
    ledger.folder.mkdir()
    (ledger.folder / "file").write_text("four")
    ledger.append(step_record("k", files=(CommittedFile("one/file", 4, "0" * 64),)))
    assert ReuseIndex([ledger], "one").find("k") is not None


def test_a_checkpoint_counts_in_the_folder_of_its_run_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "one")
    key = checkpoint_key("full", "state", "float32")
    ledger.append(CheckpointRecord(key=key, variant="full", folder="one/checkpoints", files=()))
    index = ReuseIndex([ledger], "one")
    assert index.has_checkpoint("one", "full", "state", "float32")
    assert not index.has_checkpoint("two", "full", "state", "float32")
    assert not index.has_checkpoint("one", "full", "state", "bfloat16")
