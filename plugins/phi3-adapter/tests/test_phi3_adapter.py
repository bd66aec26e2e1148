"""The phi3 table against pico checkpoints of plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotdistill_phi3_adapter.table import PHI3

from rotdistill_core.checkpoint.headers import folder_headers
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import ADAPTER_CHECKS, pico_folder, pico_head, pico_texts, run_recipe

CHANGES = [
    {"head_dim": 12, "intermediate_size": 56, "tie_word_embeddings": False},
    {"intermediate_size": 40, "num_key_value_heads": 4},
]


def test_the_installed_adapter_is_this_one() -> None:
    assert adapter_for("phi3") is PHI3


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
def test_the_table_holds(
    tmp_path: Path, check: Callable[..., None], changes: dict[str, object]
) -> None:
    check(PHI3, pico_folder(tmp_path / "model", "phi3", **changes))


RECIPE = (
    pico_head()
    + """
[[step]]
use = "chop"
layers = 2
neurons = 40
[[step]]
use = "residuals"
[[step]]
id = "basis"
use = "procrustes"
[[step]]
id = "heads"
use = "hungarian-permute"
[[step]]
id = "gauge"
use = "head-gauge"
[[step]]
id = "fold"
use = "basis-fold"
[[step]]
id = "refit"
use = "writer-refit"
[[step]]
use = "fidelity"
[variants]
base = []
exact = ["basis", "heads", "gauge", "fold"]
full = ["basis", "fold", "refit"]
"""
)


def test_a_fused_checkpoint_goes_through_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pico_folder(tmp_path / "model", "phi3", num_hidden_layers=3, intermediate_size=56)
    pico_texts(tmp_path / "texts")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    made = run_recipe(tmp_path / "recipe.toml")
    kl = {
        row.variant: row.value
        for row in made.rows
        if row.metric == "kl" and row.language is None and row.text is None
    }
    assert kl["exact"] == pytest.approx(kl["base"], abs=1e-4)
    names = set(folder_headers(made.checkpoints["exact"]))
    assert "model.layers.1.self_attn.qkv_proj.weight" in names
    assert not any(name.endswith("q_proj.weight") for name in names)
