"""A run compares itself with transformers: before it begins, after a cut, and when it has saved."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rotdistill_core.architecture.rope_decoder import rope_decoder
from rotdistill_core.architecture.table import Adapter
from rotdistill_core.checkpoint import open as opening
from rotdistill_core.checkpoint import weights as views
from rotdistill_core.checkpoint.foreign import reading
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import SetupError
from rotdistill_core.execution import parity as run_parity
from rotdistill_core.execution.executor import Executor
from rotdistill_core.execution.outcome import RunFailed, RunResult
from rotdistill_core.forward import parity as parity_module
from rotdistill_core.plugin.registry import adapter_for, adapter_origin
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.testing import PicoWorkspace, SilentObserver

Open = Callable[..., Executor]
STEPS = """
variants = { base = [], full = ["refit"] }
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "refit", use = "writer-refit" },
    { use = "fidelity" },
]
"""


def tables(monkeypatch: pytest.MonkeyPatch, table: Adapter) -> None:
    """Let a table stand for all models that are opened."""
    monkeypatch.setattr(opening, "adapter_for", lambda _: table)
    monkeypatch.setattr(opening, "adapter_origin", lambda _: adapter_origin("llama"))


def _origin() -> Any:
    from rotdistill_core.plugin.registry import adapter_origin

    return adapter_origin("llama")


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every comparison."""
    compared: list[str] = []
    compare = run_parity.compare_with_transformers

    def counted(weights: Weights, *rest: Any) -> Any:
        compared.append(str(weights.depth))
        return compare(weights, *rest)

    monkeypatch.setattr(run_parity, "compare_with_transformers", counted)
    return compared


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# Before anything is made.

MULTIPLIERS: dict[str, Mapping[str, float]] = {
    "all": {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.25,
    },
    "embedding_multiplier": {"embedding_multiplier": 12.0},
    "residual_multiplier": {"residual_multiplier": 0.22},
    "logits_scaling": {"logits_scaling": 8.0},
    "both": {"logits_scaling": 0.5, "embedding_multiplier": 0.5},
}


