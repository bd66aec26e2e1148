"""The smollm3 table holds where single layers have no rotary positions, or a window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotdistill_smollm3_adapter.table import SMOLLM3

from rotdistill_core.testing import parametrize_with_checks

FULL, SLIDING = "full_attention", "sliding_attention"


@parametrize_with_checks(
    SMOLLM3,
    {"no_rope_layers": [0, 1], "intermediate_size": 56},
    {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
)
def test_smollm3_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize(
    ("given", "turns", "types"),
    [
        ({}, [1, 1, 1, 0, 1], [FULL] * 5),
        ({"no_rope_layer_interval": 2}, [1, 0, 1, 0, 1], [FULL] * 5),
        (
            {"no_rope_layers": [0, 0, 1, 1, 1], "use_sliding_window": True, "sliding_window": 7},
            [0, 0, 1, 1, 1],
            [SLIDING, SLIDING, FULL, FULL, FULL],
        ),
        ({"use_sliding_window": True}, [1, 1, 1, 0, 1], [FULL] * 5),
    ],
    ids=str,
)
def test_lists_of_a_silent_config_are_those_of_its_class(
    given: dict[str, object], turns: list[int], types: list[str]
) -> None:
    completed = SMOLLM3.completed({"num_hidden_layers": 5, **given})
    assert (completed["no_rope_layers"], completed["layer_types"]) == (turns, types)
