"""Costs that both steps of this package share."""

from __future__ import annotations

from collections.abc import Collection

from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    SVD_OPERATIONS,
    Cost,
    CostContext,
)
from rotdistill_core.planning.shape import DTYPE_BYTES

VOCABULARY_ROWS = 8192
"""Rows of embedding and head in float64 at a time; a whole vocabulary takes gigabytes."""
ALL_GAUGES = ("value", "key", "up")


def gauge_cost(context: CostContext, gauges: Collection[str] = ALL_GAUGES) -> Cost:
    """Return the cost of solving gauges once in every layer.

    In memory are one layer of each model, and copies of the two sides of a gauge, in float64.
    """
    student, teacher = context.student, context.teacher
    width = teacher.width
    heads = student.adapter.heads(student.config)
    layers = 2 * (student.layer_parameters + teacher.layer_parameters) * FLOAT64_BYTES
    # Numbers of a layer's blocks, and operations of their inner products and solves.
    numbers = 0
    operations = 0.0
    if "value" in gauges:
        numbers += student.kv_width * heads.width
        products = 2.0 * (student.kv_width + student.query_width) * heads.width * width
        operations += products + SVD_OPERATIONS * heads.groups * heads.width**3
    if "key" in gauges:
        numbers += student.kv_width * heads.width
        operations += 24.0 * (student.kv_width + student.query_width) * width
    if "up" in gauges:
        numbers += student.neurons
        operations += 24.0 * student.neurons * width
    read = student.layer_parameters * DTYPE_BYTES[student.stored]
    read += teacher.layer_parameters * DTYPE_BYTES[teacher.stored]
    return Cost(
        host_bytes=layers,
        disk_bytes=student.depth * numbers * FLOAT64_BYTES,
        operations=student.depth * operations,
        read_bytes=student.depth * read,
    )
