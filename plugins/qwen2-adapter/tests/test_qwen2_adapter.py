"""The qwen2 table holds for its plain config; tests/architecture has every variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rotdistill_qwen2_adapter.table import QWEN2

from rotdistill_core.testing import parametrize_with_checks


@parametrize_with_checks(QWEN2)
def test_qwen2_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_only_queries_keys_and_values_have_a_bias() -> None:
    biases = {name.split(".")[-2] for name in QWEN2.params if name.endswith(".bias")}
    assert biases == {"q_proj", "k_proj", "v_proj"}
