"""The step `writer-refit`: its options and its cost. The mathematics is in `_method`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from rotdistill_core import hookimpl, step
from rotdistill_core.data.batching import BATCH_TOKENS
from rotdistill_core.data.shards import WHOLE, Shard, require_shard, share_of
from rotdistill_core.data.splits import Split
from rotdistill_core.data.vocabularies import require_one_vocabulary
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.guard import Guard, is_guarded
from rotdistill_core.forward.ranks import ALONE
from rotdistill_core.planning.cost import (
    FLOAT64_BYTES,
    Added,
    Cost,
    CostContext,
    Gathered,
    Kernel,
    acceptance_cost,
    answer_rows,
    forward_cost,
)
from rotdistill_core.plugin.caveats import Caveat, ridge_caveats

if TYPE_CHECKING:
    from rotdistill_core import (
        ActivationStore,
        Maps,
        Pair,
        Progress,
        Ranks,
        Samples,
        StepOutput,
        Weights,
    )
    from rotdistill_core.architecture.table import Adapter, Config

Positive = Annotated[float, Field(gt=0)]
ROW_BYTES = 12 * FLOAT64_BYTES
"""Bytes of a row in memory for each pass: its places in batches, its owner, and its weight."""
SCORED_ROWS = 1024
"""Number of rows, evenly spread over a split, that are scored at most."""
SCORES = 3
"""Scores beside the guard's: on texts for validation before and after, and on texts to fit on."""


