"""The cost of a cut: the search for layers, the trials of `keep_fraction`, and the cut itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from rotdistill_core.data.splits import Split
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    Cost,
    CostContext,
    Kernel,
    converted_bytes,
    forward_cost,
)
from rotdistill_core.planning.shape import DTYPE_BYTES, ModelShape

if TYPE_CHECKING:
    from rotdistill_chop.step import Chop

FIT_ROWS = 2048
"""Largest number of rows of the small refit."""
MAX_TRIALS = 7
"""Largest number of splits: five of depth, two of width."""
DEPTH_TRIALS = 5
"""Largest number of splits between depth and neurons."""
KL_COPIES = 5
"""Copies of the logits of all rows that a KL holds: both models' log-probabilities, those of the
reference, and temporaries."""


class Searches(NamedTuple):
    """The searches for layers that a step makes."""

    max_cut: int
    """Largest number of layers that are cut."""
    number: int
    """How often layers are searched for."""


def chop_cost(step: Chop, context: CostContext) -> Cost:
    """Return the cost of choosing the layers, of the trials, and of the cut."""
    cost = search_cost(step, context)
    if step.keep_fraction is not None:
        cost += trials_cost(step, context)
    if step.edits_weights():
        cost += cut_cost(step, context)
    return cost


def fewest_layers(keep_fraction: float, depth: int) -> int:
    """Return the fewest layers that a share of the parameters is tried at."""
    return min(depth, max(2, math.ceil(keep_fraction * depth - 0.05)))


def searches(step: Chop, depth: int) -> Searches:
    """Return the searches for layers; a list, one layer, or all of them need none."""
    if step.keep_fraction is not None:
        max_cut = depth - fewest_layers(step.keep_fraction, depth)
        count = min(max_cut, DEPTH_TRIALS - 1)
    else:
        layers = step.layers if isinstance(step.layers, int) else depth
        max_cut = max(depth - layers, 0) if layers >= 2 else 0
        count = min(max_cut, 1)
    # A search by KL finds the layers of all smaller cuts as well.
    return Searches(max_cut, min(count, 1) if step.criterion == "kl" else count)


def search_cost(step: Chop, context: CostContext) -> Cost:
    """Return the cost of choosing layers by angle, in one pass, or by KL."""
    student, texts, number = context.student, context.texts, context.student_bytes
    max_cut, number_of_searches = searches(step, student.depth)
    if not number_of_searches:
        return Cost()
    if step.criterion == "angle":
        rows = texts.rows_of(Split.FIT, limit=step.max_angle_texts)
        forward = forward_cost(student, rows, number)
        return replace(forward, host_bytes=2 * forward.host_bytes).repeated(number_of_searches)

    # A dynamic programme: up to `max_cut` streams go to the end from every boundary.
    rows = min(texts.rows_of(Split.VALIDATION), step.max_kl_rows)
    forward = forward_cost(student, rows, number)
    passes = max_cut * student.depth**2 / 2
    kl = student.depth * max_cut * 2.0 * rows * student.vocab * student.width
    layer_bytes = student.layer_parameters * DTYPE_BYTES[student.stored]
    streams = 2 * (max_cut + 1) * rows * student.width * number
    head = student.vocab * student.width
    walked = forward.work_only().repeated(passes / student.depth)
    return replace(
        walked,
        host_bytes=streams + _kl_bytes(context, rows) + head * converted_bytes(student, number),
        device_bytes=forward.device_bytes,
        operations=walked.operations + kl,
        activations=walked.activations
        + float(student.depth * max_cut * KL_COPIES * rows) * student.vocab,
        read_bytes=layer_bytes * student.depth**2 / 2 + head * DTYPE_BYTES[student.stored],
    )


def _kl_bytes(context: CostContext, rows: int) -> float:
    """Return the memory of a KL over all its rows at once."""
    return float(KL_COPIES * rows * context.student.vocab * context.student_bytes)


def trials_cost(step: Chop, context: CostContext) -> Cost:
    """Return the cost of all trials of `keep_fraction`.

    A trial cuts, and refits each writer in a pass of its own before its layer goes on. The streams
    of the uncut student at all boundaries stay in memory.
    """
    student, texts, number = context.student, context.texts, context.student_bytes
    scored = min(texts.rows_of(Split.VALIDATION), step.max_kl_rows)
    rows = min(texts.rows_of(Split.FIT), FIT_ROWS) + scored
    forward = forward_cost(student, rows, number)
    inputs = [student.neurons, student.query_width]
    passes = 1 + MAX_TRIALS * (2 + len(inputs))
    width = student.width
    refits = sum(2.0 * rows * n * (n + width) + n**3 / 3 + 2.0 * n**2 * width for n in inputs)
    targets = (student.depth + 1) * rows * width * number
    largest = max(inputs)
    moments = (3 * largest**2 + 3 * largest * width) * FLOAT64_BYTES
    kl = 2.0 * scored * student.vocab * width
    one_cut = _cut_operations(student, rows, student.neurons, student.query_width)
    cost = forward.repeated(passes)
    solved = MAX_TRIALS * student.depth * sum(n**3 / 3 + 2.0 * n**2 * width for n in inputs)
    return replace(
        cost,
        kernels={**cost.kernels, Kernel.SOLVES: solved},
        host_bytes=forward.host_bytes + targets + max(moments, _kl_bytes(context, scored)),
        operations=cost.operations + MAX_TRIALS * (student.depth * refits + one_cut + kl),
    )


def cut_cost(step: Chop, context: CostContext) -> Cost:
    """Return the cost of cutting stream, heads and neurons, and refitting what is left.

    Only layers that stay are refitted.
    """
    texts, number = context.texts, context.student_bytes
    depth = min(step.requested_sizes().get("layers", context.student.depth), context.student.depth)
    student = context.student.changed(**{context.student.adapter.depth_key: depth})
    rows = min(texts.rows_of(Split.FIT), step.max_fit_rows)
    forward = forward_cost(student, rows, number)
    neurons = student.neurons if step.neurons or step.keep_fraction else 0
    queries = student.query_width if step.kv_heads or step.keep_fraction else 0
    # Principal directions and readers take a pass each, heads and neurons one together.
    passes = 2 * bool(step.width) + bool(neurons or queries)
    cost = forward.repeated(passes)
    memory = forward.host_bytes
    operations = cost.operations + _cut_operations(student, rows, neurons, queries)
    if neurons or queries:
        memory += 8 * max(neurons, queries) ** 2 * FLOAT64_BYTES
    if step.width:
        # The stream before and after the norm, in both bases, in float64.
        memory += 4 * rows * student.width * FLOAT64_BYTES
        norm = 8.0 * rows * student.width**2 + student.width**3
        operations += 2 * student.depth * norm
    # Readers and writers that were solved stay in memory.
    solved = student.depth * (neurons + queries) * student.width * number
    if step.width:
        solved += student.parameters(inside=True) * FLOAT64_BYTES
    return replace(
        cost,
        host_bytes=memory + rows * student.width * number + solved,
        disk_bytes=step.shape_after(context.student).parameters() * number,
        operations=operations,
    )


def _cut_operations(student: ModelShape, rows: int, neurons: int, queries: int) -> float:
    """Return the operations of moments and of the rounds in which blocks of all layers go.

    Cholesky, inverse and the updates of a shrinking inverse take about 5 n^3 together.
    """
    per_layer = sum(2.0 * rows * n**2 + 5.0 * n**3 for n in (neurons, queries))
    return student.depth * per_layer
