"""The granite table holds with neutral multipliers and with those of published models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotdistill_granite_adapter.table import GRANITE

from rotdistill_core.evaluation.rows import overall_figures
from rotdistill_core.testing import PicoWorkspace, parametrize_with_checks

MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.25,
}
STEPS = """
variants.base = []
variants.exact = ["basis", "fold"]
variants.refitted = ["basis", "fold", "refit"]
variants.head = ["basis", "fold", "refit", "head"]
step = [
    { use = "chop", layers = [0, 2] },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { id = "refit", use = "writer-refit" },
    { id = "head", use = "lm-head-ridge" },
    { use = "fidelity" },
]
"""


@parametrize_with_checks(GRANITE, {"intermediate_size": 56}, MULTIPLIERS)
def test_granite_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.slow
def test_a_whole_run_folds_refits_and_scores_with_multipliers(tmp_path: Path) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model("model", "granite", num_hidden_layers=3, **MULTIPLIERS)
    result = workspace.run(workspace.recipe(STEPS))
    figures = overall_figures(result.rows)
    assert figures["exact"]["kl"] == pytest.approx(figures["base"]["kl"], abs=1e-4)
    assert figures["refitted"]["kl"] < figures["base"]["kl"]
    assert figures["head"]["kl"] <= figures["refitted"]["kl"]
