"""The pretended device computes as the CPU does, refuses what a GPU refuses, and counts."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rotdistill_core.forward.head import head_logits
from rotdistill_core.testing import (
    PRETENDED,
    DeviceCounters,
    DeviceError,
    Line,
    count_within,
    max_difference,
    pretended_device,
)

HERE = "test_pretended_device.py"


@pytest.fixture
def counters() -> Iterator[DeviceCounters]:
    with pretended_device() as found:
        yield found


def far(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    size = int(np.prod(shape))
    return torch.arange(size).reshape(shape).to(PRETENDED, dtype)


# What it computes.


def test_numbers_are_those_of_the_cpu(counters: DeviceCounters) -> None:
    torch.manual_seed(0)
    X, W = torch.randn(5, 4), torch.randn(3, 4)
    layer = nn.Linear(4, 3)
    expected = torch.softmax(layer(X) @ W, -1)
    layer.to(PRETENDED)
    found = torch.softmax(layer(X.to(PRETENDED)) @ W.to(PRETENDED), -1)
    assert found.device == torch.device(PRETENDED, 0)
    assert torch.equal(found.cpu(), expected)
    assert counters.mismatches == {}


def test_gradients_are_those_of_the_cpu(counters: DeviceCounters) -> None:
    near = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1))
    moved = copy.deepcopy(near).to(PRETENDED)
    X = torch.randn(6, 4)
    torch.autograd.backward(near(X).sum())
    torch.autograd.backward(moved(X.to(PRETENDED)).sum())
    for one, two in zip(near.parameters(), moved.parameters(), strict=True):
        assert two.grad is not None
        assert one.grad is not None
        assert torch.equal(one.grad, two.grad.cpu())


MASKS = {
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.ones(3, 3, dtype=torch.bool).tril()},
    "added": {"attn_mask": torch.tensor([0.0, -1.0, -torch.inf]).expand(3, 3)},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("trained", [False, True])
def test_attention_is_that_of_the_cpu(
    counters: DeviceCounters, mask: dict[str, Any], groups: int, trained: bool
) -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2 // groups, 3, 4)

    def attend(device: str) -> Tensor:
        there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in mask.items()}
        query, keys = q.to(device).requires_grad_(trained), k.to(device)
        attention = nn.functional.scaled_dot_product_attention
        return attention(query, keys, keys, enable_gqa=groups > 1, **there)

    found = attend(PRETENDED)
    assert found.requires_grad == trained
    torch.testing.assert_close(found.detach().cpu(), attend("cpu").detach())


FACTORIES: dict[str, Callable[[str], Tensor]] = {
    "zeros": lambda device: torch.zeros(2, 3, device=device),
    "full": lambda device: torch.full((2,), 3.0, device=device),
    "tensor": lambda device: torch.tensor([[1, 2], [3, 4]], device=device),
    "arange": lambda device: torch.arange(2, 9, 3, device=device),
    "eye": lambda device: torch.eye(3, device=device),
    "linspace": lambda device: torch.linspace(0, 1, 5, device=device),
    "tril": lambda device: torch.tril_indices(3, 3, device=device),
    "ones like": lambda device: torch.ones_like(torch.zeros(2), device=device),
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=list(FACTORIES))
def test_factories_put_tensors_on_the_device(
    counters: DeviceCounters, make: Callable[[str], Tensor]
) -> None:
    found = make(PRETENDED)
    assert found.device.type == PRETENDED
    assert torch.equal(found.cpu(), make("cpu"))


def test_views_share_what_is_written(counters: DeviceCounters) -> None:
    X = far(2, 3)
    X.view(-1)[1:3].mul_(10)
    assert X.tolist() == [[0, 10, 20], [3, 4, 5]]
    Y = far(2, 3)
    Y.t_()
    assert (Y.shape, Y.tolist()) == ((3, 2), [[0, 3], [1, 4], [2, 5]])


def test_a_parameter_takes_new_data(counters: DeviceCounters) -> None:
    layer = nn.Linear(3, 2, bias=False).to(PRETENDED)
    layer.weight.data = far(2, 3)
    assert layer.weight.requires_grad
    assert layer(far(1, 3)).tolist() == [[5.0, 14.0]]


def test_a_copy_is_a_new_tensor(counters: DeviceCounters) -> None:
    X = far(3)
    pair = copy.deepcopy([X, X])
    X.zero_()
    assert pair[0] is pair[1]
    assert pair[0].tolist() == [0, 1, 2]


def test_a_tensor_goes_to_the_meta_device(counters: DeviceCounters) -> None:
    assert far(2, 3).to("meta").shape == (2, 3)
    assert counters.mismatches == {}


# What it refuses.

REFUSED: dict[str, Callable[[], object]] = {
    "sum of two devices": lambda: far(3) + torch.ones(3),
    "product of two devices": lambda: far(3, 3) @ torch.ones(3, 3),
    "concatenation": lambda: torch.cat([far(3), torch.ones(3)]),
    "stack of scalars": lambda: torch.stack([far(3).sum(), torch.tensor(1.0)]),
    "sum into the host": lambda: torch.zeros(3).add_(far(3)),
    "scalar into the host": lambda: torch.zeros(()).add_(far(3).sum()),
    "out on the host": lambda: torch.add(far(3), 1, out=torch.zeros(3)),
    "index of the device": lambda: torch.ones(3)[far(3, dtype=torch.long)],
    "mask of the device": lambda: torch.ones(3)[far(3) > 1],
    "values of the host": lambda: far(3).index_put_((torch.tensor([1]),), torch.ones(1)),
    "values of the device": lambda: torch.ones(3).index_put_((torch.tensor([1]),), far(1)),
    "gather": lambda: far(3).gather(0, torch.tensor([1])),
    "embedding": lambda: nn.functional.embedding(torch.tensor([1]), far(3, 2)),
    "masked fill": lambda: far(3).masked_fill(torch.ones(3, dtype=torch.bool), 0),
    "mask of the attention": lambda: nn.functional.scaled_dot_product_attention(
        far(1, 1, 2, 2), far(1, 1, 2, 2), far(1, 1, 2, 2), torch.zeros(2, 2)
    ),
    "noise of the host": lambda: torch.randn(3, device=PRETENDED, generator=torch.Generator()),
    "order of the host": lambda: torch.randperm(3, device=PRETENDED, generator=torch.Generator()),
    "draws of the host": lambda: far(3).multinomial(1, generator=torch.Generator()),
    "numpy": lambda: far(3).numpy(),
    "array": lambda: np.asarray(far(3)),
    "meta": lambda: far(3) + torch.ones(3, device="meta"),
    "data of the host": lambda: setattr(far(3), "data", torch.ones(3)),
    "a layer elsewhere": lambda: nn.Linear(3, 2)(far(1, 3)),
}


@pytest.mark.parametrize("act", REFUSED.values(), ids=list(REFUSED))
def test_what_a_gpu_refuses_is_refused(counters: DeviceCounters, act: Callable[[], object]) -> None:
    line = inspect.getsourcelines(act)[1]
    with pytest.raises(DeviceError, match=rf"{HERE}:\d+: a GPU refuses") as refused:
        act()
    [message] = counters.mismatches
    assert str(refused.value) == message
    assert line <= int(message.split(":")[1]) <= line + 1


ALLOWED: dict[str, Callable[[], object]] = {
    "scalar of the host": lambda: far(3) * torch.tensor(2.0),
    "python number": lambda: far(3) * 2.0,
    "index of the host": lambda: far(3)[torch.tensor([0, 2])],
    "scalar value of the host": lambda: far(3).index_put_((torch.tensor([1]),), torch.tensor(1.0)),
    "copy to the host": lambda: torch.zeros(3).copy_(far(3)),
    "copy to the device": lambda: far(3).copy_(torch.zeros(3)),
    "numpy of a copy": lambda: far(3).numpy(force=True),
    "noise": lambda: torch.randn(3, device=PRETENDED),
}


@pytest.mark.parametrize("act", ALLOWED.values(), ids=list(ALLOWED))
def test_what_a_gpu_allows_is_allowed(counters: DeviceCounters, act: Callable[[], object]) -> None:
    act()
    assert counters.mismatches == {}


def test_without_strict_it_goes_on_and_tells() -> None:
    with pretended_device(strict=False) as counters:
        found = far(3) + torch.ones(3)
        assert found.tolist() == [1, 2, 3]
    [(message, times)] = counters.mismatches.items()
    assert (HERE in message, "aten.add.Tensor: device [3], cpu [3]" in message) == (True, True)
    assert times == 1


def test_a_device_may_lack_float64() -> None:
    with pretended_device(float64=False):
        assert far(3).sum().dtype == torch.float32
        with pytest.raises(DeviceError, match=f"{HERE}.*refuses float64"):
            far(3).double()
        with pytest.raises(DeviceError, match=f"{HERE}.*refuses float64"):
            torch.zeros(3, dtype=torch.float64, device=PRETENDED)
        assert far(3).cpu().double().tolist() == [0, 1, 2]


# What it counts.

WAITS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "item": (lambda X: X.sum().item(), 1),
    "float": (lambda X: float(X.sum()), 1),
    "int": (lambda X: int(X.sum()), 1),
    "bool": (lambda X: bool(X.any()), 1),
    "nonzero": (lambda X: X.nonzero(), 1),
    "where": (lambda X: torch.where(X > 0), 1),
    "mask": (lambda X: X[X > 1], 1),
    "values at a mask": (lambda X: X.index_put_((X > 1,), far(3)), 1),
    "one value at a mask": (lambda X: X.masked_fill_(X > 1, 0.0), 0),
    "number at a mask": (lambda X: X.__setitem__(X > 1, 0.0), 0),
    "masked select": (lambda X: X.masked_select(X > 1), 1),
    "mask of the host": (lambda X: X[torch.tensor([True, False, True, True, True])], 0),
    "tolist": (lambda X: X.tolist(), 1),
    "unique": (lambda X: X.unique(), 1),
    "unique rows": (lambda X: X[None].unique(dim=0), 1),
    "repeats": (lambda X: X.repeat_interleave(X.long()), 1),
    "repeats of known length": (lambda X: X.repeat_interleave(X.long(), output_size=10), 0),
    "equal": (lambda X: torch.equal(X, X + 1), 1),
    "cpu": (lambda X: X.cpu(), 1),
    "to cpu": (lambda X: X.to("cpu"), 1),
    "to cpu in another dtype": (lambda X: X.to("cpu", torch.float64), 1),
    "to cpu without waiting": (lambda X: X.to("cpu", non_blocking=True), 0),
    "copy": (lambda X: torch.zeros(5).copy_(X), 1),
    "copy without waiting": (lambda X: torch.zeros(5).copy_(X, non_blocking=True), 0),
    "product": (lambda X: X @ X, 0),
    "index": (lambda X: X[torch.tensor([1])], 0),
    "argmax": (lambda X: X.argmax(), 0),
}


@pytest.mark.parametrize(("act", "times"), WAITS.values(), ids=list(WAITS))
def test_waits_are_counted(
    counters: DeviceCounters, act: Callable[[Tensor], object], times: int
) -> None:
    X = far(5)
    act(X)
    assert counters.synchronisations.total() == times


COPIED: dict[str, tuple[Callable[[Tensor], object], int, int]] = {
    "to the device": (lambda _: torch.ones(3).to(PRETENDED), 1, 0),
    "to the device in another dtype": (lambda _: torch.ones(3).to(PRETENDED, torch.half), 1, 0),
    "from a list": (lambda _: torch.tensor([1, 2], device=PRETENDED), 1, 0),
    "into the device": (lambda X: X.copy_(torch.ones(5)), 1, 0),
    "a mask of the host": (lambda X: X[torch.tensor([True, False, True, True, True])], 1, 0),
    "indices of the host": (lambda X: X[None][torch.tensor([0]), torch.tensor([1])], 2, 0),
    "to the host": (lambda X: X.cpu(), 0, 1),
    "into the host": (lambda X: torch.zeros(5).copy_(X), 0, 1),
    "where it is": (lambda X: X.to(PRETENDED), 0, 0),
    "in another dtype": (lambda X: X.to(torch.half), 0, 0),
    "made there": (lambda _: torch.zeros(3, device=PRETENDED), 0, 0),
    "one number": (lambda X: X.sum().item(), 0, 0),
}


@pytest.mark.parametrize(("act", "there", "back"), COPIED.values(), ids=list(COPIED))
def test_copies_are_counted(
    counters: DeviceCounters, act: Callable[[Tensor], object], there: int, back: int
) -> None:
    X = far(5)
    before = counters.to_device.total()
    act(X)
    copied = counters.to_device.total() - before, counters.to_host.total()
    assert copied == (there, back)


DOUBLE: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "product": (lambda X: X @ X, 1),
    "conversion": (lambda X: X.float(), 0),
    "view": (lambda X: X[1:].view(1, 2), 0),
    "sum in float64": (lambda X: X.float().cumsum(0, dtype=torch.float64), 1),
    "number": (lambda X: X.select(0, 0) + 1, 0),
}


@pytest.mark.parametrize(("act", "times"), DOUBLE.values(), ids=list(DOUBLE))
def test_float64_work_is_counted(
    counters: DeviceCounters, act: Callable[[Tensor], object], times: int
) -> None:
    act(far(3, dtype=torch.float64))
    assert counters.float64_operations.total() == times


def test_counts_name_the_line(counters: DeviceCounters) -> None:
    far(3).cpu()
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    [found] = counters.to_host
    assert (found.file.rpartition("/")[2], found.line) == (HERE, line)
    assert str(Line("a.py", 3)) == "a.py:3"


def test_counts_name_the_line_of_this_program(counters: DeviceCounters) -> None:
    assert max_difference(far(3), far(3)) == 0
    [line] = counters.synchronisations
    assert line.file == "rotdistill_core/testing/compute.py"
    assert count_within(counters.synchronisations, max_difference) == 1
    assert count_within(counters.synchronisations, head_logits) == 0


def test_work_of_other_threads_is_counted(counters: DeviceCounters) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: far(3).cpu(), range(20)))
    assert counters.to_host.total() == 20


# When it is there.


def test_it_is_there_inside_of_its_context_only() -> None:
    with pretended_device():
        X = far(3)
        assert torch.get_device_module(PRETENDED).is_available()
        with pytest.raises(DeviceError, match="open already"), pretended_device():
            pass
    assert not torch.get_device_module(PRETENDED).is_available()
    assert not torch.accelerator.is_available()
    with pytest.raises(DeviceError, match="outside of its context"):
        X + X
    with pytest.raises(DeviceError, match="outside of its context"):
        torch.ones(3).to(PRETENDED)


GRADIENTS_ON_BOTH = """
import torch
from rotdistill_core.testing import pretended_device
def learn(device):
    W = torch.ones(2, device=device, requires_grad=True)
    torch.autograd.backward((W * W).sum())
    return W.grad.tolist()
assert learn("cpu") == [2, 2]
with pretended_device():
    assert learn("pretend") == [2, 2]
"""


@pytest.mark.slow
def test_gradients_may_have_been_computed_before_it_is_there() -> None:
    subprocess.run([sys.executable, "-c", GRADIENTS_ON_BOTH], check=True)


def test_counters_begin_anew() -> None:
    with pretended_device() as first:
        far(3)
    with pretended_device() as second:
        pass
    assert (first.to_device.total(), second.to_device.total()) == (1, 0)
