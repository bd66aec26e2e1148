"""Keys are those that a run records, in the order in which it makes its results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_pair
from rotdistill_core.data.conversations import facts_digest
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.execution.keys import (
    checkpoint_key,
    evaluation_key,
    keyed_steps,
    run_inputs,
    start_key,
)
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.recipe.load import load_recipe
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.testing import PicoWorkspace, pico_model

STEPS = """
variants = { base = [], full = ["basis", "fold"] }
student.save_dtype = "bfloat16"
step = [
    { use = "residuals" },
    { use = "fidelity" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
]
"""


@pytest.fixture
def loaded(tmp_path: Path) -> ResolvedRecipe:
    return load_recipe(PicoWorkspace(tmp_path).recipe(STEPS))


def test_steps_come_in_the_order_of_execution(loaded: ResolvedRecipe) -> None:
    walk = [(step.variant, step.recipe_step.id) for step in keyed_steps(loaded, "s", "float32", "")]
    assert walk == [
        ("base", "residuals"),
        ("base", "fidelity"),
        ("full", "residuals"),
        ("full", "basis"),
        ("full", "fold"),
        ("full", "fidelity"),
    ]


def variants_of(loaded: ResolvedRecipe, dtype: str) -> set[str]:
    return {step.variant for step in keyed_steps(loaded, "s", dtype, "")}


def test_narrow_checkpoints_add_a_variant_of_the_exact_steps(tmp_path: Path) -> None:
    head = '    { id = "head", use = "lm-head-ridge" },\n]'
    styled = STEPS.replace('"fold"]', '"fold", "head"]').replace("\n]", f"\n{head}")
    loaded = load_recipe(PicoWorkspace(tmp_path).recipe(styled))
    assert variants_of(loaded, "float32") == {"base", "full"}
    assert variants_of(loaded, "bfloat16") == {"base", "full", "round-trip"}


def test_a_variant_of_the_exact_steps_is_not_made_twice(loaded: ResolvedRecipe) -> None:
    assert variants_of(loaded, "bfloat16") == {"base", "full"}


def test_a_key_depends_on_the_steps_before_it(loaded: ResolvedRecipe) -> None:
    steps = {
        (step.variant, step.recipe_step.id): step
        for step in keyed_steps(loaded, "start", "float32", "facts")
    }
    capture, basis, fold = (steps["full", name] for name in ("residuals", "basis", "fold"))
    assert steps["base", "residuals"].key == capture.key  # variants share it
    assert (capture.before, basis.before, fold.before) == ("start", capture.key, basis.key)
    assert capture.key == capture.recipe_step.key("start")
    assert [step.id for step in fold.earlier] == ["residuals", "basis"]


def test_an_evaluator_depends_on_the_finished_variant_and_on_facts(loaded: ResolvedRecipe) -> None:
    steps = list(keyed_steps(loaded, "start", "float32", "facts"))
    score, fold = steps[-1], steps[-2]
    assert score.recipe_step.stage == "evaluate"
    assert score.before == digest(fold.key, "full", "torch.float32", "facts")
    assert score.before == evaluation_key("full", fold.key, "float32", "facts")
    assert [step.id for step in score.earlier] == ["residuals", "basis", "fold"]


def test_a_run_on_another_gpu_has_the_same_inputs(
    pico_workspace: PicoWorkspace, loaded: ResolvedRecipe
) -> None:
    recipe = loaded.recipe
    model = ModelRef(model=str(pico_workspace.model()))
    pair = open_pair(model, model, None)

    def inputs(device: str) -> dict[str, str]:
        student = recipe.student.model_copy(update={"device": device})
        return run_inputs(recipe.model_copy(update={"student": student}), pair, [], "", "engine")

    assert inputs("cuda:0") == inputs("cuda:1") == inputs("cuda")
    anchor = recipe.student.model_copy(update={"dtype": "float64"})
    anchored = run_inputs(recipe.model_copy(update={"anchor": anchor}), pair, [], "", "engine")
    assert anchored["compute"] != run_inputs(recipe, pair, [], "", "engine")["compute"]
    changed = inputs("cpu")
    assert {name for name in changed if changed[name] != inputs("cuda")[name]} == {"compute"}


@pytest.mark.slow
def test_keys_are_those_in_the_ledger_of_a_run(
    pico_workspace: PicoWorkspace, loaded: ResolvedRecipe
) -> None:
    outcome = pico_workspace.run(loaded.path)
    ledger = Ledger(outcome.folder)
    [start] = ledger.starts
    before = {record.key: record.before for record in ledger.steps}
    questions, _ = read_conversations(loaded.recipe.samples, pico_workspace.folder)
    last = {}
    for step in keyed_steps(loaded, start.key, "bfloat16", facts_digest(questions)):
        assert outcome.steps[step.variant, step.recipe_step.id].key == step.key
        assert before[step.key] == step.before
        if step.recipe_step.stage != "evaluate":
            last[step.variant] = step.key
    assert set(last) == {"base", "full"}
    saved = {record.variant: record.key for record in ledger.checkpoints}
    assert saved == {
        variant: checkpoint_key(variant, last[variant], "bfloat16") for variant in last
    }


@pytest.mark.parametrize("role", ["teacher", "student", "anchor"])
def test_the_start_depends_on_how_each_model_computes(tmp_path: Path, role: str) -> None:
    model = pico_model(tmp_path / "model")
    wide = replace(model, ref=model.ref.model_copy(update={"dtype": "float64"}))
    pair = Pair(model, model, model)
    assert start_key(replace(pair, **{role: wide}), "texts", 0) != start_key(pair, "texts", 0)
