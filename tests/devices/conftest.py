"""Whole pico recipes on the pretended device, and the same recipes on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.testing import PRETENDED, DeviceCounters, PicoWorkspace, pretended_device

CPU = "cpu"
TOLERANCE = 1e-5


class DeviceRun(NamedTuple):
    """A finished run, and what its device counted."""

    result: RunResult
    counters: DeviceCounters


@dataclass(frozen=True)
class Devices:
    """A workspace whose recipes run on a device of choice; all share one folder of runs."""

    workspace: PicoWorkspace

    def run(
        self,
        steps: str,
        *,
        teacher: str,
        student: str,
        dtype: str = "float32",
        on: tuple[str, str] = (PRETENDED, PRETENDED),
        tables: str = "",
        fresh: bool = False,
        **device: Any,
    ) -> DeviceRun:
        """Carry out a recipe, strictly.

        Args:
            steps: TOML of the steps and variants.
            teacher, student: folders of the models.
            dtype: dtype in which both compute.
            on: devices of teacher and student.
            tables: further keys.
            fresh: reuse nothing that an earlier run made.
            device: what the device is like, see `pretended_device`.
        """
        settings = [
            'samples.guard = "texts/guard.tsv"',
            "samples.own_answers = 4",
            f'teacher.device = "{on[0]}"',
            f'student.device = "{on[1]}"',
            f'teacher.dtype = "{dtype}"',
            f'student.dtype = "{dtype}"',
            tables,
        ]
        recipe = self.workspace.recipe(
            steps, teacher=teacher, student=student, tables="\n".join(settings)
        )
        with pretended_device(**device) as counters:
            result = self.workspace.run(recipe, fresh=fresh)
        assert not counters.mismatches, "an error of the device was caught"
        return DeviceRun(result, counters)

    def differences_from_cpu(self, steps: str, **settings: Any) -> list[str]:
        """Carry out a recipe in float32 on the device and on the CPU.

        Returns:
            Every metric and note that differs.
        """
        far = self.run(steps, **settings)
        assert used_the_device(far.counters)
        near = self.run(steps, **settings, on=(CPU, CPU))
        assert not used_the_device(near.counters)
        return differences(figures(far.result), figures(near.result))


def used_the_device(counters: DeviceCounters) -> bool:
    """Whether tensors went there and came back."""
    return bool(counters.to_device and counters.to_host)


def figures(result: RunResult) -> dict[str, object]:
    """Return all numbers and words of a run by name, except for times."""
    found: dict[str, object] = {}
    for row in result.rows:
        if "seconds" not in row.metric:
            found[" ".join(map(str, row._replace(value=0.0, n=0)))] = row.value
    for (variant, step), done in result.steps.items():
        for path, value in leaves(done.notes):
            found[f"{variant} {step} {path}"] = value
    return found


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the innermost values of nested notes, and where they are."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for k, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{k}")
    else:
        yield path, value


def differences(far: dict[str, object], near: dict[str, object]) -> list[str]:
    """Return the names under which two runs have other figures."""
    return [
        f"{name}: {far.get(name)} on the device, {near.get(name)} on the CPU"
        for name in sorted(far.keys() | near.keys())
        if not alike(far.get(name), near.get(name))
    ]


def alike(far: object, near: object) -> bool:
    """Whether two figures agree."""
    if isinstance(far, float) and isinstance(near, float):
        both_nan = math.isnan(far) and math.isnan(near)
        return both_nan or math.isclose(far, near, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return far == near


@pytest.fixture(scope="session")
def devices(make_workspace: Callable[..., PicoWorkspace]) -> Devices:
    """A workspace with few short texts and some models; its runs share what they made."""
    return with_models(make_workspace())


@pytest.fixture
def own_devices(make_workspace: Callable[..., PicoWorkspace]) -> Devices:
    """The same in a folder in which nothing has run yet."""
    return with_models(make_workspace())


def with_models(workspace: PicoWorkspace) -> Devices:
    """Write texts and models.

    `teacher` is wider and deeper than `student`; `twin` has the student's shape; `deep` has three
    layers.
    """
    workspace.texts(blurbs=10, questions=2)
    workspace.model(
        "teacher", seed=1, hidden_size=48, num_hidden_layers=3, tie_word_embeddings=False
    )
    workspace.model("student", seed=2)
    workspace.model("twin", seed=3)
    workspace.model("deep", seed=4, num_hidden_layers=3)
    return Devices(workspace)
