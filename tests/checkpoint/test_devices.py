"""The torch device that a recipe names."""

from __future__ import annotations

import pytest
import torch

from rotdistill_core.checkpoint.devices import resolve_device
from rotdistill_core.errors import RecipeError, SetupError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with so many GPUs."""
    count = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "name", "device"),
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
    indirect=["gpus"],
)
def test_names_become_devices(gpus: None, name: str, device: str) -> None:
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "name", "remedy"),
    [
        (0, "cuda", 'torch sees no GPU here. .* write device = "cpu" or "auto"'),
        (0, "cuda:1", "torch sees no GPU here"),
        (2, "cuda:2", "there is no such GPU; torch sees cuda:0, cuda:1"),
        (0, "mps", 'no Apple GPU; write "cpu"'),
    ],
    indirect=["gpus"],
)
def test_a_missing_device_is_named_with_what_is_there(gpus: None, name: str, remedy: str) -> None:
    with pytest.raises(SetupError, match=remedy) as caught:
        resolve_device(name)
    assert f'device = "{name}"' in str(caught.value)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"device: write .* \(it is 'tpu'\)"):
        resolve_device("tpu")
