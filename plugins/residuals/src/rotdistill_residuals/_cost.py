"""The cost of a capture of rows, and of one of sums."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING

from rotdistill_core.data.batching import BATCH_TOKENS, BLOCK_TEXTS
from rotdistill_core.data.splits import Split
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    MOMENT_ROWS,
    Added,
    Cost,
    CostContext,
    Gathered,
    capture_cost,
    forward_cost,
    shard_bytes,
)
from rotdistill_core.planning.shape import DTYPE_BYTES, ModelShape
from rotdistill_core.planning.text_counts import TextCounts

if TYPE_CHECKING:
    from rotdistill_residuals.step import Residuals

LIMBS = 2
"""Integers of an entry of a sum while terms are added, each as large as a float64."""
COMMIT_BLOCKS = 8
"""Blocks of each process after which sums are added up and committed."""
LESS_DISK = 'student_texts = 48 (alignment needs few), or store = "moments"'
"""What makes a capture of rows smaller."""
TEMPORARIES = 5
"""Copies of the largest product while it is added to its sum."""


def rows_cost(step: Residuals, context: CostContext) -> Cost:
    """Return the cost of capturing the rows of the context's texts.

    Runs under one folder share the shards of the teacher and of an anchor.
    """
    student, teacher, texts = context.student, context.teacher, context.texts
    rows = texts.rows_of(Split.FIT, Split.VALIDATION, limit=step.student_texts)
    student_number = DTYPE_BYTES.get(step.dtype, context.student_bytes)
    teacher_number = DTYPE_BYTES.get(step.dtype, context.teacher_bytes)
    read = texts.as_teacher_reads
    inner_rows = read.total if step.keeps_all_rows else _inner_rows(step, read)
    teacher_shards = float(shard_bytes(teacher, inner_rows, teacher_number))
    # Of the other rows the final states are kept.
    teacher_shards += (read.total - inner_rows) * teacher.width * teacher_number
    student_shards = shard_bytes(student, rows, student_number)
    control_shards = teacher_shards if step.control != "none" else 0
    kept = (step.dtype, step.store, step.keeps_all_rows or step.student_texts)
    shared: dict[Hashable, float] = {("teacher states", *kept): teacher_shards}
    anchor_states = ("anchor states", *kept, step.student_texts)
    if context.anchor:
        shared[anchor_states] = shard_bytes(context.anchor, rows, student_number)
    return replace(
        capture_cost(context, student_rows=rows).dealt(),
        gathered=tuple(
            Gathered(size, -(-count // BATCH_TOKENS))
            for size, count in (
                (teacher_shards, texts.as_teacher_reads.total),
                (student_shards, rows),
                (shared.get(anchor_states, 0), rows),
            )
        ),
        disk_bytes=student_shards + control_shards,
        shared_files=shared,
        less_disk=LESS_DISK if step.keeps_all_rows and step.control == "none" else "",
    )


def _inner_rows(step: Residuals, texts: TextCounts) -> int:
    """Return the teacher's rows that are kept at boundaries before the last, too."""
    fitted = (Split.FIT, Split.VALIDATION)
    held_out = [split for split in Split if not split.outside_domain and split not in fitted]
    sample = texts.sampled.texts_of(*fitted)
    limit = None if step.student_texts is None else max(step.student_texts, sample)
    # Both counts have the shared prompt.
    return texts.rows_of(*fitted, limit=limit) + texts.rows_of(*held_out) - texts.prefix


def moments_cost(step: Residuals, context: CostContext) -> Cost:
    """Return the cost of capturing the rows of a sample, and the sums of all texts to fit on.

    Memory and disk are those of the sums, of the sample and of one block, whatever the number of
    texts. On disk are the sums, and what was begun of them.
    """
    sampled = replace(context, texts=context.texts.sampled)
    cost = rows_cost(step, sampled)
    for partner in filter(None, (context.teacher, context.anchor)):
        cost += _sums_cost(step, context, partner)
    return cost


def triangle_entries(width: int) -> int:
    """Return the entries of a symmetric matrix that are kept."""
    return width * (width + 1) // 2


def _sums_cost(step: Residuals, context: CostContext, partner: ModelShape) -> Cost:
    """Return the cost of the sums of the student with one partner."""
    student, texts = context.student, context.texts
    limit = step.student_texts
    share = min(1.0, limit / max(texts.texts_of(Split.FIT, Split.VALIDATION), 1)) if limit else 1.0
    fit_texts = max(1, round(share * texts.texts_of(Split.FIT)))
    rows = round(share * texts.rows_of(Split.FIT))
    blocks = -(-fit_texts // BLOCK_TEXTS)
    block_rows = min(rows, texts.rows_of(Split.FIT, limit=BLOCK_TEXTS))

    boundaries = student.depth + 1
    kinds = 2 if context.same or partner is context.anchor else 3
    cross = kinds * student.width * partner.width
    squares = triangle_entries(student.width) + triangle_entries(partner.width)
    entries = boundaries * (cross + squares)
    products = boundaries * (cross + student.width**2 + partner.width**2)
    sums = entries * FLOAT64_BYTES
    largest = max(student.width, partner.width) ** 2 * FLOAT64_BYTES
    widened = 2 * min(block_rows, MOMENT_ROWS) * (student.width + 2 * partner.width) * FLOAT64_BYTES
    states = block_rows * (
        student.width * context.student_bytes + partner.width * context.teacher_bytes
    )
    own = forward_cost(student, block_rows, context.student_bytes)
    theirs = forward_cost(partner, block_rows, context.teacher_bytes)
    theirs = theirs if partner is context.anchor else theirs.on_teacher()
    walk = (own + theirs).repeated(blocks)
    return replace(
        walk,
        host_bytes=LIMBS * sums + TEMPORARIES * largest + widened + 3 * states,
        # What was begun is committed while blocks are missing, and lies there to the end.
        disk_bytes=sums + (LIMBS * sums if blocks > COMMIT_BLOCKS else 0.0),
        operations=walk.operations + 2.0 * rows * products,
        exact_terms=walk.exact_terms + float(blocks * entries),
        added_up=(Added(LIMBS * sums, blocks / COMMIT_BLOCKS, dealt=True),),
    ).dealt()