@pytest.mark.parametrize("which", MULTIPLIERS)
def test_multipliers_that_the_table_does_not_name_are_refused_before_anything_is_made(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    pico_workspace.model("model", "granite", **MULTIPLIERS[which])
    tables(monkeypatch, rope_decoder(("granite",)))
    recipe = pico_workspace.recipe(STEPS)
    with pytest.raises(SetupError) as caught:
        pico_workspace.run(recipe)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert message.endswith("Nothing was captured.")
    acts_on_logits = {*MULTIPLIERS[which]} & {"embedding_multiplier", "logits_scaling"}
    if acts_on_logits:
        wanted = "teacher model: is not computed as transformers computes it"
        assert message.startswith(wanted)
    else:
        assert message.startswith("teacher model: a layer multiplies what attention and the MLP ")
    for setting, value in MULTIPLIERS[which].items():
        assert (f"{setting} = {value} (default 1.0)" in message) == (setting in acts_on_logits)
    named = "In its config.json is residual_multiplier = 0.22. " in message
    assert named == ("residual_multiplier" in MULTIPLIERS[which])
    assert files_below(pico_workspace.runs) == []


def test_a_cap_that_the_table_does_not_name_is_refused(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico_workspace.model("model", "gemma3_text", head_dim=8, final_logit_softcapping=5.0)
    tables(monkeypatch, replace(adapter_for("gemma3_text"), softcap_key=""))
    recipe = pico_workspace.recipe('step = [{ use = "residuals" }]')
    code, _, errors = pico_workspace.command("run", str(recipe))
    assert code == 3
    assert "final_logit_softcapping = 5.0" in errors


@pytest.mark.parametrize("wrong", ["teacher", "student"])
def test_the_model_that_is_wrong_is_named(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    for seed, role in enumerate(("teacher", "student")):
        scaling = 8.0 if role == wrong else 1.0
        pico_workspace.model(role, "granite", seed=seed, logits_scaling=scaling)
    tables(monkeypatch, rope_decoder(("granite",)))
    recipe = pico_workspace.recipe(STEPS, teacher="teacher", student="student")
    with pytest.raises(SetupError, match=f"^{wrong} {wrong}: is not computed as"):
        pico_workspace.run(recipe)


def test_a_table_that_names_them_runs(pico_workspace: PicoWorkspace) -> None:
    pytest.importorskip("rotdistill_granite_adapter")
    table = __import__("rotdistill_granite_adapter.table", fromlist=["GRANITE"]).GRANITE
    with pytest.MonkeyPatch.context() as patch:
        tables(patch, table)
        pico_workspace.model("model", "granite", **MULTIPLIERS["all"])
        outcome = pico_workspace.run(pico_workspace.recipe(STEPS))
    assert set(outcome.parity) == {"base", "full"}
    assert all(parity.holds for parity in outcome.parity.values())


# What is recorded.


def test_every_model_and_variant_stands_in_the_ledger_and_the_cut_in_its_step(
    executor: Open,
) -> None:
    outcome = executor("trial").go()
    assert set(outcome.model_parity) == {"teacher", "student"}
    assert set(outcome.parity) == {"base", "full"}
    found = {**outcome.model_parity, **outcome.parity}
    assert all(0 <= parity.difference < 1e-5 for parity in found.values())
    records = Ledger(outcome.folder).parities
    assert {record.role or record.variant: record.result for record in records} == found
    cut = outcome.steps["base", "chop"].report.parity
    assert cut is not None
    assert cut.holds
    assert outcome.steps["full", "refit"].report.parity is None
    assert len(cut.texts) == 2
    assert cut.tokens == tuple(sorted(cut.tokens))


def test_models_are_compared_once_and_a_finished_run_compares_nothing(
    executor: Open, comparisons: list[str]
) -> None:
    executor("trial").go()
    # One model in two roles, the cut, and two variants.
    assert comparisons == ["3", "2", "2", "2"]
    again = executor("trial").go()
    assert len(comparisons) == 4
    assert set(again.model_parity) == {"teacher", "student"}
    assert set(again.parity) == {"base", "full"}


def test_another_run_of_the_same_texts_does_not_compare_the_models_again(
    executor: Open, comparisons: list[str]
) -> None:
    executor("trial").go()
    other = executor("other", "chop.layers=1").go()
    assert comparisons[4:] == ["1", "1", "1"]
    assert {"teacher", "student"} <= {record.role for record in Ledger(other.folder).parities}


@pytest.mark.parametrize(
    "change", ["seed", "samples.answer_tokens", "texts"], ids=lambda change: f"another {change}"
)
def test_models_are_compared_again_for_other_texts_alone(
    executor: Open, comparisons: list[str], work: Path, change: str
) -> None:
    executor("trial").go()
    done = len(comparisons)
    sets = [] if change == "texts" else [f"{change}=3"]
    if change == "texts":
        style = work / "texts/style.md"
        style.write_text("w9 w8")
    executor("trial", *sets).go()
    assert ("3" in comparisons[done:]) == (change != "seed")


def test_fresh_compares_again(executor: Open, comparisons: list[str]) -> None:
    executor("trial").go()
    done = len(comparisons)
    executor("trial", fresh=True).go()
    assert comparisons[done] == "3"


def test_plan_of_a_finished_run_has_nothing_to_do(pico_workspace: PicoWorkspace) -> None:
    pico_workspace.model(num_hidden_layers=3)
    recipe = pico_workspace.recipe(STEPS)
    pico_workspace.run(recipe)
    code, text, _ = pico_workspace.command("plan", str(recipe))
    assert code == 0
    assert "not made before" not in text


# What a run makes itself.


def test_a_cut_that_is_computed_otherwise_fails_its_variants(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cut model gets a cap that the table does not name; the whole one has none."""
    pico_workspace.model("model", "gemma3_text", head_dim=8, num_hidden_layers=3)
    tables(monkeypatch, replace(adapter_for("gemma3_text"), softcap_key=""))
    cut = Weights.cut

    def wrong(self: Weights, keep: Any) -> Weights:
        return cut(self, keep).edit({}, final_logit_softcapping=2.0)

    monkeypatch.setattr(Weights, "cut", wrong)
    steps = """
    variants = { whole = [], cut = ["chop"] }
    step = [{ use = "chop", layers = 2 }, { use = "residuals" }, { use = "fidelity" }]
    """
    with pytest.raises(RunFailed) as caught:
        pico_workspace.run(pico_workspace.recipe(steps, tables='baseline = "whole"'))
    outcome = caught.value.outcome
    assert caught.value.exit_code == 4
    assert set(outcome.failed) == {"cut"}
    assert 'step "chop": the model after it is not computed as' in outcome.failed["cut"][0]
    assert "final_logit_softcapping = 2.0" in outcome.failed["cut"][0]
    assert set(outcome.checkpoints) == {"whole"}


def saved_otherwise(monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
    """Let the checkpoints of a run say something else in their config than the run computed."""
    write = views.write_checkpoint

    def wrong(tensors: Any, settings: Mapping[str, Any], *rest: Any) -> None:
        write(tensors, {**settings, **config}, *rest)

    monkeypatch.setattr(views, "write_checkpoint", wrong)


def failure_of(executor: Open) -> RunResult:
    with pytest.raises(RunFailed) as caught:
        executor("trial").go()
    assert caught.value.exit_code == 4
    return caught.value.outcome


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rms_norm_eps": 0.5},
        {"hidden_act": "relu"},
        {"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1},
        {"tie_word_embeddings": False},
        {"attention_bias": True},
        {"model_type": "no-such-model"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_checkpoint_that_transformers_reads_otherwise_fails(
    executor: Open, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    saved_otherwise(monkeypatch, **config)
    outcome = failure_of(executor)
    assert set(outcome.failed) == {"base", "full"}
    for variant, (fault,) in outcome.failed.items():
        assert f"checkpoints/{variant}: the checkpoint" in fault
    assert outcome.rows
    assert not outcome.checkpoints


def test_one_wrong_checkpoint_leaves_the_others(
    executor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = parity_module.logits_of_folder

    def wrong_for_full(folder: Path, *rest: Any) -> Any:
        logits = compare(folder, *rest)
        factor = 1.001 if folder.name == "full" else 1.0
        return lambda *arguments: factor * logits(*arguments)

    monkeypatch.setattr(run_parity, "logits_of_folder", wrong_for_full)
    outcome = failure_of(executor)
    assert set(outcome.failed) == {"full"}
    assert set(outcome.checkpoints) == {"base"}
    assert {row.variant for row in outcome.rows if row.metric == "kl"} == {"base"}
    assert {r.variant for r in Ledger(outcome.folder).parities} == {"", "base"}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_checkpoint_that_the_system_lets_nobody_read_is_not_called_wrong(
    executor: Open, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    compare = parity_module.logits_of_folder

    def unreadable(folder: Path, *rest: Any) -> Any:
        if folder.name == "full":
            with reading(folder, "the model"):
                raise OSError(number, os.strerror(number), str(folder / "config.json"))
        return compare(folder, *rest)

    monkeypatch.setattr(run_parity, "logits_of_folder", unreadable)
    with pytest.raises(SetupError, match=os.strerror(number)) as caught:
        executor("trial").go()
    assert caught.value.exit_code == 3


def test_a_wrong_checkpoint_is_compared_again_by_the_next_run(
    executor: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        saved_otherwise(patch, rms_norm_eps=0.5)
        failure_of(executor)
    # The folder is as it was written, so it stays wrong.
    assert set(failure_of(executor).failed) == {"base", "full"}


def test_lines_say_what_was_compared(pico_workspace: PicoWorkspace) -> None:
    pico_workspace.model(num_hidden_layers=3)
    watching = SilentObserver()
    pico_workspace.run(pico_workspace.recipe(STEPS), observer=watching)
    lines = [line.split() for line in watching.lines if "with transformers" in line]
    assert all(line[1] == "compared" for line in lines)
    assert [line[0] for line in lines] == ["teacher", "chop", "base", "full"]
