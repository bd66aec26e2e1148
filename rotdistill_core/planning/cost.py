"""The cost of a step: memory, disk, work, reads and traffic, estimated from sizes alone.

A step may state its own cost (`cost`) and how it changes the student (`context_after`). A step that
states neither counts as a plain step of its stage. `plan` adds up and knows no step by name. The
functions below are the parts that several steps share.

Memory is the peak of the tensors that a step holds at once. Libraries and tokenizers count once
for the whole run (`baseline_memory`). Pages of memory-mapped weight files do not count, because the
operating system can evict them.

Work is counted by kind, because a machine does each at a rate of its own. How long it takes here is
in `rotdistill_core.planning.times`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from rotdistill_core.data.batching import ANSWERS_AT_ONCE, BATCH_TOKENS, LOGIT_ROWS
from rotdistill_core.data.splits import Split
from rotdistill_core.planning.shape import DTYPE_BYTES, ModelShape
from rotdistill_core.planning.text_counts import TextCounts
from rotdistill_core.plugin.step import stage_of

LIBRARY_BYTES = 0.35e9
"""Memory of torch, transformers and scipy once they are loaded and in use."""
BYTES_PER_TOKEN = 600
"""Memory of a tokenizer for each token of its vocabulary."""
CONFIRMED_ANSWERS = 4
"""Answers of a series that a forward pass confirms: `CONFIRMED_PER_CHUNK`, in a module that needs
torch."""
COMPARED_POSITIONS = 16
"""Positions of a text at which logits are compared with those of transformers: `POSITIONS`, in a
module that needs torch."""
COMPARED_TEXTS = 2
"""Texts on which a model is compared with transformers: the shortest and the longest."""
LOGIT_BLOCKS = 7
"""Copies of one block of logits that a comparison holds: both models' logits, log-probabilities
and temporaries. Set on the measured runs of `benchmarks/plan_accuracy.py`."""
MOMENT_ROWS = 4096
"""Rows that are converted to float64 at once while moments are summed."""
SVD_OPERATIONS = 30.0
"""Operations of a singular value decomposition of an n x n matrix, divided by n^3."""
ASSIGNMENT_OPERATIONS = 1e-1
"""Operations of a linear assignment of n neurons, divided by n^3."""
WIDENED_ROWS = 4096
"""Rows that are widened to float64 at a time: `CHUNK_ROWS`, in a module that needs torch."""
FLOAT64_BYTES = 8
FLOAT32_BYTES = 4
GUARD_SCORES = 5
"""How often an edit is scored on the guard's texts, at most: before it, and at four strengths."""


class Kernel(StrEnum):
    """Operations that a machine does at another rate than products in float32.

    A step counts them twice: among `Cost.operations`, which has all, and by kind in `Cost.kernels`.
    So an SVD of a `[d, d]` matrix is `n = SVD_OPERATIONS * d**3`, in
    `Cost(operations=n, kernels={Kernel.DECOMPOSITIONS: n})`. `plan` divides each kind by the rate
    that was measured for it here, and takes what is in no kernel for products in float32.
    """

    BFLOAT16 = "bfloat16"
    """Products in bfloat16 or float16."""
    FLOAT64 = "float64"
    """Products in float64."""
    SOLVES = "solves"
    """Cholesky factors in float64, and triangular solves with them."""
    DECOMPOSITIONS = "decompositions"
    """Singular values and eigenvalues in float64; `SVD_OPERATIONS` counts them."""


class Added(NamedTuple):
    """Exact sums that all processes of a run add up together."""

    size: float
    """Bytes of one sum: two integers of 8 bytes for each entry."""
    times: float
    """How often one process would add up."""
    dealt: bool = False
    """Whether n processes add up an n-th as often, since each has more terms by then."""


