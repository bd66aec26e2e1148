"""Variants that break a check are marked and kept, and the run ends with exit code 4."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import CheckFailed
from rotdistill_core.evaluation import divergence
from rotdistill_core.evaluation.rows import MetricRow, overall_figures, row_from_json
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing import PicoWorkspace

STEPS = """
samples.guard = "texts/guard.tsv"
step = [
    { use = "residuals" },
    { use = "procrustes" },
    { use = "basis-fold" },
    { use = "chop", layers = 1 },
    { use = "fidelity" },
]
"""
VARIANTS: Mapping[str, Sequence[str]] = {
    "base": [],
    "rotated": ["procrustes", "basis-fold"],
    "cut": ["chop"],
}
NEVER_EXACT = "check.logits_float64 = 1e-30"
"""A tolerance that no certificate meets."""


class Outputs(NamedTuple):
    """What a run leaves behind."""

    figures: dict[str, dict[str, float]]
    """Variant -> metric -> figure over all texts."""
    markdown: str
    page: str
    report: dict[str, Any]
    cards: dict[str, str]
    """Variant -> model card."""


def run(
    workspace: PicoWorkspace, check: str = "", variants: Mapping[str, Sequence[str]] = VARIANTS
) -> RunResult:
    """Run the recipe with a check, such as `check.facts=0.9`, and these variants."""
    table = [f"variants.{name} = {json.dumps(steps)}" for name, steps in variants.items()]
    recipe = workspace.recipe(STEPS, name="gated", tables="\n".join([*table, check]))
    return workspace.run(recipe)


def read_outputs(workspace: PicoWorkspace) -> Outputs:
    (folder,) = workspace.runs.iterdir()

    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    rows = [row_from_json(json.loads(line)) for line in text(RunLayout.RESULTS).splitlines()]
    cards = folder.glob(RunLayout.checkpoint("*", RunLayout.CARD))
    return Outputs(
        figures=overall_figures(rows),
        markdown=text(RunLayout.REPORT_MARKDOWN),
        page=text(RunLayout.REPORT_HTML),
        report=json.loads(text(RunLayout.REPORT_JSON)),
        cards={path.parent.name: path.read_text(encoding="utf-8") for path in cards},
    )


@pytest.mark.slow
def test_a_variant_beyond_a_gate_is_marked_everywhere_and_kept(
    pico_workspace: PicoWorkspace,
) -> None:
    message = r'variant "cut" failed: kl is .* check\.kl_ratio = 1.5 of base'
    with pytest.raises(CheckFailed, match=message) as caught:
        run(pico_workspace, "check.kl_ratio = 1.5")
    assert caught.value.exit_code == 4
    outputs = read_outputs(pico_workspace)
    assert outputs.figures["cut"]["failed"] == 1
    assert "failed" not in outputs.figures["base"]
    assert "| cut (failed) |" in outputs.markdown
    assert "cut (failed)" in outputs.page
    assert list(outputs.report["failures"]) == ["cut"]
    assert outputs.report["tone"] == "bad"
    assert outputs.report["verdict"].startswith("Failed: `cut` breaks a check: kl is")
    assert "**This variant failed:** kl is" in outputs.cards["cut"]
    assert "failed" not in outputs.cards["base"].partition("## Recipe")[0]
    # The command line shows the results and then fails.
    code, out, err = pico_workspace.command("run", "gated.toml", "--json")
    assert code == 4
    assert 'variant "cut" failed' in err
    assert {row["variant"] for row in json.loads(out)["results"]} >= {"base", "cut"}


def test_a_certificate_that_does_not_hold_fails_its_variant_and_no_other(
    pico_workspace: PicoWorkspace,
) -> None:
    message = r'variant "rotated" failed: step "basis-fold": .*logits_float64 is '
    with pytest.raises(CheckFailed, match=message):
        run(pico_workspace, NEVER_EXACT)
    outputs = read_outputs(pico_workspace)
    assert "kl" in outputs.figures["base"]
    assert "kl" in outputs.figures["cut"]
    assert outputs.figures["rotated"] == {"failed": 1}
    (issue,) = [each for each in outputs.report["issues"] if each["subject"] == "rotated"]
    assert issue["kind"] == "failed"
    assert f"- **failed**, rotated: {issue['text']}" in outputs.markdown
    assert set(outputs.cards) == {"base", "cut"}


def test_a_run_whose_variants_all_fail_has_a_report(pico_workspace: PicoWorkspace) -> None:
    with pytest.raises(CheckFailed, match='variant "only" failed') as caught:
        run(pico_workspace, NEVER_EXACT, variants={"only": []})
    outputs = read_outputs(pico_workspace)
    assert outputs.figures == {"only": {"failed": 1}}
    assert str(next(pico_workspace.runs.iterdir())) in str(caught.value)
    assert outputs.report["verdict"].startswith("Failed: `only` breaks a check: step")


def test_one_token_that_is_not_a_number_is_not_averaged_away(
    pico_workspace: PicoWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_probs = divergence.log_probs

    def spoil_the_cut_student(weights: Weights, *args: Any) -> Tensor:
        values = log_probs(weights, *args).clone()
        if weights.depth == 1:
            values[0] = math.nan
        return values

    monkeypatch.setattr(divergence, "log_probs", spoil_the_cut_student)
    with pytest.raises(CheckFailed, match='variant "cut" failed: kl is not a number'):
        run(pico_workspace)
    outputs = read_outputs(pico_workspace)
    assert math.isnan(outputs.figures["cut"]["kl"])
    assert outputs.figures["base"]["kl"] < 1e-9
    shown = outputs.report["figures"]["cut"]["kl"]
    assert (shown["value"], shown["text"], shown["best"]) == ("nan", "nan", False)
    assert "- **failed**, cut: kl is not a number." in outputs.markdown


@pytest.mark.slow
def test_rows_depend_neither_on_repetition_nor_on_the_order_of_variants(
    make_workspace: Callable[..., PicoWorkspace],
) -> None:
    def rows(workspace: PicoWorkspace, variants: Mapping[str, Sequence[str]]) -> set[MetricRow]:
        found = run(workspace, variants=variants).rows
        return {row for row in found if row.metric != "seconds"}

    one = make_workspace()
    two = make_workspace()
    first = rows(one, VARIANTS)
    assert rows(one, VARIANTS) == first
    assert rows(two, dict(reversed(VARIANTS.items()))) == first


def test_a_lost_checkpoint_is_made_again(pico_workspace: PicoWorkspace) -> None:
    outcome = run(pico_workspace)
    lost = outcome.checkpoints["cut"] / "model.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    again = run(pico_workspace)
    assert again.checkpoints == outcome.checkpoints
    assert lost.read_bytes() == before
    assert again.rows == outcome.rows
