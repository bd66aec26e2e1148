"""The llama table against pico checkpoints of plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotdistill_llama_adapter.table import LLAMA, adapters

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import ADAPTER_CHECKS, pico_folder

CHANGES: list[dict[str, object]] = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False, "attention_bias": True},
    {"mlp_bias": True, "head_dim": 12, "num_key_value_heads": 1},
]


def test_the_installed_adapter_is_this_one() -> None:
    assert adapters() == [LLAMA]
    assert adapter_for("llama") is LLAMA


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
def test_the_table_holds(
    tmp_path: Path, check: Callable[[Adapter, Path], None], changes: dict[str, object]
) -> None:
    check(LLAMA, pico_folder(tmp_path / "model", "llama", **changes))
