"""What a capture copies and waits for, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
from rotdistill_residuals.step import Residuals

from rotdistill_core.checkpoint.models import Pair
from rotdistill_core.checkpoint.open import open_model
from rotdistill_core.forward.whole import computable
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.testing import (
    PRETENDED,
    DeviceCounters,
    count_within,
    pico_folder,
    pico_output,
    pico_samples,
    pretended_device,
)

SAMPLES = pico_samples(texts=150)
BATCHES = len(list(SAMPLES.layout.batches())) + 1  # and the shared prefix
MORE = 3
"""Layers that the deeper model has more."""


def captured(folder: Path, layers: int, free_bytes: int) -> DeviceCounters:
    """Capture a model, as teacher and student in one, and return what the device counted."""
    pico_folder(folder / "model", num_hidden_layers=layers)
    with pretended_device(free_bytes=free_bytes) as counters:
        # Only now a recipe may name the device.
        model = open_model(ModelRef(model=str(folder / "model"), device=PRETENDED))
        Residuals().capture(
            pair=Pair(model, model),
            weights=model.weights,
            samples=SAMPLES,
            out=pico_output(folder / "runs"),
            progress=lambda *_: None,
        )
    return counters


@pytest.mark.parametrize("free_bytes", [1 << 36, 0], ids=["on the device", "on the host"])
def test_a_layer_copies_and_waits_once_a_batch(tmp_path: Path, free_bytes: int) -> None:
    assert BATCHES > 2
    few = captured(tmp_path / "few", 2, free_bytes)
    many = captured(tmp_path / "many", 2 + MORE, free_bytes)

    def per_layer(name: str) -> float:
        """Return what one layer more costs, without reading its weights."""
        more, less = (
            counts.total() - count_within(counts, computable)
            for counts in (getattr(many, name), getattr(few, name))
        )
        return (more - less) / (2 * MORE)

    assert per_layer("to_device") <= BATCHES
    assert 0 < per_layer("to_host") <= BATCHES
    assert 0 < per_layer("synchronisations") <= BATCHES
    if free_bytes:  # one copy of a boundary, to be written
        costs = [per_layer(name) for name in ("to_device", "to_host", "synchronisations")]
        assert costs == [0, 1, 1]
