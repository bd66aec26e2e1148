"""The llama table holds for its plain config; tests/architecture has every variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rotdistill_llama_adapter.table import LLAMA, adapters

from rotdistill_core.testing import parametrize_with_checks


@parametrize_with_checks(LLAMA)
def test_llama_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


def test_only_llama_is_offered() -> None:
    assert adapters() == [LLAMA]
    assert LLAMA.model_types == ("llama",)
