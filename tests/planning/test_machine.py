"""The devices of a machine, read without torch."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import psutil
import pytest

from rotdistill_core.planning import machine
from rotdistill_core.planning.machine import HOST, Machine, this_machine

GIB = 1 << 30
TWO = Machine(ram=1, gpus=(80 * GIB, 24 * GIB), disk=1, cores=2)
NONE = Machine(ram=1, gpus=(), disk=1, cores=2)


@pytest.mark.parametrize(
    ("name", "with_two", "without"),
    [
        ("auto", "cuda:0", HOST),
        ("cpu", HOST, HOST),
        ("cuda", "cuda:0", "cuda:0"),
        ("cuda:1", "cuda:1", "cuda:1"),
        ("mps", HOST, HOST),
    ],
)
def test_a_name_stands_for_one_device(name: str, with_two: str, without: str) -> None:
    assert TWO.device_of(name) == with_two
    assert NONE.device_of(name) == without


def test_each_gpu_has_its_own_memory() -> None:
    assert TWO.gpu_memory("cuda:0") == 80 * GIB
    assert TWO.gpu_memory("cuda:1") == 24 * GIB
    assert TWO.gpu_memory("cuda:2") == 0
    assert NONE.gpu_memory("cuda:0") == 0


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, (81559 << 20, 24564 << 20)),
        ("1", (24564 << 20,)),
        ("1,0", (24564 << 20, 81559 << 20)),
        ("", ()),
        ("7", ()),
        ("0,7,1", (81559 << 20,)),
        ("GPU-9b", (24564 << 20,)),
        ("GPU-9b01,GPU-8a2f", (24564 << 20, 81559 << 20)),
        ("GPU-", ()),
        ("MIG-3c", (81559 << 20,)),
    ],
)
def test_gpus_are_counted_as_cuda_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, visible: str | None, gpus: tuple[int, ...]
) -> None:
    answer = SimpleNamespace(stdout="GPU-8a2f, 81559\nGPU-9b01, 24564\n")
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine._gpu_memories() == gpus


def test_a_gpu_that_states_no_memory_has_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(stdout="GPU-8a2f, [N/A]\nGPU-9b01, 24564\n")
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine._gpu_memories() == (psutil.virtual_memory().total, 24564 << 20)


def test_a_machine_without_the_tool_has_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert this_machine(tmp_path_factory.mktemp("runs")).gpus == ()
