"""The cost of a capture of rows, and of one of sums."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
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
FEW_TEXTS = 48
"""Texts of the student that are enough for an alignment."""
CLEARLY_LESS = 0.8
"""Share of a capture's disk below which another one is named in its place."""
SAVED_LAYERS = 4
"""After so many layers the states of all rows are saved, where shards do not hold them as they
were computed."""
TEMPORARIES = 5
"""Copies of the largest product while it is added to its sum."""


def rows_cost(step: Residuals, context: CostContext) -> Cost:
    """Return the cost of capturing the rows of the context's texts, and what would take less."""
    cost = _captured(step, context)
    smaller = [
        option
        for option, other in _other_captures(step, context).items()
        if _disk(other) < CLEARLY_LESS * _disk(cost)
    ]
    return replace(cost, less_disk=" or ".join(smaller))


def _other_captures(step: Residuals, context: CostContext) -> dict[str, Cost]:
    """Return the cost of captures that serve the same steps, by the option that sets them."""
    if step.control != "none":  # it needs the rows of all texts
        return {}
    few, sums = replace(step, student_texts=FEW_TEXTS), replace(step, store="moments")
    others = {'store = "moments"': moments_cost(sums, context)}
    if step.student_texts is None:
        others = {f"student_texts = {FEW_TEXTS}": _captured(few, context), **others}
    return others


def _disk(cost: Cost) -> float:
    return cost.disk_bytes + sum(cost.shared_files.values())


def _captured(step: Residuals, context: CostContext) -> Cost:
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
    theirs = _Stream(teacher, read.total, inner_rows, context.teacher_bytes, teacher_number)
    streams = [theirs, _Stream(student, rows, rows, context.student_bytes, student_number)]
    shared: dict[Hashable, float] = {
        ("teacher states", step.dtype, read.total, inner_rows): teacher_shards
    }
    if context.anchor:
        anchor = _Stream(context.anchor, rows, rows, context.student_bytes, student_number)
        anchor_shards = shard_bytes(context.anchor, rows, student_number)
        shared["anchor states", step.dtype, rows] = anchor_shards
        streams.append(anchor)
    return replace(
        capture_cost(context, student_rows=rows).dealt(),
        gathered=tuple(
            Gathered(stream.gathered_bytes, -(-stream.rows // BATCH_TOKENS)) for stream in streams
        ),
        # One stream is captured after the other, and what it saved is emptied at its end.
        disk_bytes=student_shards + control_shards + max(each.saved_bytes for each in streams),
        shared_files=shared,
    )


@dataclass(frozen=True)
class _Stream:
    """One model's part of a capture."""

    shape: ModelShape
    rows: int
    inner_rows: int
    """Rows that shards before the last boundary hold."""
    computed: int
    """Bytes of a number as it is computed."""
    stored: int
    """Bytes of a number in the shards."""

    @property
    def saved_times(self) -> int:
        """How often the states of all rows are saved, because shards do not hold them as computed.

        Two dtypes of one size pass for one here: a float16 model with shards in bfloat16.
        """
        if self.inner_rows == self.rows and self.stored == self.computed:
            return 0
        return (self.shape.depth - 1) // SAVED_LAYERS

    @property
    def saved_bytes(self) -> int:
        """Disk that saved states take while the stream is captured."""
        return self.rows * self.shape.width * self.computed if self.saved_times else 0

    @property
    def gathered_bytes(self) -> int:
        """What the first process gathers: the rows of shards, and all rows where they are saved."""
        whole = 1 + self.saved_times
        rows = whole * self.rows + (self.shape.depth + 1 - whole) * self.inner_rows
        return rows * self.shape.width * self.computed


def _inner_rows(step: Residuals, texts: TextCounts) -> int:
    """Return the teacher's rows that are kept at boundaries before the last, too.

    They are those of the student's texts, taken as an even share of each split, or of the sample
    where that has more; and those of held-out texts. The shared prompt counts once.
    """
    fitted = (Split.FIT, Split.VALIDATION)
    rows = texts.prefix
    for split in Split:
        limit = None
        if split.outside_domain:
            continue
        if split in fitted and step.student_texts is not None:
            share = texts.texts_of(split) / max(texts.texts_of(*fitted), 1)
            of_sample = texts.sampled.texts_of(split)
            limit = max(round(share * step.student_texts), of_sample)
        rows += texts.rows_of(split, limit=limit) - texts.prefix
    return rows


def moments_cost(step: Residuals, context: CostContext) -> Cost:
    """Return the cost of capturing the rows of a sample, and the sums of all texts to fit on.

    Memory and disk are those of the sums, of the sample and of one block, whatever the number of
    texts. On disk are the sums, and what was begun of them.
    """
    sampled = replace(context, texts=context.texts.sampled)
    cost = _captured(step, sampled)
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
