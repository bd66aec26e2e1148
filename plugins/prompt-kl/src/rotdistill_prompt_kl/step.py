"""Options of `prompt-kl`: LoRA distillation on the teacher's own continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.data.shards import WHOLE, Shard, require_shard
from rotdistill_core.data.vocabularies import require_one_vocabulary
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.guard import Guard
from rotdistill_core.forward.ranks import ALONE
from rotdistill_core.planning.cost import Cost, CostContext
from rotdistill_prompt_kl._cost import prompt_kl_cost

if TYPE_CHECKING:
    from rotdistill_core import (
        ActivationStore,
        Pair,
        Progress,
        Ranks,
        Samples,
        StepOutput,
        Weights,
    )

LORA_RATE = 5e-4
FULL_RANK_RATE = 5e-5


@step
class PromptKl:
    """Train a LoRA on the teacher's own continuations for a short time; fold it into the weights.

    The loss is the KL to the teacher on the tokens that it wrote. No capture is needed; captured
    states of the teacher are used where there are any. The weights do not change if validation KL
    does not fall by more than chance, over texts.
    """

    use: Literal["prompt-kl"] = "prompt-kl"
    train: Literal["lora", "head"] = "lora"
    """`"lora"`: a LoRA on every linear layer of attention and MLP. `"head"`: only on the head,
    which is untied first."""
    rank: PositiveInt | Literal["full"] = 16
    """Rank of the LoRA `B A`, whose scale s is 2. `"full"`: no LoRA, these matrices themselves
    train, which takes the memory of twelve copies of them in float32 (`plan`)."""
    prompts_from: Annotated[
        tuple[Literal["topics", "questions", "places"], ...], Field(min_length=1)
    ] = ("topics",)
    """What the teacher continues: `"topics"` (system prompt and a topic, such as the name of a
    place, of texts that have one; `"places"` is its older name), `"questions"` (its answers to the
    questions of the texts, which `samples.own_answers` or `lessons.count` makes), or both."""
    shard: Shard = WHOLE
    """Train on the k-th of n shards of the fit texts: `[1, 3]` is every third question, `[-1, 3]`
    all others. A step behind a refit learns more from texts that were not refitted (`shard` there);
    steps trained on different shards can be merged (`soups`)."""
    max_prompts: PositiveInt = 200
    """Largest number of topics, of fit and validation texts together."""
    max_new_tokens: Annotated[int, Field(ge=1, le=256)] = 32
    """Largest number of tokens of a continuation of a topic."""
    max_epochs: PositiveInt = 3
    """Largest number of passes over the continuations; `patience` may end training earlier."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of AdamW, after a warm-up and before a linear decay. By default 5e-4 for a
    LoRA, and 5e-5 for `rank = "full"`."""
    bfloat16: bool = False
    """Multiply in bfloat16 while training: faster on a GPU and on a processor with AMX or
    AVX512-BF16, slow on others. The heads stay in float32."""
    batch_size: PositiveInt = 4
    """Continuations in one step of training."""
    micro_batch_size: PositiveInt = 1
    """Continuations that go through the student at once: more are faster, and take more memory.
    Gradients of a step add up, so the result changes only by rounding. Each process takes so many
    at a time."""
    loss: Literal["forward", "reverse", "jensen-shannon"] = "forward"
    """What training minimises: `"forward"`, the KL from teacher to student; `"reverse"`, the KL
    from student to teacher; or `"jensen-shannon"`, between the two. Validation and acceptance go by
    the forward KL."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the Jensen-Shannon divergence: near 0 it learns as with the forward
    KL, near 1 as with the reverse one."""
    patience: PositiveInt = 2
    """Stop after so many evaluations of the validation KL in a row without gain. There are two an
    epoch."""
    on_policy: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the fit texts that the student answers itself, at the beginning of each epoch anew;
    it learns the teacher's predictions on them. An answer is at most as long as the teacher's."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Temperature of the student's answers (`on_policy`); 0 takes the best token."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first A, of the order of texts, and of what the student's answers draw."""
    guard: Guard | None = None
    """Apply only so much of the LoRA (all, 1/2, 1/4, 1/10) that the KL on the guard's validation
    half is at most this multiple of the KL before, or 0.05 nats; the reported half may differ. By
    default 1.02 (2 % worse) where the recipe has guard texts; `"off"` for no limit."""

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse options that cannot be."""
        require_shard(self.shard)
        if self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size: a step of training has only batch_size = {self.batch_size} "
                "continuations"
            )

    @property
    def makes_texts(self) -> bool:
        """Whether it is judged on texts of its own: the teacher's continuations of topics."""
        return self.continues_topics

    @property
    def continues_topics(self) -> bool:
        """Whether the teacher continues topics."""
        return not {"topics", "places"}.isdisjoint(self.prompts_from)

    @property
    def peak_rate(self) -> float:
        """The peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_RANK_RATE if self.rank == "full" else LORA_RATE

    @property
    def loss_name(self) -> str:
        """What training minimises, in the words of the field."""
        return {"forward": "KL", "reverse": "reverse KL", "jensen-shannon": "JSD"}[self.loss]

    def cost(self, context: CostContext) -> Cost:
        """The teacher writes and is run, the whole student trains, and the result is scored."""
        return prompt_kl_cost(self, context)

    def context_after(self, context: CostContext) -> CostContext:
        """Weights are edited; a head that trains is a tensor of its own."""
        edited = context.with_edited_weights()
        if self.train == "head":
            return edited.with_student(tie_word_embeddings=False)
        return edited

    def check_models(self, pair: Pair) -> None:
        """Raise what two tokenizers, or fused projections, would end with.

        Raises:
            RecipeError: the student's projections are fused.
            SetupError: they give different ids to the same tokens.
        """
        require_one_vocabulary(pair)
        if pair.student.adapter.fused:
            raise RecipeError(
                f"prompt-kl: models of type {pair.student.config['model_type']} have fused "
                "projections, on which no LoRA is trained here. Leave the step out."
            )

    @hookimpl
    def style(
        self,
        weights: Weights,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
        activations: ActivationStore | None = None,
        ranks: Ranks | None = None,
    ) -> Weights:
        """See `HookSpecs.style`. Captured states are used if there are any."""
        from rotdistill_prompt_kl._method import distil

        return distil(self, weights, activations, pair, samples, out, progress, ranks or ALONE)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [PromptKl]
