"""The costs of merging, of scoring what is merged, and of the Fisher information."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import TYPE_CHECKING

from rotdistill_weight_matching import WeightMatching

from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.guard import is_guarded
from rotdistill_core.planning.cost import (
    FLOAT32_BYTES,
    GUARD_SCORES,
    LOGIT_BLOCKS,
    Cost,
    CostContext,
    answer_rows,
    scoring_cost,
    teacher_states_cost,
    training_activations,
)

if TYPE_CHECKING:
    from rotdistill_soups.step import Soups

SCORED_ROWS = 2048
"""Largest number of rows of a split on which a view is scored."""
BFLOAT16_BYTES = 2
READS_TO_PREPARE = {"ties": 4, "slerp": 1}
"""Method -> how often it reads an ingredient before it merges. TIES reads the student as often."""


def barrier_cost(context: CostContext, split: str, ends: int, points: int) -> Cost:
    """Return the cost of scoring the ends, and the points between each two of them."""
    between = comb(ends, 2) * (points - 2)
    cost = _teacher_cost(context, split) + _score_cost(context, split).repeated(ends)
    return cost + _merged_score_cost(context, split, parts=2).repeated(between)


def soup_cost(step: Soups, context: CostContext) -> Cost:
    """Return the cost of a merge, with everything that chooses or measures something first.

    Of all that only the teacher's pass is dealt. The Fisher information is not: squares of all
    parameters, added up as integers, would take longer to send than to compute.
    """
    count = len(step.ingredients)
    cost = merge_cost(step, context)
    if step.same_basis == "align":
        cost += _alignment_cost(context, count)
    if step.method == "fisher":
        information = fisher_cost(step, context)
        files = count * information.disk_bytes
        cost += replace(information.repeated(count), disk_bytes=files)
    scores = _merged_scores(step)
    if step.require_improvement or scores:
        cost += _teacher_cost(context, Split.VALIDATION).dealt()
    if step.require_improvement:
        cost += _score_cost(context, Split.VALIDATION)
    if scores:
        parts = 1 + count
        cost += _merged_score_cost(context, Split.VALIDATION, parts).repeated(scores)
    if step.require_improvement and is_guarded(step.guard, context.texts):
        cost += _teacher_cost(context, Split.GUARD_VALIDATION).dealt()
        merged = _merged_score_cost(context, Split.GUARD_VALIDATION, 1 + count)
        cost += merged.repeated(GUARD_SCORES)
    return cost


def _merged_scores(step: Soups) -> int:
    """Return how many merged models are scored: the soup, and what a greedy one tries."""
    count = len(step.ingredients)
    tried = 2 * count - 1 if step.method == "greedy" else 0
    return tried + int(step.require_improvement)


def merge_cost(step: Soups, context: CostContext) -> Cost:
    """Return the cost of one merge. In memory is the parameter that is made, in float32."""
    student, number = context.student, context.student_bytes
    count = len(step.ingredients)
    merged: float = student.parameters()
    largest = max(student.vocab, student.neurons, student.query_width) * student.width
    if step.layers:
        first, last = step.layers
        merged = (last - first + 1) * student.layer_parameters
        largest = max(student.neurons, student.query_width) * student.width
    reads = 1 + count + READS_TO_PREPARE.get(step.method, 0) * count
    wide = max(FLOAT32_BYTES, number)
    # A second copy in the dtype that is stored.
    copy = 0 if wide == number else number
    share = merged / student.parameters()
    return Cost(
        host_bytes=largest * (wide + copy),
        disk_bytes=merged * number,
        operations=4.0 * merged * reads,
        activations=merged * reads,
        read_bytes=share * student.bytes * reads,
    )


def fisher_cost(step: Soups, context: CostContext) -> Cost:
    """Return the cost of the information of one ingredient.

    In memory are the whole model, its gradients and their squares, and what the backward pass of
    one text keeps. The information is stored in bfloat16.
    """
    student, texts, number = context.student, context.texts, context.student_bytes
    fit_texts = texts.texts.get(Split.FIT, 0)
    mean = texts.rows.get(Split.FIT, 0) / max(fit_texts, 1)
    tokens = mean + texts.prefix
    parameters = student.parameters()
    logits = LOGIT_BLOCKS * mean * student.vocab * number
    return Cost(
        device_bytes=3 * parameters * number
        + training_activations(student, tokens, number)
        + logits,
        disk_bytes=parameters * BFLOAT16_BYTES,
        operations=6.0 * parameters * tokens * min(step.fisher_texts, fit_texts),
        activations=(2.0 * training_activations(student, tokens, 1) + 2 * parameters)
        * min(step.fisher_texts, fit_texts),
        layer_calls=3.0 * student.depth * min(step.fisher_texts, fit_texts),
        # Read again for the mean of the notes, and while parameters are merged.
        read_bytes=student.bytes + 2 * parameters * BFLOAT16_BYTES,
        traffic_bytes=2 * parameters * number,
    )


def _alignment_cost(context: CostContext, count: int) -> Cost:
    """Return the cost of bringing all ingredients into the student's basis, and storing them."""
    to_student = replace(context, teacher=context.student, anchor=None)
    alignment = WeightMatching().cost(to_student)
    student = context.student.changed(tie_word_embeddings=False)
    # The maps stay in memory; the student, whose norms are folded too, is stored as well.
    stored = (count + 1) * student.parameters() * max(FLOAT32_BYTES, context.student_bytes)
    return replace(alignment.repeated(count), disk_bytes=stored)


def _teacher_cost(context: CostContext, split: str) -> Cost:
    rows = context.texts.as_teacher_reads.rows_of(split)
    return teacher_states_cost(context, rows, ("soups", split))


def _score_cost(context: CostContext, split: str) -> Cost:
    scored = min(answer_rows(context, split), SCORED_ROWS)
    return scoring_cost(context, context.texts.rows_of(split), scored)


def _merged_score_cost(context: CostContext, split: str, parts: int) -> Cost:
    """Return the cost of one score of a model that is merged while it is read."""
    student = context.student
    score = _score_cost(context, split)
    head = student.vocab * student.width * max(FLOAT32_BYTES, context.student_bytes)
    return replace(
        score,
        host_bytes=score.host_bytes + head,
        operations=score.operations + 4.0 * student.parameters() * parts,
        activations=score.activations + float(student.parameters() * parts),
        read_bytes=parts * score.read_bytes,
    )
