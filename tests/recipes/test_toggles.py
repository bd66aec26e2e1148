"""recipes/toggles.toml on a pico model: one variant per switch; exact ones score as base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rotdistill_core.evaluation.rows import overall_figures
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.store.layout import RunLayout
from rotdistill_core.testing import PicoWorkspace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
VARIANTS = [
    "base",
    "permutations",
    "permutations-rotations",
    "permutations-rotations-style",
    "style-only",
]
EXACT_VARIANTS = ["permutations", "permutations-rotations"]
METRICS = {
    "kl",
    "top1",
    "perplexity",
    "guard_kl",
    "hidden_cosine",
    "residual_rms_diff",
    "channel_rms_gap",
    "answer_chrf",
    "answer_length",
    "factual_completeness",
    "hallucination_rate",
}
LAYER_METRICS = {"hidden_cosine", "residual_rms_diff", "channel_rms_gap"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Return the run of the recipe with a pico model for both roles, texts and limits to match."""
    workspace = PicoWorkspace(tmp_path_factory.mktemp("toggles"))
    texts = workspace.texts(30, 6)
    claims = '[{"what": "a", "any": ["w1"]}]\t[{"what": "b", "any": ["w2"]}]'
    heldout = texts["heldout.tsv"].read_text(encoding="utf-8").replace("[]\t[]", claims)
    texts["heldout.tsv"].write_text(heldout, encoding="utf-8")
    model = workspace.model(num_hidden_layers=4)
    sets = [
        f"samples.index={texts['index.tsv']}",
        f"samples.style={texts['style.md']}",
        f"samples.heldout={texts['heldout.tsv']}",
        f"samples.guard={texts['guard.tsv']}",
        "samples.answer_tokens=8",
        "samples.own_answers=8",
        f"teacher.model={model}",
        f"student.model={model}",
        "chop.layers=3",
        "style.max_prompts=8",
        "check.kl_ratio=9",
        "check.guard=9",
        "check.facts=0",
    ]
    return workspace.run(ROOT / "recipes" / "toggles.toml", sets)


def test_every_variant_is_scored_by_every_metric(outcome: RunResult) -> None:
    figures = overall_figures(outcome.rows)
    assert list(figures) == VARIANTS
    for variant in VARIANTS:
        assert figures[variant].keys() >= METRICS
    layers = {row.layer for row in outcome.rows if row.metric in LAYER_METRICS and row.layer}
    assert layers == {1, 2, 3}


@pytest.mark.parametrize("variant", EXACT_VARIANTS)
def test_exact_variants_score_as_the_baseline(outcome: RunResult, variant: str) -> None:
    figures = overall_figures(outcome.rows)
    assert figures[variant]["kl"] == pytest.approx(figures["base"]["kl"], abs=1e-5)
    for metric in ("top1", *LAYER_METRICS):
        assert figures[variant][metric] == pytest.approx(figures["base"][metric], abs=1e-4)


def test_the_report_compares_each_variant_with_the_largest_that_it_contains(
    outcome: RunResult,
) -> None:
    text = (outcome.folder / RunLayout.REPORT_JSON).read_text(encoding="utf-8")
    ablations = json.loads(text)["ablations"]
    assert [line.partition(":")[0] for line in ablations] == [
        "`permutations` = `base` + permute, fold",
        "`permutations-rotations` = `permutations` + basis",
        "`permutations-rotations-style` = `permutations-rotations` + head, style",
        "`style-only` = `base` + head, style",
    ]
    exact = [line.endswith("Exact steps: nothing should change.") for line in ablations]
    assert exact == [True, True, False, False]
