"""The cost of `prompt-kl`: its texts, the teacher's part, the training and the scores."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from rotdistill_core.data.shards import share_of
from rotdistill_core.data.splits import Split
from rotdistill_core.evaluation.guard import is_guarded
from rotdistill_core.planning.cost import (
    FLOAT32_BYTES,
    LOGIT_BLOCKS,
    Added,
    Cost,
    CostContext,
    acceptance_cost,
    converted_bytes,
    forward_cost,
    generation_cost,
    products,
    teacher_states_cost,
    training_activations,
)
from rotdistill_core.planning.shape import ModelShape

if TYPE_CHECKING:
    from rotdistill_prompt_kl.step import PromptKl

TOPIC_TOKENS = 12
"""Tokens of a topic with the chat template around it."""
TRAINED_STATE = 6
"""Copies of what trains: itself, its gradient and that of one text, two moments of AdamW, and the
best one so far."""
LIMB_BYTES = 16
"""Bytes of a number while it is added to others as integers."""
SUM_BYTES = 8
"""Bytes of a sum of them in float64, on the host."""
SAVED_STATE = 8
"""Copies of what trains that a killed training goes on from: itself, two moments and the best one
so far, in two files."""
EVALUATION_BATCH = 4
"""Texts in one batch when the model that trains is evaluated."""


class TrainingTexts(NamedTuple):
    """The texts that a step trains and validates on."""

    topics: float
    """Continuations of topics."""
    answers: float
    """The teacher's answers to questions that are not held out."""
    fit_share: float
    """Share of the texts that are trained on; the others are validation texts."""
    tokens: float
    """Tokens of all texts, each with its own copy of the shared prompt."""
    rows: int
    """Rows of all texts, the shared prompt counted once."""
    longest: float
    """Tokens of the longer kind of text."""
    longest_answer: float
    """Tokens of the longer kind of answer, at most."""

    @property
    def answer_share(self) -> float:
        """Share of the tokens of a text whose predictions are compared, at most."""
        return min(self.longest_answer / max(self.longest, 1.0), 1.0)


def training_texts(step: PromptKl, context: CostContext) -> TrainingTexts:
    """Return the texts; questions that the teacher does not answer count as those with a topic."""
    texts = context.texts
    fit, validation = (texts.texts.get(s, 0) for s in (Split.FIT, Split.VALIDATION))
    in_both = fit + validation
    own = texts.questions_asked + texts.lessons - texts.texts.get(Split.HELDOUT, 0)
    answered = min(max(own, 0), in_both)
    mean = (texts.rows_of(Split.FIT, Split.VALIDATION) - texts.prefix) / max(in_both, 1)
    topics = min(step.max_prompts, in_both - answered) if step.continues_topics else 0
    answers = answered if "questions" in step.prompts_from else 0
    topic_rows = TOPIC_TOKENS + step.max_new_tokens
    own_rows = topics * topic_rows + answers * mean
    # An answer is shorter than its text, whose mean length stands for both.
    longest = mean if answers else 0.0
    longest_answer = longest
    if topics:
        longest = max(longest, topic_rows)
        longest_answer = max(longest_answer, step.max_new_tokens)
    return TrainingTexts(
        topics=topics,
        answers=answers,
        fit_share=fit / max(in_both, 1),
        tokens=own_rows + (topics + answers) * texts.prefix,
        rows=texts.prefix + round(own_rows),
        longest=texts.prefix + longest,
        longest_answer=longest_answer,
    )


def prompt_kl_cost(step: PromptKl, context: CostContext) -> Cost:
    """Return the cost of all parts, one after the other."""
    written = training_texts(step, context).topics
    counts = context.texts.with_fit_share(share_of(step.shard))
    context = replace(context, texts=counts)
    texts = training_texts(step, context)
    cost = _teacher_cost(step, context, texts, written)
    cost += _training_cost(step, context, texts)
    cost += _answers_of_student_cost(step, context, texts)
    return cost + _scoring_cost(step, context)


def _teacher_cost(
    step: PromptKl, context: CostContext, texts: TrainingTexts, written: float
) -> Cost:
    """Return the cost of the whole teacher that continues topics, and of its pass over texts.

    It continues those of all shards, `written` of them.
    """
    read = context.texts.as_teacher_reads
    rows = texts.rows - context.texts.prefix + read.prefix
    if is_guarded(step.guard, context.texts):
        rows += context.texts.rows.get(Split.GUARD_VALIDATION, 0)
    options = step.prompts_from, step.max_prompts, step.max_new_tokens, step.guard, step.shard
    key = ("prompt-kl", *options)
    cost = teacher_states_cost(context, rows, key).dealt()
    if written:
        cost += generation_cost(
            context.teacher,
            read,
            round(written),
            round(written * step.max_new_tokens),
            context.teacher_bytes,
        ).on_teacher()
    return cost


