"""The cost of a fold: its edit, its certificate, and the teacher's principal frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rotdistill_core.data.batching import LOGIT_ROWS
from rotdistill_core.data.splits import Split
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    SVD_OPERATIONS,
    Cost,
    CostContext,
    Kernel,
    products,
    training_activations,
)
from rotdistill_core.planning.shape import ModelShape

if TYPE_CHECKING:
    from rotdistill_basis_fold.step import BasisFold

FOLDED_TWICE = (
    "basis-fold: a step before has folded the student already, and all maps found so far would be "
    "folded once more. Let all aligners go before one fold."
)
FRAME_ROWS = 4096
"""Rows of each boundary that the teacher's principal frame is computed from."""
RETURNED_BYTES = 32 << 20
"""Freed blocks of so many bytes glibc always gives back; of smaller ones it learns to keep them
(mallopt(3), M_MMAP_THRESHOLD)."""
EXACT_READS = 5
"""How often a certificate reads each folded weight: to store it, for two passes, and to unfold it
and fold it before that."""


def fold_cost(step: BasisFold, context: CostContext, after: ModelShape) -> Cost:
    """Return the cost of a fold.

    Args:
        step: the options.
        context: the models, as an exact fold sees them.
        after: the student after the fold.
    """
    student = context.student
    rotated = step.rotates_stream(context)
    reads = EXACT_READS if step.exact else 1
    # A weight that is read is computed: inside layers only, where the stream stays.
    turned = after.parameters() if rotated else after.parameters(inside=True)
    rotation = after.width * student.width * FLOAT64_BYTES if rotated else 0
    # `block` computes all its weights at once; an exact fold computes each when it is read.
    held = 0 if step.exact else student.parameters(inside=True) * FLOAT64_BYTES
    operations = 2.0 * reads * turned * student.width
    cost = Cost(
        host_bytes=held,
        device_bytes=2.5 * after.layer_parameters * FLOAT64_BYTES,
        disk_bytes=_stored_parameters(step, after) * context.student_bytes + rotation,
        operations=operations,
        kernels=products(operations, FLOAT64_BYTES),
        read_bytes=reads * student.bytes,
    )
    if step.exact:
        cost += certificate_cost(context, after)
    if rotated and step.mode == "canonical":
        cost += frame_cost(context)
    return cost


def _stored_parameters(step: BasisFold, after: ModelShape) -> int:
    """Return how many parameters are stored anew; `block` edits those inside layers alone."""
    return after.parameters(inside=None if step.exact else True)


def certificate_cost(context: CostContext, after: ModelShape) -> Cost:
    """Return the cost of comparing both models on two validation texts, in float64 and float32.

    In memory is one head in float64 while the other is folded, or both with blocks of logits; and
    what the walks through the layers leave.
    """
    student, texts = context.student, context.texts
    rows = texts.rows_of(Split.VALIDATION, limit=2)
    heads = student.vocab * (student.width + after.width) * FLOAT64_BYTES
    logits = 8 * min(LOGIT_ROWS, rows) * student.vocab * FLOAT64_BYTES
    numbers = student.parameters(inside=True) + after.parameters(inside=True)
    numbers += student.vocab * (student.width + after.width)
    return Cost(
        host_bytes=max(1.5 * heads, heads + logits) + unreturned_bytes(after),
        operations=2.0 * 2 * numbers * rows,
        kernels=products(2.0 * numbers * rows, FLOAT64_BYTES),
        activations=4 * training_activations(student, rows, 1),
        layer_calls=4 * student.depth,
        read_bytes=3 * student.bytes,
    )


def unreturned_bytes(shape: ModelShape) -> float:
    """Return the bytes of layers in float64 that stay with the process after a walk through them.

    One layer is alive at a time, but the C library gives only large blocks back to the system, and
    was seen to keep about as much as all layers together.
    """
    matrices = [(3, shape.neurons), (2, shape.query_width), (2, shape.kv_width)]
    sizes = [(count, width * shape.width * FLOAT64_BYTES) for count, width in matrices]
    return float(shape.depth * sum(count * size for count, size in sizes if size < RETURNED_BYTES))


def frame_cost(context: CostContext) -> Cost:
    """Return the cost of the principal frame: moments of the teacher's captured stream."""
    student, teacher, texts = context.student, context.teacher, context.texts
    # Every n-th row is taken, so up to twice as many.
    rows = min(texts.rows_of(Split.FIT), 2 * FRAME_ROWS)
    boundaries = teacher.depth + 1
    captured = rows * teacher.width
    square = teacher.width**2
    made = 2.0 * boundaries * rows * square
    solved = 2 * SVD_OPERATIONS * teacher.width**3
    return Cost(
        host_bytes=(3 * captured + 4 * square + 3 * student.width * teacher.width) * FLOAT64_BYTES,
        operations=made + 2.0 * student.width**2 * teacher.width + solved,
        kernels={Kernel.FLOAT64: made, Kernel.DECOMPOSITIONS: solved},
        read_bytes=boundaries * captured * context.teacher_bytes,
    )