class Gathered(NamedTuple):
    """Rows that the first process gathers from all of them."""

    size: float
    """Bytes of all rows, its own among them."""
    batches: int
    """Batches that they are dealt in; one process after the other takes one."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Resources that a step needs.

    `operations` are those of all processes of a run together. Those that are not dealt are done by
    the first process, while the others wait.
    """

    host_bytes: float = 0.0
    """Peak memory on the host."""
    device_bytes: float = 0.0
    """Peak memory on the student's device. If that is the host, it comes on top of `host_bytes`."""
    teacher_device_bytes: float = 0.0
    """Peak memory on the teacher's device, which may be the same; never at the same time."""
    disk_bytes: float = 0.0
    """Size of the files that only this step writes."""
    operations: float = 0.0
    """Floating-point operations, those of `kernels` among them; a product of `[n, k]` and `[k, m]`
    has `2 n k m`."""
    dealt_operations: float = 0.0
    """Those of them that are dealt over the processes of a run."""
    kernels: Mapping[Kernel, float] = field(default_factory=dict)
    """Those of them that are no products in float32, by kind."""
    activations: float = 0.0
    """Numbers that pass through a model beside its products: norms, attention, activations, and
    logits that are compared."""
    layer_calls: float = 0.0
    """How often a layer is called. A call takes time, however few rows it gets."""
    streamed_bytes: float = 0.0
    """Bytes of weights and caches that pass through the processor token by token."""
    exact_terms: float = 0.0
    """Numbers that are added to exact sums."""
    added_up: tuple[Added, ...] = ()
    """What its processes add up together."""
    gathered: tuple[Gathered, ...] = ()
    """What the first process gathers from all of them."""
    read_bytes: float = 0.0
    """Bytes read from weight files and shards."""
    traffic_bytes: float = 0.0
    """Bytes copied between host and device. A plan without a GPU counts none."""
    shared_files: Mapping[Hashable, float] = field(default_factory=dict)
    """Key of a file's content -> its bytes. A plan counts files with one key once."""
    less_disk: str = ""
    """Options with which the step writes less, such as `store = "moments"`. A user reads them when
    the disk is too small."""

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both steps, one after the other: peak of memory, sum of the rest."""
        return Cost(
            host_bytes=max(self.host_bytes, other.host_bytes),
            device_bytes=max(self.device_bytes, other.device_bytes),
            teacher_device_bytes=max(self.teacher_device_bytes, other.teacher_device_bytes),
            disk_bytes=self.disk_bytes + other.disk_bytes,
            operations=self.operations + other.operations,
            dealt_operations=self.dealt_operations + other.dealt_operations,
            kernels={
                kernel: self.kernels.get(kernel, 0.0) + other.kernels.get(kernel, 0.0)
                for kernel in {**self.kernels, **other.kernels}
            },
            activations=self.activations + other.activations,
            layer_calls=self.layer_calls + other.layer_calls,
            streamed_bytes=self.streamed_bytes + other.streamed_bytes,
            exact_terms=self.exact_terms + other.exact_terms,
            added_up=(*self.added_up, *other.added_up),
            gathered=(*self.gathered, *other.gathered),
            read_bytes=self.read_bytes + other.read_bytes,
            traffic_bytes=self.traffic_bytes + other.traffic_bytes,
            shared_files={**self.shared_files, **other.shared_files},
            less_disk=self.less_disk or other.less_disk,
        )

    def on_teacher(self) -> Cost:
        """Return the cost of the same work on the teacher's device."""
        return replace(self, device_bytes=0.0, teacher_device_bytes=self.device_bytes)

    def work_only(self, *, reads: bool = True) -> Cost:
        """Return the cost without memory and files: what takes time, and is done once more.

        Args:
            reads: whether weights are read again, too.
        """
        return Cost(
            operations=self.operations,
            dealt_operations=self.dealt_operations,
            kernels=self.kernels,
            activations=self.activations,
            layer_calls=self.layer_calls,
            streamed_bytes=self.streamed_bytes,
            exact_terms=self.exact_terms,
            read_bytes=self.read_bytes if reads else 0.0,
            traffic_bytes=self.traffic_bytes,
        )

    def dealt(self) -> Cost:
        """Return the cost of the same work, dealt over the processes of a run."""
        return replace(self, dealt_operations=self.operations)

    def repeated(self, count: float) -> Cost:
        """Return the cost of doing this `count` times: memory and files stay, the rest grows."""
        return replace(
            self,
            operations=count * self.operations,
            dealt_operations=count * self.dealt_operations,
            kernels={kernel: count * number for kernel, number in self.kernels.items()},
            activations=count * self.activations,
            layer_calls=count * self.layer_calls,
            streamed_bytes=count * self.streamed_bytes,
            exact_terms=count * self.exact_terms,
            added_up=tuple(each._replace(times=count * each.times) for each in self.added_up),
            gathered=tuple(each._replace(size=count * each.size) for each in self.gathered),
            read_bytes=count * self.read_bytes,
            traffic_bytes=count * self.traffic_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class CostContext:
    """The two models at one point of a chain of steps, and the texts."""

    teacher: ModelShape
    student: ModelShape
    texts: TextCounts
    teacher_bytes: int
    """Bytes of a number while the teacher computes."""
    student_bytes: int
    """Bytes of a number while the student computes."""
    same: bool
    """Whether the student starts as the teacher itself."""
    anchor: ModelShape | None = None
    """The model that aligners and exact folds see in the teacher's place."""
    stages: int = 0
    """Number of different rotations of the stream that the aligners before this step found."""
    sums: bool = False
    """Whether the capture before this step keeps sums and the rows of a sample."""
    cuts: int = 0
    """At how many places layers of the original student are missing, at most."""
    folded: bool = False
    """Whether a step before has folded the maps that aligners found."""

    @property
    def for_alignment(self) -> CostContext:
        """The context that aligners and exact folds see: an anchor takes the teacher's place."""
        if self.anchor is None:
            return self
        # An anchor has the student's shape, and is taken to compute in the student's dtype.
        return replace(self, teacher=self.anchor, teacher_bytes=self.student_bytes)

    def with_edited_weights(self) -> CostContext:
        """Return the context after an edit of weights, which are kept in the compute dtype."""
        stored = stored_name(self.student_bytes)
        return replace(self, student=replace(self.student, stored=stored))

    def with_student(self, keep: float = 1.0, **config: Any) -> CostContext:
        """Return the context after a step that changes the student's shape.

        Args:
            keep: share of the parameters inside layers that the step leaves.
            config: keys of the student's config with their new values.
        """
        return replace(self, student=self.student.changed(keep, **config))


def states_cost(step: object) -> bool:
    """Return whether a step states its own cost."""
    return hasattr(step, "cost")


def step_cost(step: object, context: CostContext) -> Cost:
    """Return the cost of a step: as the step states it, or that of a plain step of its stage."""
    if not states_cost(step):
        return default_cost(stage_of(type(step)), context)
    cost: Cost = step.cost(context)  # type: ignore[attr-defined]
    return cost


def context_after(step: object, context: CostContext) -> CostContext:
    """Return the context after a step: as the step states it, or that after a plain edit.

    Raises:
        RecipeError: the step's options do not fit this student, for example a cut that is too deep.
    """
    stated = getattr(step, "context_after", None)
    if stated:
        changed: CostContext = stated(context)
        return changed
    stage = stage_of(type(step))
    if stage == "align":
        return replace(context, stages=max(context.stages, 1))
    return context.with_edited_weights() if stage in ("fold", "style") else context


def default_cost(stage: str, context: CostContext) -> Cost:
    """Return the cost of a plain step of a stage."""
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
    """Return the memory of libraries and tokenizers, bytes. Every step needs it."""
    return LIBRARY_BYTES + BYTES_PER_TOKEN * (context.teacher.vocab + context.student.vocab)


def converted_bytes(shape: ModelShape, number: int) -> int:
    """Return the bytes of a parameter in memory when it is read as numbers of `number` bytes.

    A parameter that is stored in this dtype is memory-mapped and takes 0 bytes.
    """
    return 0 if DTYPE_BYTES[shape.stored] == number else number


def logit_bytes(context: CostContext) -> int:
    """Return the bytes of a number where logits are compared: float32 at least."""
    return max(context.student_bytes, FLOAT32_BYTES)


def logits_memory(context: CostContext, rows: float) -> float:
    """Return the memory of a comparison of logits: both heads, and blocks of logits of some rows.

    Args:
        context: the models.
        rows: how many rows are compared; at most `LOGIT_ROWS` of them at once.
    """
    student, teacher, number = context.student, context.teacher, logit_bytes(context)
    per_token = student.width * converted_bytes(student, number)
    per_token += teacher.width * converted_bytes(teacher, number)
    return student.vocab * per_token + _logit_blocks(context, rows)


def logits_device_memory(context: CostContext, rows: float) -> float:
    """Return what a comparison of logits takes of the student's GPU, where no head is mapped."""
    student, teacher = context.student, context.teacher
    heads = student.vocab * (student.width + teacher.width) * logit_bytes(context)
    return heads + _logit_blocks(context, rows)


def _logit_blocks(context: CostContext, rows: float) -> float:
    return LOGIT_BLOCKS * min(LOGIT_ROWS, rows) * context.student.vocab * logit_bytes(context)


def answer_rows(context: CostContext, split: str) -> float:
    """Return how many rows of a split predict tokens of answers.

    Of held-out texts these are the tokens that the teacher may write, of others half of all rows.
    """
    texts = context.texts
    if split == Split.HELDOUT:
        return texts.texts.get(split, 0) * texts.answer_tokens / max(texts.questions_asked, 1)
    return texts.rows.get(split, 0) / 2


def products(operations: float, number: int) -> dict[Kernel, float]:
    """Return products in numbers of `number` bytes by kernel; those in float32 have none."""
    kernel = {2: Kernel.BFLOAT16, 8: Kernel.FLOAT64}.get(number)
    return {kernel: operations} if kernel else {}


def forward_cost(shape: ModelShape, rows: int, number: int) -> Cost:
    """Return the cost of a layer-by-layer forward pass.

    In memory are two layers and half of the one that is read next, the residual stream of all rows,
    and the activations of one batch. The stream stays on the device if it fits there. The figures
    are those of a stream that does not: it is on the host, and is copied twice for every layer.

    Args:
        shape: the model.
        rows: token rows that go through it.
        number: bytes of a number.
    """
    batch_rows = min(rows, BATCH_TOKENS)
    batch = batch_rows * (3 * shape.neurons + 2 * shape.query_width + 4 * shape.width)
    states = rows * shape.width * number
    inside = shape.parameters(inside=True)
    return Cost(
        host_bytes=states,
        device_bytes=(2.5 * shape.layer_parameters + batch) * number,
        operations=2 * inside * rows,
        kernels=products(2 * inside * rows, number),
        activations=training_activations(shape, rows, 1),
        layer_calls=shape.depth * -(-rows // BATCH_TOKENS),
        read_bytes=inside * DTYPE_BYTES[shape.stored],
        traffic_bytes=inside * number + 2 * shape.depth * states,
    )


def generation_cost(
    shape: ModelShape, texts: TextCounts, questions: int, tokens: int, number: int
) -> Cost:
    """Return the cost of generation by a whole model: weights, key/value cache of a batch, logits.

    Prompts are read in a pass, and the system prompt only once. Then all weights pass through the
    processor for each token, whatever the number of answers that grow at once. At the end a few
    answers are confirmed, each in a forward pass of its own.

    Args:
        shape: the model.
        texts: the texts of the run.
        questions: number of questions.
        tokens: tokens of all answers together.
        number: bytes of a number.
    """
    batch = min(questions, ANSWERS_AT_ONCE)
    # Rows of one conversation: the system prompt, a mean text, and a mean answer.
    answer = tokens / max(questions, 1)
    text = mean_text(texts)
    rows = texts.prefix + text + answer
    row_bytes = shape.depth * 2 * shape.kv_width * number
    cache = batch * rows * row_bytes
    weights = shape.parameters() * number
    # Half of a text is its question.
    read = texts.prefix + questions * text / 2 + min(CONFIRMED_ANSWERS, questions) * rows
    steps = answer * -(-questions // ANSWERS_AT_ONCE)
    operations = 2.0 * shape.parameters() * (read + tokens)
    return Cost(
        device_bytes=weights + cache + batch * shape.vocab * 4,
        operations=operations,
        kernels=products(operations, number),
        activations=training_activations(shape, read + tokens, 1),
        layer_calls=shape.depth * steps,
        streamed_bytes=steps * (weights + cache),
        read_bytes=shape.bytes,
        traffic_bytes=weights,
    )


def mean_text(texts: TextCounts) -> float:
    """Return the token rows of a mean text, without the system prompt that all of them share."""
    return (texts.total - texts.prefix) / max(sum(texts.texts.values()), 1)


def comparison_cost(shape: ModelShape, texts: TextCounts, *, without_prefix: bool = False) -> Cost:
    """Return the cost of comparing a model with transformers, in float32.

    Both compute the shortest and the longest text, transformers each by itself.

    Args:
        shape: the model.
        texts: the texts of the run.
        without_prefix: whether each text is also computed without the shared prefix here.
    """
    whole = COMPARED_TEXTS * (texts.prefix + mean_text(texts))
    here = texts.prefix + COMPARED_TEXTS * mean_text(texts) + (whole if without_prefix else 0.0)
    rows = round(here + whole)
    head = shape.vocab * shape.width
    # The body in transformers reads a row no faster than the layers here.
    walk = forward_cost(shape, rows, FLOAT32_BYTES)
    return replace(
        walk,
        device_bytes=shape.parameters() * FLOAT32_BYTES,
        operations=walk.operations + 2.0 * 2 * COMPARED_TEXTS * COMPARED_POSITIONS * head,
        layer_calls=(1 + COMPARED_TEXTS) * shape.depth,
        read_bytes=2 * shape.bytes,
    )


def models_cost(context: CostContext) -> Cost:
    """Return the cost of comparing the models of a run with transformers before the first step."""
    read = context.texts.as_teacher_reads
    cost = comparison_cost(context.teacher, read, without_prefix=True).on_teacher()
    if not context.same:
        cost += comparison_cost(context.student, context.texts, without_prefix=True)
    if context.anchor:
        cost += comparison_cost(context.anchor, context.texts, without_prefix=True)
    return cost


def teacher_answers_cost(context: CostContext) -> Cost:
    """Return the cost of the teacher's own answers, which it writes before the first step."""
    texts = context.texts.as_teacher_reads
    if not texts.questions_asked:
        return Cost()
    return generation_cost(
        context.teacher,
        texts,
        texts.questions_asked,
        texts.answer_tokens,
        context.teacher_bytes,
    ).on_teacher()


def lessons_cost(context: CostContext) -> Cost:
    """Return the cost of the lessons that the teacher writes; what is done with them counts in the
    steps that fit on them."""
    texts = context.texts
    if not texts.lessons:
        return Cost()
    return generation_cost(
        context.teacher, texts, texts.lessons, texts.lesson_tokens, context.teacher_bytes
    ).on_teacher()


def checkpoint_cost(context: CostContext, number: int) -> Cost:
    """Return the cost of saving a variant in numbers of `number` bytes, tensor by tensor.

    What is saved is compared with transformers.
    """
    student = context.student
    largest = student.vocab * student.width
    saved = replace(student, stored=stored_name(number))
    compared = comparison_cost(saved, context.texts).work_only()
    return compared + Cost(
        host_bytes=largest * (context.student_bytes + number),
        disk_bytes=student.parameters() * number,
        read_bytes=student.bytes,
    )


def stored_name(number: int) -> str:
    """Return the name of a dtype whose numbers have so many bytes."""
    return next(name for name, size in DTYPE_BYTES.items() if size == number)


def teacher_states_cost(context: CostContext, rows: int, key: Hashable) -> Cost:
    """Return the cost of the teacher's final states, which all runs under one folder share.

    Args:
        context: the models.
        rows: token rows that go through the teacher.
        key: tells these texts from others.
    """
    number = context.teacher_bytes
    states = float(rows * context.teacher.width * number)
    return replace(
        forward_cost(context.teacher, rows, number).on_teacher(),
        shared_files={("final states", key): states},
    )


def scoring_cost(context: CostContext, rows: int, scored: float) -> Cost:
    """Return the cost of one score: a pass of the student, and the KL to the teacher's states.

    Args:
        context: the models.
        rows: token rows that go through the student.
        scored: rows whose logits are compared.
    """
    student, teacher = context.student, context.teacher
    walk = forward_cost(student, rows, context.student_bytes)
    teacher_states = rows * teacher.width * context.teacher_bytes
    heads = student.vocab * (
        student.width * DTYPE_BYTES[student.stored] + teacher.width * DTYPE_BYTES[teacher.stored]
    )
    return replace(
        walk,
        host_bytes=walk.host_bytes + teacher_states + logits_memory(context, scored),
        device_bytes=max(walk.device_bytes, logits_device_memory(context, scored)),
        operations=walk.operations + 2.0 * scored * student.vocab * (student.width + teacher.width),
        activations=walk.activations + LOGIT_BLOCKS * scored * student.vocab,
        read_bytes=walk.read_bytes + heads,
    )


def acceptance_cost(context: CostContext, guard: bool, limit: float = math.inf) -> Cost:
    """Return the cost of accepting an edit: scores before and after it, and those on the guard.

    Args:
        context: the models and texts.
        guard: whether the KL on the guard's validation half is limited.
        limit: most rows of a split that are scored.
    """
    texts = context.texts
    scored = min(answer_rows(context, Split.VALIDATION), limit)
    cost = scoring_cost(context, texts.rows_of(Split.VALIDATION), scored).repeated(2)
    if guard:
        rows = texts.rows.get(Split.GUARD_VALIDATION, 0)
        cost += scoring_cost(context, rows, min(rows, limit)).repeated(GUARD_SCORES)
    return cost


def training_activations(shape: ModelShape, tokens: float, number: int) -> float:
    """Return the bytes that a backward pass through all layers keeps for some tokens.

    Inputs and outputs of a layer's products are kept, without those of the head.
    """
    return tokens * shape.depth * (14 * shape.width + 6 * shape.neurons) * number


def capture_cost(context: CostContext, student_rows: int | None = None) -> Cost:
    """Return the cost of capturing all models, with the shards that they write.

    Args:
        context: the models and texts. The teacher runs on all texts, an anchor on the student's.
        student_rows: rows of the student; None for all fit and validation rows.
    """
    if student_rows is None:
        student_rows = context.texts.rows_of(Split.FIT, Split.VALIDATION)
    total, number = context.texts.as_teacher_reads.total, context.student_bytes
    cost = forward_cost(context.teacher, total, context.teacher_bytes).on_teacher()
    cost += forward_cost(context.student, student_rows, number)
    shards = shard_bytes(context.teacher, total, context.teacher_bytes)
    shards += shard_bytes(context.student, student_rows, number)
    if context.anchor:
        cost += forward_cost(context.anchor, student_rows, number)
        shards += shard_bytes(context.anchor, student_rows, number)
    # The states of a boundary are held twice while they are written.
    return replace(cost, host_bytes=2 * cost.host_bytes, disk_bytes=shards)


def shard_bytes(shape: ModelShape, rows: int, number: int) -> int:
    """Return the size of a model's captured stream: the rows of every layer boundary."""
    return (shape.depth + 1) * rows * shape.width * number


def stage_count(context: CostContext, tie: int | Literal["all"]) -> int:
    """Return how many stages an aligner solves: `tie` layer boundaries share a rotation."""
    return 1 if tie == "all" else -(-(context.student.depth + 1) // tie)


def alignment_cost(context: CostContext, stages: int = 1) -> Cost:
    """Return the cost of an aligner of the residual stream.

    In memory are both streams of one boundary, a chunk of rows in float64, the moments, and the
    rotations. Each stage is solved twice, for its rows and for shuffled ones.

    Args:
        context: the models and texts.
        stages: number of rotations.
    """
    context = context.for_alignment
    student, teacher = context.student, context.teacher
    rows = context.texts.rows_of(Split.FIT)
    read = 2 * rows * (student.width + teacher.width) * context.student_bytes
    made = 4.0 * rows * student.width * teacher.width
    if context.sums:
        # Sums are read and not made. Thresholds and diagnostics still need the sample's rows.
        rows = context.texts.sampled.rows_of(Split.FIT)
        read = (2 * student.width * teacher.width + teacher.width**2) * FLOAT64_BYTES
        made = 0.0
    streams = rows * (student.width + teacher.width) * context.student_bytes
    chunks = min(rows, MOMENT_ROWS) * (student.width + 2 * teacher.width) * FLOAT64_BYTES
    matrices = 6 * teacher.width**2 + 4 * student.width * teacher.width
    rotations = stages * student.width * teacher.width * FLOAT64_BYTES
    solved = 2 * stages * SVD_OPERATIONS * teacher.width**3
    return Cost(
        host_bytes=streams + chunks + matrices * FLOAT64_BYTES + rotations,
        disk_bytes=rotations,
        operations=made * (student.depth + 1) + solved,
        kernels={
            Kernel.FLOAT64: made * (student.depth + 1),
            Kernel.DECOMPOSITIONS: solved,
        },
        read_bytes=read * (student.depth + 1),
    )


def assignment_cost(context: CostContext, pairs: int | None = None) -> Cost:
    """Return the cost of an assignment of heads and neurons by weights.

    In memory are one layer of each model twice, in float64, and the similarities of their neurons.

    Args:
        context: the models.
        pairs: pairs of layers that are compared; None for one of each of the student's layers.
    """
    context = context.for_alignment
    student, teacher = context.student, context.teacher
    pairs = student.depth if pairs is None else pairs
    layers = 2 * (student.layer_parameters + teacher.layer_parameters) * FLOAT64_BYTES
    similarities = 3 * student.neurons * teacher.neurons
    # The student's layer is taken into the teacher's basis first.
    rotation = 2.0 * student.layer_parameters * teacher.width
    circuits = 8.0 * student.query_width * teacher.query_width * teacher.width
    compared = 2.0 * similarities * teacher.width
    solve = ASSIGNMENT_OPERATIONS * min(student.neurons, teacher.neurons) ** 3
    read = student.layer_parameters * DTYPE_BYTES[student.stored]
    read += teacher.layer_parameters * DTYPE_BYTES[teacher.stored]
    return Cost(
        host_bytes=layers + similarities * FLOAT64_BYTES,
        disk_bytes=permutation_bytes(student),
        operations=pairs * (rotation + circuits + compared + solve),
        kernels={Kernel.FLOAT64: pairs * (rotation + circuits + compared)},
        read_bytes=pairs * read,
    )


def permutation_bytes(student: ModelShape) -> int:
    """Return the size of the permutations of a student's heads and neurons."""
    kept = student.depth * (student.neurons + student.query_width + student.kv_width)
    return kept * FLOAT64_BYTES


def edit_cost(context: CostContext) -> Cost:
    """Return the cost of a plain edit of all weights."""
    numbers = context.student.parameters()
    return Cost(
        host_bytes=numbers * context.student_bytes,
        disk_bytes=numbers * context.student_bytes,
        operations=2.0 * numbers * context.texts.total,
        read_bytes=context.student.bytes,
    )


def evaluation_cost(context: CostContext) -> Cost:
    """Return the cost of comparing a variant with the teacher on held-out and guard texts."""
    student, teacher, texts = context.student, context.teacher, context.texts
    rows = texts.rows_of(Split.HELDOUT, Split.GUARD)
    walk = forward_cost(student, rows, context.student_bytes)
    compared = max(answer_rows(context, Split.HELDOUT), texts.rows.get(Split.GUARD, 0))
    logits = logits_memory(context, compared)
    frames = 0.0
    # Two models of different bases are compared through a rotation per layer, solved one by one
    # from some fit rows at a time: the sum, its SVD, and the rows.
    if not context.same:
        frames = 4 * student.width * teacher.width * FLOAT64_BYTES
        rows_at_once = min(texts.rows_of(Split.FIT), WIDENED_ROWS)
        frames += rows_at_once * (student.width + teacher.width) * FLOAT64_BYTES
    heads = 2.0 * rows * student.vocab * (student.width + teacher.width)
    return replace(
        walk,
        host_bytes=walk.host_bytes + logits + frames,
        device_bytes=max(walk.device_bytes, logits_device_memory(context, compared)),
        operations=walk.operations + heads,
        activations=walk.activations + float(LOGIT_BLOCKS * rows * student.vocab),
    )
