"""The qwen3 table against pico checkpoints of plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotdistill_qwen3_adapter.table import QWEN3, adapters

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import ADAPTER_CHECKS, pico_folder

CHANGES: list[dict[str, object]] = [
    {"head_dim": 12, "intermediate_size": 56},
    {"head_dim": 6, "tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 1},
    {"head_dim": 12, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
]


def test_the_installed_adapter_is_this_one() -> None:
    assert adapters() == [QWEN3]
    assert adapter_for("qwen3") is QWEN3


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
def test_the_table_holds(
    tmp_path: Path, check: Callable[[Adapter, Path], None], changes: dict[str, object]
) -> None:
    check(QWEN3, pico_folder(tmp_path / "model", "qwen3", **changes))
