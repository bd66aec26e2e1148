"""The phi3 table holds for its plain config, and fused tensors go through a whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotdistill_phi3_adapter.table import PHI3

from rotdistill_core.checkpoint.headers import folder_headers
from rotdistill_core.evaluation.rows import overall_figures
from rotdistill_core.testing import PicoWorkspace, parametrize_with_checks


@parametrize_with_checks(PHI3, {"intermediate_size": 56})
def test_phi3_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_a_partial_rotary_factor_leaves_no_key_gauge() -> None:
    gauges = {param.gauge.removesuffix("*") for param in PHI3.params.values()}
    assert gauges == {"", "value.{i}", "up.{i}"}


STEPS = """
variants.base = []
variants.exact = ["basis", "heads", "gauge", "fold"]
variants.full = ["basis", "fold", "refit"]
step = [
    { use = "chop", layers = 2, neurons = 40 },
    { use = "residuals" },
    { id = "basis", use = "procrustes" },
    { id = "heads", use = "hungarian-permute" },
    { id = "gauge", use = "head-gauge" },
    { id = "fold", use = "basis-fold" },
    { id = "refit", use = "writer-refit" },
    { use = "fidelity" },
]
"""


@pytest.mark.slow
def test_a_fused_checkpoint_goes_through_a_whole_run(tmp_path: Path) -> None:
    workspace = PicoWorkspace(tmp_path)
    workspace.texts()
    workspace.model("model", "phi3", num_hidden_layers=3, intermediate_size=56)
    result = workspace.run(workspace.recipe(STEPS))
    figures = overall_figures(result.rows)
    assert figures["exact"]["kl"] == pytest.approx(figures["base"]["kl"], abs=1e-4)
    names = set(folder_headers(result.checkpoints["exact"]))
    assert "model.layers.1.self_attn.qkv_proj.weight" in names
    assert not any(name.endswith("q_proj.weight") for name in names)
