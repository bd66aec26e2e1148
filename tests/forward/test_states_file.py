"""States in a file are a tensor like any other, and leave nothing behind."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from rotdistill_core.errors import SetupError
from rotdistill_core.forward.layerwise import LayerwiseForward
from rotdistill_core.forward.states_file import tensor_in_file
from rotdistill_core.testing import pico_model, pico_samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_in_a_file_keeps_what_is_written_and_its_file_has_no_name(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    states = tensor_in_file(tmp_path / "run", (700, 32), dtype)
    assert (states.shape, states.dtype) == ((700, 32), dtype)
    assert not states.any()
    rows = torch.tensor([699, 3])
    states[rows] = torch.ones(2, 32, dtype=dtype)
    assert states.sum() == 64
    assert list((tmp_path / "run").iterdir()) == []
    assert tensor_in_file(tmp_path, (0, 32), dtype).shape == (0, 32)


def test_a_full_disk_is_said_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(SetupError, match="cannot be written"):
            tensor_in_file(tmp_path, (2**19, 4), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_pass_has_the_same_bits_from_memory_and_from_a_file(tmp_path: Path) -> None:
    model, layout = pico_model(tmp_path / "model"), pico_samples(texts=30).layout
    passes = [
        LayerwiseForward(model.weights, layout, model.device, torch.float32, folder=folder)
        for folder in (None, tmp_path / "run")
    ]
    for each in passes:
        for _ in each:
            each.run()
    assert torch.equal(passes[0].states, passes[1].states)
