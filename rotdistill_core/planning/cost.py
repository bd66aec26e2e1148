"""What a step needs: memory, disk, operations, reads and traffic, from sizes alone.

A step states its own needs (`cost`) and what it leaves behind (`context_after`); `plan` adds up. The
functions below are the parts that several steps share. Memory is that of the tensors which a step
holds at once at its worst; libraries and tokenizers are counted once (`baseline_memory`). Pages of
mapped weight files are not counted: the operating system takes them back when memory is short.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rotdistill_core.planning.shape import DTYPE_BYTES, ModelShape
from rotdistill_core.planning.text_counts import TextCounts
from rotdistill_core.plugin.step import stage_of

LIBRARY_BYTES = 0.3e9
"""Memory of torch, transformers and scipy once they are loaded."""
BYTES_PER_TOKEN = 600
"""Memory of a tokenizer for each token of its vocabulary."""
BATCH_TOKENS = 1536
"""Tokens that go through a layer at once: the budget of `LayerwiseForward`."""
ANSWERS_AT_ONCE = 64
"""Answers that `greedy_answers` generates at once."""
LOGIT_ROWS = 256
"""Rows whose logits are compared at once."""
FLOAT64_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step needs."""

    host_bytes: float = 0.0
    """Memory of the host."""
    device_bytes: float = 0.0
    """Memory where models compute. Without a GPU it is the host's too."""
    disk_bytes: float = 0.0
    """Files that the step writes for itself."""
    operations: float = 0.0
    """Floating-point operations."""
    read_bytes: float = 0.0
    """Bytes read from weight files and shards."""
    traffic_bytes: float = 0.0
    """Bytes copied between host and device."""
    shared_files: Mapping[Hashable, float] = field(default_factory=dict)
    """Files keyed by their content, with their bytes: a plan counts those of one key once."""

    def __add__(self, other: Cost) -> Cost:
        """Return what both need, one after the other: memory at its worst, all else in sum."""
        return Cost(
            host_bytes=max(self.host_bytes, other.host_bytes),
            device_bytes=max(self.device_bytes, other.device_bytes),
            disk_bytes=self.disk_bytes + other.disk_bytes,
            operations=self.operations + other.operations,
            read_bytes=self.read_bytes + other.read_bytes,
            traffic_bytes=self.traffic_bytes + other.traffic_bytes,
            shared_files={**self.shared_files, **other.shared_files},
        )


@dataclass(frozen=True, kw_only=True)
class CostContext:
    """The two models at some point of a chain of steps, and the texts."""

    teacher: ModelShape
    student: ModelShape
    texts: TextCounts
    teacher_bytes: int
    """Bytes of a number while the teacher computes."""
    student_bytes: int
    """Bytes of a number while the student computes."""
    same: bool
    """Whether the student starts as the teacher itself."""

    def with_edited_weights(self) -> CostContext:
        """Return the context after an edit, whose weights are kept in the dtype that the student computes in."""
        stored = next(name for name, size in DTYPE_BYTES.items() if size == self.student_bytes)
        return replace(self, student=replace(self.student, stored=stored))

    def with_student(self, keep: float = 1.0, **config: Any) -> CostContext:
        """Return the context after a step that changes the student's config or keeps a share of its layers' parameters."""
        return replace(self, student=self.student.changed(keep, **config))


def step_cost(step: object, context: CostContext) -> Cost:
    """Return what a step needs: its own statement, or that of a plain step of its stage."""
    own = getattr(step, "cost", None)
    return own(context) if own else default_cost(stage_of(type(step)), context)


def context_after(step: object, context: CostContext) -> CostContext:
    """Return the context after a step: its own statement, or that of a plain edit.

    Raises:
        RecipeError: the step cannot do to this student what its options ask for.
    """
    own = getattr(step, "context_after", None)
    if own:
        changed: CostContext = own(context)
        return changed
    edits = stage_of(type(step)) in ("fold", "style")
    return context.with_edited_weights() if edits else context


def default_cost(stage: str, context: CostContext) -> Cost:
    """Return what a plain step of a stage needs."""
    by_stage = {
        "capture": capture_cost,
        "align": alignment_cost,
        "refine": alignment_cost,
        "fold": edit_cost,
        "style": edit_cost,
        "evaluate": evaluation_cost,
    }
    return by_stage[stage](context)


def baseline_memory(context: CostContext) -> float:
    """Return the memory that is there in every step, bytes."""
    return LIBRARY_BYTES + BYTES_PER_TOKEN * (context.teacher.vocab + context.student.vocab)


def converted_bytes(shape: ModelShape, number: int) -> int:
    """Return the bytes that a parameter takes when it is read as numbers of `number` bytes: 0 where it is mapped as it is."""
    return 0 if DTYPE_BYTES[shape.stored] == number else number


def logits_memory(context: CostContext, rows: float) -> float:
    """Return the memory in which predictions are compared: both heads, and one block of rows of logits."""
    student, teacher = context.student, context.teacher
    per_token = student.width * converted_bytes(student, context.student_bytes)
    per_token += teacher.width * converted_bytes(teacher, context.student_bytes)
    block = 7 * min(LOGIT_ROWS, rows) * student.vocab * context.student_bytes
    return student.vocab * per_token + block


def answer_rows(context: CostContext, split: str) -> float:
    """Return how many rows of a split predict answers: its share of what the teacher writes, or half of its rows."""
    texts = context.texts
    if split == "heldout":
        return texts.texts.get(split, 0) * texts.answer_tokens / max(texts.questions_asked, 1)
    return texts.rows.get(split, 0) / 2


