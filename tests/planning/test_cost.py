"""Costs are finite for every shipped step, add up, and follow the sizes of the models."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any, Literal

import pytest

from rotdistill_core import hookimpl, step
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    WIDENED_ROWS,
    Cost,
    CostContext,
    alignment_cost,
    baseline_memory,
    capture_cost,
    checkpoint_cost,
    context_after,
    default_cost,
    edit_cost,
    evaluation_cost,
    forward_cost,
    states_cost,
    step_cost,
    teacher_answers_cost,
)
from rotdistill_core.plugin.registry import STEPS, installed_plugins, step_class
from rotdistill_core.plugin.step import STAGES, validator_of

REQUIRED_OPTIONS: dict[str, dict[str, Any]] = {
    "chop": {"neurons": 16},
    "interpolation-barrier": {"between": ["variant", "student"]},
    "lm-eval": {"folder": "tasks", "tasks": ["piqa"]},
    "soups": {"ingredients": ["run:one/full"]},
    "transport": {"source": "adapter"},
}
NOT_SIZES = ("shared_files", "added_up", "gathered", "kernels", "less_disk")
SIZES = [field.name for field in fields(Cost) if field.name not in NOT_SIZES]


def shipped_steps() -> list[str]:
    steps = {name: step_class(name)[1].distribution for name in installed_plugins(STEPS)}
    return [name for name, owner in steps.items() if owner.startswith("rotdistill-")]


@step
class Priced:
    """A step that states its cost and refuses deep students."""

    use: Literal["priced"] = "priced"

    def cost(self, context: CostContext) -> Cost:
        return Cost(host_bytes=context.student.width, operations=7.0)

    def context_after(self, context: CostContext) -> CostContext:
        if context.student.depth > 2:
            raise RecipeError("too deep")
        return context.with_student(num_hidden_layers=1)

    @hookimpl
    def fold(self) -> Any: ...


@step
class Plain:
    """A step that states nothing."""

    use: Literal["plain"] = "plain"

    @hookimpl
    def style(self) -> Any: ...


@pytest.mark.parametrize("name", shipped_steps())
def test_every_shipped_step_states_a_finite_cost(name: str, pico_context: CostContext) -> None:
    options = json.dumps(REQUIRED_OPTIONS.get(name, {}))
    try:
        instance: object = validator_of(step_class(name)[0]).validate_json(options, strict=True)
    except SetupError as error:  # an optional package is not installed
        pytest.skip(str(error))
    assert states_cost(instance)
    cost = step_cost(instance, pico_context)
    sizes = {size: getattr(cost, size) for size in SIZES}
    assert all(math.isfinite(value) and value >= 0 for value in sizes.values()), sizes
    assert cost.operations > 0
    assert cost.dealt_operations <= cost.operations * (1 + 1e-9)
    assert all(math.isfinite(each) and each >= 0 for each in cost.kernels.values())
    assert sum(cost.kernels.values()) <= cost.operations * (1 + 1e-9)
    assert all(each.size > 0 and math.isfinite(each.times) for each in cost.added_up)
    assert all(each.size >= 0 and each.batches >= 0 for each in cost.gathered)
    assert cost.host_bytes + cost.device_bytes > 0
    assert all(math.isfinite(size) and size > 0 for size in cost.shared_files.values())
    assert context_after(instance, pico_context).student.parameters() > 0


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_default_cost(stage: str, pico_context: CostContext) -> None:
    cost = default_cost(stage, pico_context)
    assert cost.operations > 0
    assert cost.host_bytes > 0


def test_a_step_that_states_its_cost_has_that_cost(pico_context: CostContext) -> None:
    assert states_cost(Priced())
    assert step_cost(Priced(), pico_context) == Cost(host_bytes=32, operations=7.0)
    assert context_after(Priced(), pico_context).student.depth == 1


def test_a_step_that_states_nothing_costs_what_its_stage_costs(pico_context: CostContext) -> None:
    assert not states_cost(Plain())
    assert step_cost(Plain(), pico_context) == edit_cost(pico_context)
    stored = replace(pico_context.student, stored="bfloat16")
    edited = context_after(Plain(), replace(pico_context, student=stored))
    assert edited.student.stored == "float32"  # an edit is kept in the compute dtype


def test_two_costs_add_up_to_the_peak_of_memory_and_the_sum_of_the_rest() -> None:
    one = Cost(host_bytes=5, device_bytes=1, disk_bytes=2, operations=3, shared_files={"a": 1})
    two = Cost(host_bytes=4, device_bytes=9, disk_bytes=2, read_bytes=6, traffic_bytes=8)
    assert one + two == Cost(
        host_bytes=5,
        device_bytes=9,
        disk_bytes=4,
        operations=3,
        read_bytes=6,
        traffic_bytes=8,
        shared_files={"a": 1},
    )


def test_a_forward_pass_reads_all_layers_once(pico_context: CostContext) -> None:
    student = pico_context.student
    one, ten = forward_cost(student, 10, 4), forward_cost(student, 100, 4)
    assert one.read_bytes == ten.read_bytes == student.parameters(inside=True) * 4
    assert ten.operations == 10 * one.operations
    assert ten.host_bytes == 100 * student.width * 4


def test_a_capture_runs_the_teacher_on_all_texts(pico_context: CostContext) -> None:
    inside = pico_context.teacher.parameters(inside=True)
    none = capture_cost(pico_context, student_rows=0)
    assert none.operations == 2 * inside * pico_context.texts.total
    assert capture_cost(pico_context).operations > none.operations


def test_a_checkpoint_takes_the_bytes_of_its_dtype(pico_context: CostContext) -> None:
    parameters = pico_context.student.parameters()
    assert checkpoint_cost(pico_context, 2).disk_bytes == 2 * parameters
    assert checkpoint_cost(pico_context, 4).disk_bytes == 4 * parameters


def test_an_aligner_writes_one_rotation(pico_context: CostContext) -> None:
    assert alignment_cost(pico_context).disk_bytes == 32 * 32 * FLOAT64_BYTES


def test_a_twin_of_the_teacher_needs_no_rotations_to_be_compared(pico_context: CostContext) -> None:
    twin = replace(pico_context, same=True)
    frames = evaluation_cost(pico_context).host_bytes - evaluation_cost(twin).host_bytes
    # The sum of products and its SVD, and the widened fit rows, which are fewer than at once.
    rows = pico_context.texts.rows_of("fit")
    assert frames == (4 * 32 * 32 + rows * (32 + 32)) * FLOAT64_BYTES
    many = replace(pico_context.texts, rows={**pico_context.texts.rows, "fit": 10 * WIDENED_ROWS})
    longer = replace(pico_context, texts=many)
    frames = (
        evaluation_cost(longer).host_bytes - evaluation_cost(replace(longer, same=True)).host_bytes
    )
    assert frames == (4 * 32 * 32 + WIDENED_ROWS * (32 + 32)) * FLOAT64_BYTES


def test_a_teacher_without_questions_costs_nothing(pico_context: CostContext) -> None:
    silent = replace(pico_context.texts, questions_asked=0)
    assert teacher_answers_cost(replace(pico_context, texts=silent)) == Cost()
    assert teacher_answers_cost(pico_context).operations > 0


def test_the_baseline_grows_with_the_vocabularies(pico_context: CostContext) -> None:
    larger = pico_context.with_student(vocab_size=1064)
    assert baseline_memory(larger) - baseline_memory(pico_context) == 1000 * 600
