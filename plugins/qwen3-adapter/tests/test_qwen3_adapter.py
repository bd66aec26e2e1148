"""The qwen3 table holds for its plain config; tests/architecture has every variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rotdistill_qwen3_adapter.table import QWEN3

from rotdistill_core.testing import parametrize_with_checks


@parametrize_with_checks(QWEN3, {"head_dim": 12})
def test_qwen3_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_normed_queries_and_keys_have_no_gauge() -> None:
    gauges = {param.gauge.removesuffix("*") for param in QWEN3.params.values()}
    assert gauges == {"", "value.{i}", "up.{i}"}


def test_layer_types_of_a_silent_config_follow_the_sliding_window() -> None:
    config = {"num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 1}
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    assert QWEN3.completed(config)["layer_types"] == types