def forward_cost(shape: ModelShape, rows: int, number: int) -> Cost:
    """Return what it takes to send rows through a model layer by layer.

    Held are two layers and the one being read, the states of all rows, and the activations of one batch.
    """
    batch_rows = min(rows, BATCH_TOKENS)
    batch = batch_rows * (3 * shape.neurons + 2 * shape.query_width + 4 * shape.width)
    states = rows * shape.width * number
    inside = shape.parameters(inside=True)
    return Cost(
        host_bytes=states,
        device_bytes=(2.5 * shape.layer_parameters + batch) * number,
        operations=2 * inside * rows,
        read_bytes=inside * DTYPE_BYTES[shape.stored],
        traffic_bytes=inside * number + 2 * shape.depth * states,
    )


def generation_cost(
    shape: ModelShape, texts: TextCounts, questions: int, tokens: int, number: int
) -> Cost:
    """Return what it takes to let a whole model answer: its weights, keys and values of a batch, and logits.

    Args:
        shape: the model.
        texts: the texts of the run.
        questions: how many are asked.
        tokens: how many tokens all answers may have together.
        number: bytes of a number.
    """
    batch = min(questions, ANSWERS_AT_ONCE)
    mean_text = (texts.total - texts.prefix) / max(sum(texts.texts.values()), 1)
    longest = texts.prefix + mean_text + tokens / max(questions, 1)
    cache = batch * longest * shape.depth * 2 * shape.kv_width * number
    weights = shape.parameters() * number
    return Cost(
        device_bytes=weights + cache + batch * shape.vocab * 4,
        operations=2 * shape.parameters() * tokens * 4,
        read_bytes=shape.bytes,
        traffic_bytes=weights,
    )


def teacher_answers_cost(context: CostContext) -> Cost:
    """Return what the teacher's own answers need, ahead of all steps."""
    texts = context.texts
    if not texts.questions_asked:
        return Cost()
    return generation_cost(
        context.teacher,
        texts,
        texts.questions_asked,
        texts.answer_tokens,
        context.teacher_bytes,
    )


def checkpoint_cost(context: CostContext, number: int) -> Cost:
    """Return what a saved variant needs, its numbers of `number` bytes each."""
    student = context.student
    largest = student.vocab * student.width
    return Cost(
        host_bytes=largest * (context.student_bytes + number),
        disk_bytes=student.parameters() * number,
        read_bytes=student.bytes,
    )


def capture_cost(context: CostContext, student_rows: int | None = None) -> Cost:
    """Return what it takes to capture both models: the teacher on all texts, the student on its rows."""
    rows = context.texts.rows_of("fit", "validation") if student_rows is None else student_rows
    teacher = forward_cost(context.teacher, context.texts.total, context.teacher_bytes)
    student = forward_cost(context.student, rows, context.student_bytes)
    both = teacher + student
    return replace(both, host_bytes=2 * both.host_bytes)


def alignment_cost(context: CostContext) -> Cost:
    """Return what an aligner of the residual stream needs: both streams of a boundary, chunks in float64, moments."""
    student, teacher, rows = context.student, context.teacher, context.texts.rows_of("fit")
    streams = rows * (student.width + teacher.width) * context.student_bytes
    chunks = min(rows, 4096) * (student.width + 2 * teacher.width) * FLOAT64_BYTES
    matrices = 6 * teacher.width**2 + 4 * student.width * teacher.width
    products = 2.0 * rows * student.width * teacher.width * (student.depth + 1)
    return Cost(
        host_bytes=streams + chunks + matrices * FLOAT64_BYTES,
        disk_bytes=student.width * teacher.width * FLOAT64_BYTES,
        operations=products + 30.0 * teacher.width**3,
        read_bytes=2 * streams * (student.depth + 1),
    )


def assignment_cost(context: CostContext) -> Cost:
    """Return what an assignment of heads and neurons needs: two layers, and the similarities of their neurons."""
    student, teacher = context.student, context.teacher
    layers = 2 * (student.layer_parameters + teacher.layer_parameters) * FLOAT64_BYTES
    similarities = 3 * student.neurons * teacher.neurons
    assignment = 1e-1 * min(student.neurons, teacher.neurons) ** 3
    kept = student.depth * (student.neurons + student.query_width + student.kv_width)
    return Cost(
        host_bytes=layers + similarities * FLOAT64_BYTES,
        disk_bytes=kept * FLOAT64_BYTES,
        operations=student.depth * (2.0 * similarities * student.width + assignment),
        read_bytes=student.bytes + teacher.bytes,
    )


def edit_cost(context: CostContext) -> Cost:
    """Return what an edit of all weights needs."""
    numbers = context.student.parameters()
    return Cost(
        host_bytes=numbers * context.student_bytes,
        disk_bytes=numbers * context.student_bytes,
        operations=2.0 * numbers * context.texts.total,
        read_bytes=context.student.bytes,
    )


def evaluation_cost(context: CostContext) -> Cost:
    """Return what it takes to compare a variant with the teacher on held-out and out-of-domain texts."""
    student, teacher, texts = context.student, context.teacher, context.texts
    rows = texts.rows_of("heldout", "guard")
    walk = forward_cost(student, rows, context.student_bytes)
    logits = logits_memory(
        context, max(answer_rows(context, "heldout"), texts.rows.get("guard", 0))
    )
    frames = 0.0
    if not context.same:  # a rotation per layer from the fit rows stands between the two bases
        frames = texts.rows_of("fit") * (student.width + teacher.width) * FLOAT64_BYTES
    heads = 2.0 * rows * student.vocab * (student.width + teacher.width)
    return replace(
        walk,
        host_bytes=walk.host_bytes + logits + frames,
        operations=walk.operations + heads,
    )
