"""The qwen2 table against pico checkpoints of plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotdistill_qwen2_adapter.table import QWEN2, adapters

from rotdistill_core.architecture.table import Adapter
from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import ADAPTER_CHECKS, pico_folder

CHANGES: list[dict[str, object]] = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False, "num_key_value_heads": 4},
    {
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
]


def test_the_installed_adapter_is_this_one() -> None:
    assert adapters() == [QWEN2]
    assert adapter_for("qwen2") is QWEN2


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
def test_the_table_holds(
    tmp_path: Path, check: Callable[[Adapter, Path], None], changes: dict[str, object]
) -> None:
    check(QWEN2, pico_folder(tmp_path / "model", "qwen2", **changes))
