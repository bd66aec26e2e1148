"""The olmo2 table holds for its plain config; tests/architecture has every variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rotdistill_olmo2_adapter.table import OLMO2

from rotdistill_core.errors import RecipeError
from rotdistill_core.linalg.maps import Rotation
from rotdistill_core.testing import parametrize_with_checks, pico_model, random_rotation


@parametrize_with_checks(OLMO2, {"head_dim": 12})
def test_olmo2_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_only_the_head_absorbs_a_gain() -> None:
    assert {name for name, param in OLMO2.params.items() if param.gain} == {OLMO2.head}


def test_a_rotation_of_the_stream_is_refused_by_its_output_norms(tmp_path: Path) -> None:
    weights = pico_model(tmp_path / "model", "olmo2").weights
    with pytest.raises(RecipeError, match=r"4 norm gains, the first is .*post_attention_layernorm"):
        weights.fold({"residual": Rotation(random_rotation(32))})
