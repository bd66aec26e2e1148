"""The `soups` step: options, cost, and the hook."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.guard import Guard
from rotdistill_core.forward.ranks import ALONE
from rotdistill_core.planning.cost import Cost, CostContext
from rotdistill_soups._cost import soup_cost

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.forward.ranks import Ranks
    from rotdistill_core.store.output import StepOutput


NORMALISED = ("uniform", "greedy", "fisher", "slerp")
"""Methods whose weights are shares: they are divided by their sum."""
LARGEST = 1e6
"""Factor of parameters beyond which sums of them may overflow."""
IngredientWeights = tuple[float, ...]
"""One number for each ingredient."""


@step
class Soups:
    """Merge checkpoints and LoRA adapters into the student, parameter by parameter, out of core.

    The result keeps the student's tokens and basis. Where the soup's validation KL is no better
    beyond chance, the student is kept as it is.
    """

    use: Literal["soups"] = "soups"
    ingredients: Annotated[tuple[str, ...], Field(min_length=1)]
    """Checkpoints and LoRA folders: folders, hub ids, other model references, `run:NAME/VARIANT`
    for a variant of an earlier run, `student` for the student as the earlier steps left it."""
    method: Literal["uniform", "greedy", "fisher", "task-arithmetic", "ties", "slerp", "lora"] = (
        "uniform"
    )
    """How they are merged; the plugin's README has the formulas."""
    weights: IngredientWeights = ()
    """One for each ingredient. Without them all are alike, with sum 1. Shares of a mean are divided
    by their sum, others are taken as they are."""
    tensors: dict[str, IngredientWeights] = field(default_factory=dict)
    """Other weights for parameters whose names match a pattern: `{"*.mlp.*" = [1, 0]}`. The last
    pattern that matches counts."""
    layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    """First and last layer that are merged. Everything else, embedding and head too, stays the
    student's. Without it all parameters are merged."""
    scaling: float = 1.0
    """λ, the factor of the differences from the student, for `task-arithmetic`, `ties` and
    `lora`."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of each difference that `ties` keeps: its largest entries, parameter by parameter."""
    rank: PositiveInt | None = None
    """Reduce the sum of LoRAs to this rank by SVD; the notes give the error. Without it the sum is
    exact."""
    replay_folds: tuple[str, ...] | None = None
    """Ids of the exact folds that changed the student's basis after the LoRAs were trained; the
    LoRAs are transformed the same way, in the order of the steps. `[]` if there are none."""
    same_basis: Literal["require", "align", "ignore"] = "require"
    """`"require"`: ingredients in another basis than the student's are refused. `"align"`: they are
    brought to it first, from weights alone. `"ignore"`: they are merged all the same."""
    fisher_texts: PositiveInt = 32
    """`fisher`: number of fit texts."""
    fisher_labels: Literal["sampled", "texts"] = "sampled"
    """`fisher`: draw the labels from the model's predictions. `"texts"` takes the texts' own tokens
    (the empirical Fisher, a shortcut)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """`fisher`: seed of the sampled labels."""
    guard: Guard | None = None
    """With `require_improvement`: apply only so much of the soup (all, 1/2, 1/4, 1/10) that the KL
    on the guard's validation half is at most this multiple of the KL before, or 0.05 nats; the
    reported half may differ. By default 1.02 (2 % worse) where the recipe has guard texts; `"off"`
    for no limit."""
    require_improvement: bool = True
    """Keep the student where the soup's validation KL is no better beyond chance. `false` needs no
    teacher."""

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse weights that do not belong to the ingredients, or that give a mean of nothing."""
        self._check_weights()
        if self.method == "greedy" and (self.weights or self.tensors):
            raise ValueError(
                "greedy chooses the ingredients and weighs them alike; leave out weights and "
                "tensors"
            )
        if self.method == "slerp" and len(self.ingredients) != 2:
            raise ValueError(
                f"slerp goes from one ingredient to another; name two, not {len(self.ingredients)}"
            )
        if self.rank and self.method != "lora":
            raise ValueError('rank is of the sum of LoRAs; it needs method = "lora"')

    def _check_weights(self) -> None:
        count = len(self.ingredients)
        if self.weights and len(self.weights) != count:
            raise ValueError(f"weights: {len(self.weights)} weights for {count} ingredients")
        for pattern, weights in self.tensors.items():
            if len(weights) != count:
                raise ValueError(f"{pattern}: {len(weights)} weights for {count} ingredients")
        for name, weights in {"weights": self.weights, **self.tensors}.items():
            if weights and self.method in NORMALISED and sum(weights) == 0:
                raise ValueError(
                    f"{name}: the weights of a mean sum to 0, so there is nothing to divide by; "
                    "change one of them"
                )
            factor = self._largest_factor(weights)
            if not factor <= LARGEST:
                raise ValueError(
                    f"{name}: parameters would be multiplied by {factor:.3g}, of which sums "
                    f"overflow; up to {LARGEST:.0e} are taken"
                )

    def _largest_factor(self, weights: IngredientWeights) -> float:
        """Return what parameters are multiplied by, in all: shares of a mean, or scaled weights."""
        size = sum(abs(weight) for weight in weights)
        if self.method in NORMALISED:
            return size / abs(sum(weights)) if weights else 1.0
        return (size if weights else 1.0) * max(1.0, abs(self.scaling))

    def inputs(self) -> list[str]:
        """Return the content of the ingredients, on which the result depends too."""
        from rotdistill_soups._ingredients import digest_of

        return [digest_of(reference) for reference in self.ingredients]

    def check_models(self, pair: Pair) -> None:
        """Refuse ingredients that cannot be merged into the student, before any work.

        Raises:
            RecipeError: of an ingredient; or Fisher weights are asked for, and the student's
                projections are fused.
            SetupError: an ingredient is missing or torn.
        """
        from rotdistill_soups._ingredients import check_ingredients

        if self.method == "fisher" and pair.student.adapter.fused:
            raise RecipeError(
                f"soups: models of type {pair.student.config['model_type']} have fused "
                "projections, whose gradients are not taken here. Choose another method than "
                '"fisher".'
            )
        check_ingredients(self.ingredients, pair)

    def cost(self, context: CostContext) -> Cost:
        """Every parameter of all parts, out of core, and the passes that score merged models."""
        return soup_cost(self, context)

    def context_after(self, context: CostContext) -> CostContext:
        """Weights are edited; aligning an ingredient folds the norms, which unties the head."""
        edited = context.with_edited_weights()
        if self.same_basis == "align":
            return edited.with_student(tie_word_embeddings=False)
        return edited

    @hookimpl
    def fold(
        self,
        weights: Weights,
        pair: Pair,
        samples: Samples,
        out: StepOutput,
        progress: Progress,
        ranks: Ranks | None = None,
    ) -> Weights:
        """See `HookSpecs.fold`."""
        from rotdistill_soups._method import merge_into_student

        return merge_into_student(self, weights, pair, samples, out, progress, ranks or ALONE)


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Soups]
