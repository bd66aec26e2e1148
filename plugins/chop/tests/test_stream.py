"""Cutting the residual stream: a stream of low rank is found, and refitted readers help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rotdistill_chop import _stream
from torch import Tensor

from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.testing import pico_model, random_rotation

Cut = Callable[..., Weights]
Score = Callable[[Weights, Weights], float]


def edited(weights: Weights, part: str, change: Callable[[Tensor], Tensor]) -> Weights:
    """Return a view with one matrix of every layer changed, in float64 arithmetic."""
    names = [name for name in weights.entries if name.endswith(f"{part}.weight")]
    return weights.edit({n: change(weights[n].double()).to(weights.dtype) for n in names})


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_stream_of_low_rank_is_found_and_cut_without_loss(
    chop: Cut, heldout_kl: Score, tmp_path: Path, model_type: str
) -> None:
    model = pico_model(tmp_path / "model", model_type, num_hidden_layers=3)
    B = random_rotation(32, 5)[:, :24]
    weights = edited(model.weights, "embed_tokens", lambda E: E @ B @ B.T)
    for part in ("o_proj", "down_proj"):
        weights = edited(weights, part, lambda W: B @ B.T @ W)
    cut = chop(model, weights, width=24)
    assert cut.width == 24
    assert heldout_kl(cut, weights) < 1e-8
    basis = cut.lineage.basis
    assert basis is not None
    torch.testing.assert_close(basis @ basis.T, B @ B.T, rtol=0, atol=1e-4)
    narrower = chop(model, weights, width=20)
    assert heldout_kl(narrower, weights) > 1e-4


def test_refitted_readers_beat_a_bare_cut_of_the_stream(
    llama: Model, chop: Cut, heldout_kl: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    refitted = chop(llama, width=24)

    def no_correction(xx: Tensor, xy: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(xy)

    monkeypatch.setattr(_stream, "ridge", no_correction)
    bare = chop(llama, width=24)
    assert heldout_kl(refitted, llama.weights) < 0.9 * heldout_kl(bare, llama.weights)
