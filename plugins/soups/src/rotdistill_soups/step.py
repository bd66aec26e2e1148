"""Merge checkpoints and LoRA adapters into the student, parameter by parameter, out of core and in one basis.

`uniform`, `greedy` and `fisher` are means `Σ w_i x_i / Σ w_i`; `task-arithmetic`, `ties` and `lora` add differences from the student,
`x + λ Σ w_i (x_i - x)`; `slerp` goes along the arc between two. (Wortsman et al., Model Soups, arXiv:2203.05482; Ilharco et al., Editing
Models with Task Arithmetic, arXiv:2212.04089; for the others see where they are made.) Averages make sense in one basis only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, edit_cost

if TYPE_CHECKING:
    import torch

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import Samples
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_soups._ingredient_set import IngredientSet
    from rotdistill_soups._kl_scorer import KLScorer
    from rotdistill_soups._merge import Ingredient, Mixer


MEANS = ("uniform", "greedy", "fisher")
Shares = tuple[float, ...]


@step
class Soups:
    """Merge checkpoints and LoRA adapters into the student, out of core; the result keeps the student's tokens and basis.

    The student is kept as it is where the soup's validation KL is no better beyond chance.
    """

    use: Literal["soups"] = "soups"
    ingredients: Annotated[tuple[str, ...], Field(min_length=1)]
    """Checkpoints and LoRA folders: folders, hub ids, other model references, `run:NAME/VARIANT` for a variant of an earlier run,
    `student` for the student as the steps before left it."""
    method: Literal["uniform", "greedy", "fisher", "task-arithmetic", "ties", "slerp", "lora"] = (
        "uniform"
    )
    """How they are merged; the plugin's README has the formulas."""
    weights: Shares = ()
    """One per ingredient; without them all alike, of sum 1. Shares of a mean are divided by their sum, others are taken as they are."""
    tensors: dict[str, Shares] = field(default_factory=dict)
    """Other weights for parameters whose names match a pattern: `{"*.mlp.*" = [1, 0]}`. The last pattern that matches counts."""
    layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    """First and last layer that are merged; everything else, embedding and head too, stays the student's. Without it all are merged."""
    strength: float = 1.0
    """λ, the factor of the differences from the student, for `task-arithmetic`, `ties` and `lora`."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of each difference that `ties` keeps, its largest entries, parameter by parameter."""
    rank: PositiveInt | None = None
    """Bring the sum of LoRAs to this rank by SVD; the notes say what is lost. Without it the sum is exact."""
    through: tuple[str, ...] | None = None
    """Ids of the exact folds that the student has been through since the LoRAs were trained; `[]` if none."""
    same_basis: Literal["require", "align", "ignore"] = "require"
    """`"require"`: ingredients in another basis than the student's are refused. `"align"`: they are brought to it first, from weights
    alone. `"ignore"`: they are merged all the same."""
    texts: PositiveInt = 32
    """`fisher`: how many fit texts."""
    labels: Literal["sampled", "texts"] = "sampled"
    """`fisher`: labels drawn from the model's predictions; `"texts"` takes the texts' own tokens (the empirical Fisher, a shortcut)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sampled labels."""
    only_better: bool = True
    """Keep the student where the soup's validation KL is no better beyond chance. `false` needs no teacher."""

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse weights that do not belong to the ingredients, or give a mean of nothing."""
        n = len(self.ingredients)
        for where, shares in {"weights": self.weights, **self.tensors}.items():
            if len(shares) != n and (shares or where != "weights"):
                raise ValueError(f"{where}: {len(shares)} weights for {n} ingredients")
            if shares and self.method in (*MEANS, "slerp") and sum(shares) == 0:
                raise ValueError(
                    f"{where}: the weights of a mean sum to 0, so there is nothing to divide by; change one of them"
                )
        if self.method == "greedy" and (self.weights or self.tensors):
            raise ValueError(
                "greedy chooses the ingredients and weighs them alike; leave out weights and tensors"
            )
        if self.method == "slerp" and n != 2:
            raise ValueError(f"slerp goes from one ingredient to another; name two, not {n}")
        if self.rank and self.method != "lora":
            raise ValueError('rank is of the sum of LoRAs; it needs method = "lora"')

    def inputs(self) -> list[str]:
        """Return what the result depends on beside the options: the ingredients' content."""
        from rotdistill_soups._ingredients import content

        return [content(reference) for reference in self.ingredients]

    def cost(self, context: CostContext) -> Cost:
        """Every parameter once, out of core."""
        return edit_cost(context)

    @hookimpl
    def fold(
        self, weights: Weights, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> Weights:
        """See `Specs.fold`."""
        from rotdistill_core.evaluation.acceptance import accept_if_better
        from rotdistill_soups._ingredient_set import IngredientSet
        from rotdistill_soups._kl_scorer import KLScorer

        self._check(weights)
        gathering = IngredientSet(self.ingredients, weights, pair, out, progress)
        judge = (
            KLScorer(pair, samples, "validation", out, progress)
            if self.only_better or self.method == "greedy"
            else None
        )
        if self.method == "lora":
            made = self._lora(gathering, out)
        else:
            parts = gathering.all(self.same_basis, self.through)
            made = self._made(gathering.base, parts, judge, pair, samples, out, progress)
        if not self.only_better or judge is None:
            return made
        return accept_if_better(weights, made, lambda view, _: judge(view), None, out)

    def _check(self, weights: Weights) -> None:
        from rotdistill_core.errors import RecipeError

        if self.layers and not self.layers[0] <= self.layers[1] < weights.depth:
            raise RecipeError(
                f"soups: layers = {list(self.layers)}: write first and last, from 0 to {weights.depth - 1}."
            )
        names = list(self._names(weights.untie()))
        idle = [
            pattern
            for pattern in self.tensors
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
        if idle:
            raise RecipeError(
                f'soups: tensors: no parameter that is merged matches "{idle[0]}"; names are like {", ".join(names[:2])}.'
            )

    def _made(self, base: Weights, parts: list[Ingredient], judge: KLScorer | None, pair: Pair, samples: Samples, out: StepOutput,
              progress: Progress) -> Weights:  # fmt: skip
        if self.method == "greedy" and judge:
            return self._greedy(base, parts, judge, out, progress)
        if self.method != "fisher":
            return self.merged(base, parts)
        from rotdistill_soups._fisher import fisher, informed

        about: Any = {
            "device": pair.student.device,
            "dtype": pair.student.dtype,
            "out": out,
            "progress": progress,
        }
        options: Any = {"most": self.texts, "sampled": self.labels == "sampled", "seed": self.seed}
        found = [
            fisher(part.view, samples.layout, name=f"fisher_{k}", **options, **about)
            for k, part in enumerate(parts)
        ]
        out.notes["mean Fisher"] = {
            part.name: sum(float(F[n].read().float().sum()) for n in F) / part.view.parameters
            for part, F in zip(parts, found, strict=True)
        }
        return self.merged(base, parts, informed(found))

    def _greedy(
        self,
        base: Weights,
        parts: list[Ingredient],
        judge: KLScorer,
        out: StepOutput,
        progress: Progress,
    ) -> Weights:
        """Add the ingredients, best first, where the validation KL of the mean falls."""
        alone: dict[int, float] = {}
        for k, part in enumerate(parts):
            alone[k] = judge(self.merged(base, [part])).mean
            progress(k + 1, 2 * len(parts), f"{part.name}: validation KL {alone[k]:.4f}")
        order = sorted(alone, key=lambda k: alone[k])
        chosen, best, tried = order[:1], alone[order[0]], {}
        for k in order[1:]:
            kl = judge(self.merged(base, [parts[j] for j in (*chosen, k)])).mean
            tried[parts[k].name] = kl
            chosen, best = ([*chosen, k], kl) if kl < best else (chosen, best)
            progress(len(parts) + len(tried) + 1, 2 * len(parts), f"with {parts[k].name}: {kl:.4f}")
        out.notes["validation KL alone"] = {part.name: alone[k] for k, part in enumerate(parts)}
        out.notes["with one more"], out.notes["members"] = tried, [parts[k].name for k in chosen]
        return self.merged(base, [parts[k] for k in chosen])

    def merged(self, base: Weights, parts: list[Ingredient], mixer: Callable[[str], Mixer] | None = None, weighed: bool = True,
               dtype: torch.dtype | None = None) -> Weights:  # fmt: skip
        """Return the student with every parameter that is asked for merged when it is read.

        Args:
            base: the student in the form that the parts have.
            parts: the ingredients.
            mixer: how a parameter is made of them, where that is not said by the method.
            weighed: the recipe's weights are for these parts.
            dtype: what sums are rounded to, block by block; without it float32, or float64 where the student is that.
        """
        import torch

        from rotdistill_soups._ingredients import STUDENT
        from rotdistill_soups._merge import Ingredient, Mixture, elected, line, slerp, trimmed

        student, table = Ingredient(STUDENT, base, {}), base.adapter.expand(base.config)
        dtype = dtype or torch.promote_types(base.dtype, torch.float32)
        new = {}
        for name in self._names(base):
            shares = self._shares(name, len(parts)) if weighed else [1.0]
            total, mix = sum(shares), mixer(name) if mixer else line
            if self.method == "task-arithmetic":
                shares = [self.strength * c for c in shares]
            own = 1.0 - sum(shares) if self.method == "task-arithmetic" else 0.0
            if self.method in (*MEANS, "slerp"):
                shares = [c / total for c in shares]
            if self.method == "slerp":
                shares = list(slerp(name, parts[0], parts[1], shares[1]))
            if self.method == "ties":
                mix = elected(
                    [trimmed(name, student, part, self.density) for part in parts], self.strength
                )
            coefficients = torch.tensor([own, *shares], dtype=torch.float64)
            mixture = Mixture(name, [student, *parts], coefficients, self.method in MEANS, mix)
            new[name] = mixture.entry(
                base.entries[name].shape, dtype, table[name].axes[0] == "vocab"
            )
        return base.edit(new)

    def _lora(self, gathering: IngredientSet, out: StepOutput) -> Weights:
        """Return the student with the sum of all products, and commit that sum as an adapter."""
        from rotdistill_core.errors import RecipeError
        from rotdistill_soups._ingredients import with_lora
        from rotdistill_soups._lora import added, refactored, write_lora

        whole = [name for name in self.ingredients if name not in gathering.adapters]
        if whole:
            raise RecipeError(
                f"soups: lora adds up adapters, and {whole[0]} is a whole model; merge those by another method."
            )
        loras, base = gathering.loras(self.through), gathering.base
        names = set(self._names(base))
        n = len(loras)
        lora = added(
            [loras[r] for r in self.ingredients],
            lambda name: [self.strength * c * (name in names) for c in self._shares(name, n)],
        )
        if self.rank:
            lora, out.notes["what the rank loses"] = refactored(lora, self.rank)
        write_lora(lora, out, gathering.student.ref.model)
        return self.merged(base, [with_lora(lora, base, "the sum of LoRAs")], weighed=False)

    def _shares(self, name: str, n: int) -> list[float]:
        """Return the weights of the ingredients for one parameter."""
        found: Shares = self.weights
        for pattern, shares in self.tensors.items():
            found = shares if fnmatchcase(name, pattern) else found
        return list(found) if found else [1.0 / n] * n

    def _names(self, base: Weights) -> Iterator[str]:
        """Yield the parameters that are merged."""
        for name in base.entries:
            inside = name.removeprefix(f"{base.adapter.layers}.").partition(".")[0]
            if self.layers is None or (
                inside.isdigit() and self.layers[0] <= int(inside) <= self.layers[1]
            ):
                yield name


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [Soups]
