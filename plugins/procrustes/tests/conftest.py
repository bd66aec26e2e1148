"""A pico model and its texts; generated rows with known faults, and their sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rotdistill_core.alignment.streams import StreamSums
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.data.packed import Samples
from rotdistill_core.linalg.paired_sums import PairedSums
from rotdistill_core.testing import pico_model, pico_samples, random_rotation


@pytest.fixture
def samples() -> Samples:
    return pico_samples()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Return a model of 3 layers."""
    return pico_model(tmp_path / "model", num_hidden_layers=3)


@pytest.fixture(scope="session")
def planted_rows() -> Callable[..., torch.Tensor]:
    """Return a maker of rows whose spectrum falls 30-fold, in a random basis.

    Kinds: `plain`, `rank-deficient`, `few rows`, `repeated` (two repeated variances), `constant
    channel`, `duplicated channel`, `shifted`.
    """

    def make(kind: str, n: int, d: int, seed: int) -> torch.Tensor:
        n = d - 2 if kind == "few rows" else n
        generator = torch.Generator().manual_seed(seed)
        Z = torch.randn(n, d, dtype=torch.float64, generator=generator)
        spread = torch.logspace(0, -1.5, d, dtype=torch.float64)
        if kind == "rank-deficient":
            spread[d // 2 :] = 0
        if kind == "repeated":
            spread = torch.where(torch.arange(d) < d // 2, 1.0, 0.3).double()
            Z = torch.linalg.qr(Z).Q * n**0.5
        X = (Z * spread) @ random_rotation(d, seed)
        if kind == "constant channel":
            X[:, 1] = 0.7
        if kind == "duplicated channel":
            X[:, 1] = X[:, 0]
        return X + 2.0 if kind == "shifted" else X

    return make


@pytest.fixture(scope="session")
def sums_of() -> Callable[..., StreamSums]:
    """Return a function that adds up paired rows; the null pairs rows half of all apart."""

    def add_up(S: torch.Tensor, T: torch.Tensor, chunk: int = 10**6) -> StreamSums:
        shuffled = T.roll(len(T) // 2, 0)
        sums = PairedSums(S.shape[1], T.shape[1], 1e9, shuffled=True, squares=True)
        for part in zip(S.split(chunk), T.split(chunk), shuffled.split(chunk), strict=True):
            sums.add(*part)
        return StreamSums.of([sums.value()])

    return add_up
