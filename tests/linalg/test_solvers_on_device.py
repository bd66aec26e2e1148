"""Solves on a device with fast float64: checked against their equation, with LAPACK behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rotdistill_core.errors import SingularError
from rotdistill_core.linalg.solvers import eigh, polar, ridge, svd
from rotdistill_core.testing import PRETENDED, DeviceCounters, pretended_device

WHERE = "here"


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


M = randn(0, 6, 9)
XX = randn(1, 40, 6).T @ randn(1, 40, 6)
SOLVES: dict[str, Callable[..., Any]] = {
    "svd": lambda *device: svd(M, WHERE, *device)[1],
    "polar": lambda *device: polar(M, WHERE, *device)[0],
    "eigh": lambda *device: eigh(XX, WHERE, *device)[0],
    "ridge": lambda *device: ridge(XX, randn(2, 6, 3), 0.1, WHERE, *device),
}


@pytest.fixture
def counters() -> Iterator[DeviceCounters]:
    with pretended_device() as counters:
        yield counters


@pytest.mark.parametrize("name", SOLVES)
def test_a_device_solves_what_lapack_solves(counters: DeviceCounters, name: str) -> None:
    found = SOLVES[name](torch.device(PRETENDED))
    assert sum(counters.to_device.values()) > 0
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, SOLVES[name](), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SOLVES)
def test_slow_float64_is_left_to_the_cpu(name: str) -> None:
    with pretended_device(capability=(8, 9)) as counters:
        found = SOLVES[name](torch.device(PRETENDED))
    assert not counters.to_device
    assert torch.equal(found, SOLVES[name]())


def wrong(solve: Callable[..., Any]) -> Callable[..., Any]:
    """Return a solver whose results on the device are off by a thousandth."""

    def off(A: Tensor, *rest: Any, **options: Any) -> Any:
        made = solve(A, *rest, **options)
        if A.device.type == "cpu":
            return made
        return made * 1.001 if isinstance(made, Tensor) else tuple(part * 1.001 for part in made)

    return off


@pytest.mark.parametrize("name", SOLVES)
def test_a_wrong_solution_of_a_device_is_not_taken(
    counters: DeviceCounters, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for owner, solver in (
        (torch.linalg, "svd"),
        (torch.linalg, "eigh"),
        (torch, "cholesky_solve"),
    ):
        monkeypatch.setattr(owner, solver, wrong(getattr(owner, solver)))
    found = SOLVES[name](torch.device(PRETENDED))
    torch.testing.assert_close(found, SOLVES[name](), rtol=1e-12, atol=1e-12)


def test_a_device_that_cannot_factorise_leaves_the_verdict_to_lapack(
    counters: DeviceCounters,
) -> None:
    singular = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(SingularError, match="singular at ridge 0"):
        ridge(singular, randn(3, 3, 2), 0.0, WHERE, torch.device(PRETENDED))
