"""A pico model, texts, and a search for the largest change of a weight."""

from __future__ import annotations

from pathlib import Path

import pytest

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.data.packed import PackedTexts
from rotdistill_core.testing import pico_model, pico_samples


@pytest.fixture(scope="session")
def layout() -> PackedTexts:
    return pico_samples(texts=8).layout


@pytest.fixture
def llama(tmp_path: Path) -> Model:
    return pico_model(tmp_path / "llama")
