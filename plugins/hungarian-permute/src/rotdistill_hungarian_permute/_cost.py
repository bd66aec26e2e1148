"""The cost of matching heads and neurons by their activations."""

from __future__ import annotations

from dataclasses import replace

from rotdistill_core.data.splits import Split
from rotdistill_core.planning.cost import (
    ASSIGNMENT_OPERATIONS,
    FLOAT32_BYTES,
    Cost,
    CostContext,
    forward_cost,
    permutation_bytes,
)
from rotdistill_core.planning.shape import ModelShape


def activation_cost(context: CostContext, max_texts: int, within_stage: int, pairs: int) -> Cost:
    """Return the cost of two forward passes, and of an assignment for each pair of layers.

    In memory are the attention maps and neurons of the layers that may still be compared, and the
    similarities of one pair, all in float32.

    Args:
        context: the models, as an aligner sees them.
        max_texts: most fit texts that both models read.
        within_stage: layers of a stage.
        pairs: pairs of layers that are compared.
    """
    student, teacher, texts = context.student, context.teacher, context.texts
    rows = texts.rows_of(Split.FIT, limit=max_texts)
    read_texts = max(min(max_texts, texts.texts.get(Split.FIT, 0)), 1)
    own_rows = (rows - texts.prefix) / read_texts
    # Each row of a text attends to the shared prompt and to the rows of its own text.
    entries = texts.prefix**2 + (rows - texts.prefix) * (texts.prefix + own_rows)

    student_heads, teacher_heads = _query_heads(student), _query_heads(teacher)
    kept_student = min(2 * within_stage, student.depth)
    kept_teacher = min(within_stage * (1 + teacher.depth // student.depth), teacher.depth)
    kept: float = kept_student * (student_heads * entries + rows * student.neurons)
    kept += kept_teacher * (teacher_heads * entries + rows * teacher.neurons)
    # Centred copies of both sides, and maps of unit length, while a pair is compared.
    copies: float = 2 * rows * (student.neurons + teacher.neurons)
    copies += entries * (student_heads + teacher_heads)
    similarities = student.neurons * teacher.neurons

    both = forward_cost(student, rows, context.student_bytes)
    both += forward_cost(teacher, rows, context.teacher_bytes).on_teacher()
    states = rows * student.width * context.student_bytes
    states += rows * teacher.width * context.teacher_bytes
    products = 2.0 * rows * similarities + 2.0 * entries * student_heads * teacher_heads
    solve = ASSIGNMENT_OPERATIONS * min(student.neurons, teacher.neurons) ** 3
    # The maps of one text, for three layers of both models.
    samples = 3 * own_rows**2 * (student_heads + teacher_heads) * FLOAT32_BYTES
    return replace(
        both,
        host_bytes=states + (kept + copies + similarities) * FLOAT32_BYTES,
        disk_bytes=permutation_bytes(student) + samples,
        operations=both.operations + pairs * (products + solve),
    )


def _query_heads(shape: ModelShape) -> int:
    return shape.adapter.heads(shape.config).query