@step
class WriterRefit:
    """Refit writers in closed form so that the student's stream follows the teacher's.

    Layers are solved in order. Models of different bases need an aligner before this step. The
    step leaves the weights as they were if validation KL does not fall by more than chance.
    """

    use: Literal["writer-refit"] = "writer-refit"
    features: Literal["activations", "output"] = "activations"
    """Input of the regression: the writer's `"activations"` (f x d unknowns per layer), or the
    MLP's `"output"` (d x d unknowns, the published form)."""
    writers: Annotated[tuple[Literal["heads", "neurons"], ...], Field(min_length=1)] = ("neurons",)
    """The writers of a layer to refit, in this order: `"heads"` is o_proj, `"neurons"` is
    down_proj. `"output"` features allow only `"neurons"`."""
    row_weighting: Literal["rms", "plain", "distinct"] = "rms"
    """`"rms"`: weight a row by 1/RMS² of its target, shorten sinks, and weight shared prompt,
    sinks and teacher answers as below. `"plain"`: every token of every text counts 1, so the shared
    prompt counts once for each text. `"distinct"`: the same, but the shared prompt counts once."""
    prompt_weight: Annotated[float, Field(ge=0)] = 0.09375
    """Weight of a row of the shared prompt for each text to fit on: the row is stored once and
    attended to by every text. Only with `row_weighting = "rms"`."""
    sink_weight: Annotated[float, Field(ge=0)] = 3.125
    """Weight of an attention sink (position 0 and massive activations) for each text to fit on that
    attends to it: all of them in the shared prompt, one elsewhere. Only with
    `row_weighting = "rms"`."""
    teacher_answer_weight: Annotated[float, Field(ge=0)] = 4.0
    """Weight of a row that predicts an answer written by the teacher (`samples.own_answers`).
    Only with `row_weighting = "rms"`."""
    ridge: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.03, 0.3, 3.0)
    """Candidates for λ, as multiples of the mean diagonal of the normal equations, `AᵀA`."""
    layers: Literal["all", "cut"] = "all"
    """`"all"`: every layer whose stream differs from the teacher's. `"cut"`: only the last layer
    before each cut."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Interpolation between the student's state (0) and the teacher's (1), used as the target. Use
    less than 1 when the models differ in basis."""
    shard: Shard = WHOLE
    """Fit on the k-th of n shards of the fit texts: `[1, 3]` is every third question, `[-1, 3]` all
    others. Training that follows (`prompt-kl`) learns more from texts that were not fitted."""
    guard: Guard | None = None
    """Largest KL allowed on the guard's validation half, as a multiple of the KL before; 0.05 nats
    are always allowed. The refit is scaled to 1, 1/2, 1/4 or 1/10 to stay below it, or dropped. The
    reported half may differ. By default 1.02 (2 % worse) where the recipe has guard texts; `"off"`
    for no limit."""

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse options that do not go together."""
        require_shard(self.shard)
        if self.features == "output" and self.writers != ("neurons",):
            raise ValueError(
                'features = "output" is a map of the MLP\'s output; writers must be ["neurons"]'
            )

    def cost(self, context: CostContext) -> Cost:
        """Passes of each refitted layer, its normal equations, and the scores of the result.

        A layer takes a pass to go on, and one more for each of its writers that is refitted. The
        teacher walks beside the student once, and, where the bases differ, the student as it was
        captured. What each of them has at the boundary at hand lies in a file for so long; in
        memory are a few numbers of each row.

        Work is that of the layers behind the first cut, where those before it are the teacher's;
        memory and disk are enough for a cut at the first layer.
        """
        counts = context.texts.with_fit_share(share_of(self.shard))
        context = replace(context, texts=counts)
        student, number = context.student, context.student_bytes
        width = student.width
        rows = context.texts.rows_of(Split.FIT, Split.VALIDATION)
        forward = _in_files(forward_cost(student, rows, number), rows)
        beside = _walks_beside(context)
        site_widths = {"neurons": student.neurons, "heads": student.query_width}
        widths = [site_widths[writer] for writer in self.writers]
        walked = student.depth - _layers_like_the_teacher(context)
        most = student.depth if self.layers == "all" else min(context.cuts, student.depth)
        refitted = min(most, walked)
        writer_bytes = most * sum(widths) * width * number

        # Unknowns of a regression: the writer's inputs, or the channels of the MLP's output.
        inputs = [width] if self.features == "output" else widths
        largest = max(inputs)
        # Of one batch: the teacher's rows, their product, and targets in the student's dtype.
        at_once = min(rows, BATCH_TOKENS)
        targets = at_once * (context.teacher.width + 2 * width) * FLOAT64_BYTES
        moments = (7 * largest**2 + 6 * largest * width) * FLOAT64_BYTES
        # Two splits, each with two integers for an entry.
        sums = sum(n * (n + width) for n in inputs) * 2 * 2 * FLOAT64_BYTES
        products = sum(2.0 * rows * n * (n + width) for n in inputs)
        # A candidate: Cholesky, its two triangular solves, and its step on other rows. Candidates
        # are shared, but over so many processes only as there are: they count as those of one.
        candidate = sum(n**3 / 3 + 4.0 * n**2 * width for n in inputs)
        solutions = sum(n * width for n in inputs) * refitted * FLOAT64_BYTES
        solves = products + len(self.ridge) * candidate

        scored = min(answer_rows(context, Split.VALIDATION), SCORED_ROWS)
        final_states = scored * context.teacher.width * context.teacher_bytes
        scores = acceptance_cost(context, is_guarded(self.guard, context.texts), SCORED_ROWS)
        walks = forward.host_bytes + beside.host_bytes
        regression = walks + targets + moments if refitted else walks
        passes = (walked + len(self.writers) * refitted) / student.depth
        # Each batch of texts adds a term to every sum; its fit rows and its others are apart.
        entries = sum(n * (n + width) for n in inputs)
        work = forward.work_only().repeated(passes) + beside.work_only() + scores.work_only()
        return replace(
            work,
            host_bytes=max(regression, scores.host_bytes) + writer_bytes,
            device_bytes=max(forward.device_bytes + beside.device_bytes, scores.device_bytes),
            teacher_device_bytes=beside.teacher_device_bytes,
            disk_bytes=2 * writer_bytes + forward.disk_bytes + beside.disk_bytes,
            operations=work.operations + refitted * solves,
            dealt_operations=work.operations + refitted * products,
            kernels={
                **work.kernels,
                Kernel.SOLVES: refitted * len(self.ridge) * candidate,
            },
            exact_terms=float(refitted * entries * 2 * -(-rows // BATCH_TOKENS)),
            # Each score takes the teacher's final states of its rows to all processes.
            added_up=(Added(sums, refitted), Added(final_states, SCORES)),
            gathered=(Gathered(solutions, len(self.ridge)),),
            read_bytes=forward.read_bytes + beside.read_bytes + scores.read_bytes,
        )

    def caveats(self) -> list[Caveat]:
        """Return that the regression is not regularised, where its ridge is as good as none."""
        return ridge_caveats(self.ridge)

    def check_models(self, pair: Pair) -> None:
        """Raise what two tokenizers, or norms after the student's writers, would end with.

        Raises:
            RecipeError: see `check_writers`.
            SetupError: they give different ids to the same tokens.
        """
        require_one_vocabulary(pair)
        self.check_writers(pair.student.adapter, pair.student.config)

    def check_writers(self, adapter: Adapter, config: Config) -> None:
        """Refuse writers that do not write into the stream themselves.

        Raises:
            RecipeError: a norm stands between them and the stream.
        """
        if set(self.writers) <= set(adapter.writers):
            return
        can = ", ".join(f'"{name}"' for name in adapter.writers)
        remedy = f"Set writers = [{can}]." if can else "Leave the step out."
        raise RecipeError(
            f"writer-refit: in models of type {config['model_type']} a norm stands between writers "
            f"and stream. {remedy}"
        )

    @hookimpl
    def fold(
        self,
        weights: Weights,
        maps: Maps,
        activations: ActivationStore,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
        ranks: Ranks | None = None,
    ) -> Weights:
        """See `HookSpecs.fold`."""
        from rotdistill_writer_refit._method import solve
        from rotdistill_writer_refit._targets import TeacherTargets

        targets = TeacherTargets(weights, maps, activations, pair, samples)
        return solve(self, targets, out, progress, ranks or ALONE)


def _layers_like_the_teacher(context: CostContext) -> int:
    """Return about how many layers before the first cut compute what the teacher's do.

    Nobody knows where a cut will lie before it is made. Cuts count as evenly spread.
    """
    student, teacher = context.student, context.teacher
    inside = [(each.width, each.neurons, each.query_width) for each in (student, teacher)]
    if not context.same or not context.cuts or inside[0] != inside[1]:
        return 0
    return student.depth // (context.cuts + 1)


def _walks_beside(context: CostContext) -> Cost:
    """Return the cost of what walks beside the student: the teacher, and maybe its own start."""
    read = context.texts.as_teacher_reads.rows_of(Split.FIT, Split.VALIDATION)
    theirs = _in_files(forward_cost(context.teacher, read, context.teacher_bytes), read)
    if context.same:
        return theirs.on_teacher()
    rows = context.texts.rows_of(Split.FIT, Split.VALIDATION)
    own = _in_files(forward_cost(context.student, rows, context.student_bytes), rows)
    both = own + theirs.on_teacher()
    return replace(both, host_bytes=own.host_bytes + theirs.host_bytes)


def _in_files(walk: Cost, rows: int) -> Cost:
    """Return the cost of a forward pass of some rows whose states lie in a file."""
    return replace(walk, host_bytes=rows * ROW_BYTES, disk_bytes=walk.host_bytes)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [WriterRefit]