def _training_cost(step: PromptKl, context: CostContext, texts: TrainingTexts) -> Cost:
    """Return the cost of training: the whole student, what a backward pass keeps, and the edit.

    A LoRA on the head needs no backward pass through the layers, so nothing of them is kept.
    """
    teacher, number = context.teacher, context.student_bytes
    student = context.student
    if step.train == "head":
        student = student.changed(tie_word_embeddings=False)
    inside, head = student.parameters(inside=True), student.vocab * student.width
    size = trained_parameters(student, step.train, step.rank)
    wide = max(number, FLOAT32_BYTES)
    tokens = step.micro_batch_size * texts.longest
    logits = (
        max(EVALUATION_BATCH, step.micro_batch_size)
        * texts.longest_answer
        * student.vocab
        * LOGIT_BLOCKS
        * wide
    )
    # Both heads are multiplied in float32 at least. The student's own is there already, if it is
    # computed in that.
    wide_heads = teacher.vocab * teacher.width * wide
    wide_heads += head * wide if wide != number else 0

    if step.train == "lora":
        kept = training_activations(student, tokens, number)
        backward, edited = inside + head, inside
    else:
        kept = training_activations(student, tokens, number) / student.depth
        backward, edited = head, head
    trained = texts.fit_share * texts.tokens * step.max_epochs
    # The validation texts are scored before training and twice an epoch.
    validated = (1 - texts.fit_share) * texts.tokens * (1 + 2 * step.max_epochs)
    forward = 2.0 * (inside + head)
    # The teacher's head is multiplied too, on the answers.
    teacher_logits = 2.0 * teacher.vocab * teacher.width * (trained + validated)
    fit_texts = texts.fit_share * (texts.topics + texts.answers)
    steps = step.max_epochs * fit_texts / step.batch_size
    # For a LoRA no gradient of the weights themselves is taken: the backward pass is as long as the
    # forward pass.
    passes = 2 if step.rank == "full" else 1
    operations = forward * (trained + validated) + 2.0 * passes * backward * trained

    # Those of the student's own answers lie beside the others.
    states = texts.rows * teacher.width * context.teacher_bytes * (2 if step.on_policy else 1)
    teacher_head = teacher.vocab * teacher.width * converted_bytes(teacher, wide)
    whole = student.parameters() * number
    adapter = 0.0 if step.rank == "full" else size * wide
    return Cost(
        host_bytes=states + teacher_head + edited * number + SUM_BYTES * size,
        device_bytes=whole
        + wide_heads
        + kept
        + logits
        + size * (TRAINED_STATE * wide + LIMB_BYTES),
        disk_bytes=edited * number + adapter + SAVED_STATE * size * wide,
        operations=operations + teacher_logits,
        kernels=products(operations, 2 if step.bfloat16 else number),
        # Backward, each number is needed about as often again.
        activations=training_activations(student, (1 + passes) * trained + validated, 1)
        + LOGIT_BLOCKS * student.vocab * texts.answer_share * (2 * trained + validated),
        layer_calls=3.0 * student.depth * (trained + validated) / max(tokens, 1.0),
        read_bytes=context.student.bytes,
        traffic_bytes=whole,
        # Not counted as dealt: it is, but over so many processes only as a step has texts.
        added_up=(Added(LIMB_BYTES * size, steps),),
    )


def trained_parameters(shape: ModelShape, train: str, rank: int | Literal["full"]) -> float:
    """Return the parameters that train: of a LoRA on the head or on all linear layers, or the
    matrices of these themselves."""
    if rank == "full":
        return shape.vocab * shape.width if train == "head" else shape.parameters(inside=True)
    if train == "head":
        return rank * (shape.vocab + shape.width)
    attention = 2 * (shape.width + shape.query_width) + 2 * (shape.width + shape.kv_width)
    return rank * shape.depth * (attention + 3 * (shape.width + shape.neurons))


def _answers_of_student_cost(step: PromptKl, context: CostContext, texts: TrainingTexts) -> Cost:
    """Return the cost of the student's own answers and of the teacher's passes over them.

    A second student answers, with what was learned folded in, while the first one trains.
    """
    if not step.on_policy:
        return Cost()
    student, teacher = context.student, context.teacher
    share = step.on_policy * texts.fit_share
    count = share * (texts.topics + texts.answers)
    written = count * texts.longest_answer
    rows = round(context.texts.as_teacher_reads.prefix + share * texts.rows)
    generation = generation_cost(
        student, context.texts, math.ceil(count), math.ceil(written), context.student_bytes
    )
    held = _training_cost(step, context, texts).device_bytes
    states = float(rows * teacher.width * context.teacher_bytes)
    reading = forward_cost(teacher, rows, context.teacher_bytes).on_teacher().dealt()
    epochs = replace(generation, device_bytes=generation.device_bytes + held).repeated(
        step.max_epochs
    ) + reading.repeated(step.max_epochs)
    return replace(epochs, disk_bytes=step.max_epochs * states)


def _scoring_cost(step: PromptKl, context: CostContext) -> Cost:
    """Return the cost of accepting the edit, which is in memory meanwhile."""
    student, number = context.student, context.student_bytes
    head = student.vocab * student.width
    edited = head if step.train == "head" else student.parameters(inside=True)
    scores = acceptance_cost(context, is_guarded(step.guard, context.texts)).dealt()
    return replace(scores, host_bytes=scores.host_bytes + edited * number)
