"""Options of `prompt-kl`: LoRA distillation on the teacher's own continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.data.splits import Split
from rotdistill_core.planning.cost import Cost, CostContext, forward_cost

if TYPE_CHECKING:
    from rotdistill_core import Pair, Progress, Samples, StepOutput, Weights


@step
class PromptKl:
    """Train a LoRA on the teacher's own continuations for a short time; fold it into the weights.

    The loss is the KL to the teacher on the tokens that it wrote. No capture is needed. The
    weights do not change if validation KL does not fall by more than chance, over texts.
    """

    use: Literal["prompt-kl"] = "prompt-kl"
    train: Literal["lora", "head"] = "lora"
    """`"lora"`: a LoRA on every linear layer of attention and MLP. `"head"`: only on the head,
    which is untied first."""
    rank: PositiveInt = 16
    """Rank of the LoRA `B A`. Its scale s is 2."""
    prompts_from: Annotated[tuple[Literal["places", "questions"], ...], Field(min_length=1)] = (
        "places",
    )
    """What the teacher continues: `"places"` (system prompt and a place name), `"questions"` (its
    answers to the questions of the texts, `samples.own_answers`), or both."""
    shard: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Train on the k-th of n shards of the fit texts: `[2, 3]` is the second third. Steps trained
    on different shards can be merged (`soups`)."""
    max_prompts: PositiveInt = 200
    """Most place names, of fit and validation texts together."""
    max_new_tokens: Annotated[int, Field(ge=1, le=256)] = 32
    """Most tokens of a continuation of a place name."""
    max_epochs: PositiveInt = 3
    """Most passes over the continuations; `patience` may end training earlier."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate of AdamW, after a warm-up and before a linear decay."""
    bfloat16: bool = False
    """Multiply in bfloat16 while training: four times as fast on a GPU or a processor with AMX,
    slow on others."""
    batch_size: PositiveInt = 4
    """Continuations in one step of training."""
    patience: PositiveInt = 2
    """Stop after so many evaluations of the validation KL in a row without gain. There are two an
    epoch."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first A and of the order of texts."""
    guard: Annotated[float, Field(ge=1)] | None = None
    """Apply only so much of the LoRA (all, 1/2, 1/4, 1/10) that the KL on the guard's validation
    half is at most this multiple of the KL before (1.02: 2 % worse)."""

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a shard that does not exist."""
        k, n = self.shard
        if k > n:
            raise ValueError(f"shard: there is no shard {k} of {n}")

    def cost(self, context: CostContext) -> Cost:
        """The whole student, activations of a batch, and the teacher's final states."""
        student, teacher, texts = context.student, context.teacher, context.texts
        number = context.student_bytes
        rows = texts.rows_of(Split.FIT, Split.VALIDATION)
        count = max(texts.texts.get(Split.FIT, 0) + texts.texts.get(Split.VALIDATION, 0), 1)
        length = (rows - texts.prefix) / count + texts.prefix

        # Kept for the backward pass: inputs and outputs of a layer's products, and the logits.
        per_layer = 14 * student.width + 6 * student.neurons
        per_token = student.depth * per_layer + 4 * student.vocab
        activations = self.batch_size * length * number * per_token
        # Half of the texts are the teacher's own answers to questions.
        prompts = {"places": min(self.max_prompts, count / 2), "questions": count / 2}
        continuations = sum(prompts[source] for source in self.prompts_from)
        trained = continuations * length * self.max_epochs
        speed = 4 if self.bfloat16 else 1

        edited = student.parameters(inside=True) * number
        heads = student.vocab * (student.width + teacher.width) * number
        states = rows * teacher.width * number
        teacher_forward = forward_cost(teacher, rows, context.teacher_bytes)
        whole = student.parameters() * number
        return Cost(
            host_bytes=states + edited + heads,
            device_bytes=whole + activations,
            disk_bytes=states + edited,
            operations=6.0 * student.parameters() * trained / speed + teacher_forward.operations,
            read_bytes=student.bytes + teacher_forward.read_bytes,
            traffic_bytes=whole + teacher_forward.traffic_bytes,
        )

    @hookimpl
    def style(
        self, weights: Weights, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> Weights:
        """See `HookSpecs.style`."""
        from rotdistill_prompt_kl._method import distil

        return distil(self, weights, pair, samples, out, progress)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [PromptKl]
