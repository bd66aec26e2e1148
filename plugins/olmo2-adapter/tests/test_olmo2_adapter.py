"""The olmo2 table against pico checkpoints of plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotdistill_olmo2_adapter.table import OLMO2

from rotdistill_core.plugin.registry import adapter_for
from rotdistill_core.testing import ADAPTER_CHECKS, pico_folder

CHANGES = [
    {"head_dim": 12, "intermediate_size": 56},
    {"intermediate_size": 40, "attention_bias": True, "tie_word_embeddings": False},
]


def test_the_installed_adapter_is_this_one() -> None:
    assert adapter_for("olmo2") is OLMO2


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
def test_the_table_holds(
    tmp_path: Path, check: Callable[..., None], changes: dict[str, object]
) -> None:
    check(OLMO2, pico_folder(tmp_path / "model", "olmo2", **changes))
