"""Gates: which side of a limit a figure lies on, and what a run does with a broken one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import CheckFailed
from rotdistill_core.evaluation import divergence
from rotdistill_core.evaluation.gates import Gate, broken_gates, gates_of
from rotdistill_core.evaluation.rows import MetricRow, overall_figures, row_from_json
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.document import Check
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
    recipe = workspace.recipe(
        STEPS, name="gated", observers=("report",), tables="\n".join([*table, check])
    )
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


@pytest.mark.parametrize(
    ("higher_is_better", "value", "violated"),
    [
        (False, 1.5, False),
        (False, 1.5009, False),  # rounding: 0.1 % of the baseline
        (False, 1.51, True),
        (False, -3.0, False),
        (True, 1.5, False),
        (True, 1.4991, False),
        (True, 1.49, True),
        (False, math.nan, True),
        (True, math.nan, True),
    ],
)
def test_a_gate_is_violated_on_the_wrong_side_of_its_limit(
    higher_is_better: bool, value: float, violated: bool
) -> None:
    gate = Gate("any", 1.5, higher_is_better)
    assert gate.violated(value, baseline=1.0) is violated


def test_a_baseline_that_is_not_a_number_violates_every_gate() -> None:
    assert Gate("kl", 1.5, higher_is_better=False).violated(1.0, math.nan)


def test_only_gates_that_the_recipe_sets_exist() -> None:
    assert gates_of(Check()) == {}
    assert gates_of(Check(facts=0.9)) == {
        "facts": Gate("factual_completeness", 0.9, higher_is_better=True)
    }


@pytest.mark.parametrize(
    ("option", "limit", "metric", "values", "failing"),
    [
        ("kl_ratio", 1.0, "kl", {"base": 1.0, "a": 1.0009, "b": 1.1}, {"b"}),
        ("guard", 2.0, "guard_kl", {"a": 1.0, "b": 2.1, "c": math.nan}, {"b", "c"}),
        ("facts", 0.9, "factual_completeness", {"base": 0.5, "a": 0.45, "b": 0.4}, {"b"}),
        ("kl_ratio", 0.5, "kl", {"base": 1.0, "a": 0.6}, {"a"}),
    ],
)
def test_gates_compare_variants_with_the_baseline(
    option: str, limit: float, metric: str, values: dict[str, float], failing: set[str]
) -> None:
    rows = [MetricRow(name, metric, value) for name, value in values.items()]
    assert set(broken_gates(rows, Check(**{option: limit}), "base")) == failing


def test_the_baseline_can_be_named() -> None:
    rows = [MetricRow(name, "kl", value) for name, value in {"one": 9.0, "two": 1.0}.items()]
    assert broken_gates(rows, Check(kl_ratio=2.0), "base") == {}
    (failure,) = broken_gates(rows, Check(kl_ratio=2.0), baseline="two")["one"]
    assert "check.kl_ratio = 2 of two's 1" in failure


def test_a_gate_whose_metric_was_not_measured_fails_every_variant() -> None:
    rows = [MetricRow(name, "kl", 1.0) for name in ("base", "a")]
    failures = broken_gates(rows, Check(guard=1.0), "base")
    assert set(failures) == {"base", "a"}
    assert "guard_kl was not measured" in failures["a"][0]


def test_a_variant_without_the_metric_passes_where_others_have_it() -> None:
    rows = [
        MetricRow("base", "factual_completeness", 0.5),
        MetricRow("silent", "kl", 1.0),
    ]
    assert broken_gates(rows, Check(facts=1.0), "base") == {}


def test_a_figure_that_is_not_finite_fails_its_variant_without_any_gate() -> None:
    rows = [MetricRow("base", "kl", 1.0), MetricRow("a", "kl", math.inf)]
    assert broken_gates(rows, Check(), "base") == {"a": ["kl is not a number."]}


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


@pytest.mark.slow
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


@pytest.mark.slow
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
