"""The run of a merge: open the ingredients, bring them together, merge, and keep what is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

from rotdistill_core.checkpoint.lazy import LazyTensor
from rotdistill_core.checkpoint.lora import sum_loras, truncate_rank, write_lora
from rotdistill_core.checkpoint.models import Pair, is_unedited
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.data.packed import Samples
from rotdistill_core.data.splits import Split
from rotdistill_core.errors import RecipeError
from rotdistill_core.evaluation.acceptance import TextScores, accept_if_better
from rotdistill_core.evaluation.guard import guard_of
from rotdistill_core.evaluation.kl_scorer import EditScorer
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.forward.ranks import ALONE, Ranks
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.results import Remedy
from rotdistill_soups._cost import SCORED_ROWS
from rotdistill_soups._fisher import FisherSettings, fisher_information
from rotdistill_soups._ingredient_set import (
    IngredientSet,
    bring_together,
    with_lora,
)
from rotdistill_soups._ingredients import OpenIngredients, open_ingredients
from rotdistill_soups._merge import MergeOptions, merge
from rotdistill_soups._replay import replayed_loras

if TYPE_CHECKING:
    from rotdistill_soups.step import Soups


@dataclass(frozen=True, kw_only=True)
class MergeRun:
    """What a merge is made from."""

    step: Soups
    opened: OpenIngredients
    pair: Pair
    samples: Samples
    out: StepOutput
    progress: Progress
    scorer: EditScorer | None
    """None where nothing has to be chosen by its KL."""

    def score(self, view: Weights, split: Split = Split.VALIDATION) -> TextScores:
        """Return the KL of a view."""
        assert self.scorer is not None
        return self.scorer(view, split)

    def together(self) -> IngredientSet:
        """Return all ingredients in the student's form."""
        step = self.step
        return bring_together(
            self.opened, step.same_basis, step.replay_folds, self.out, self.progress
        )


def merge_into_student(
    step: Soups,
    weights: Weights,
    pair: Pair,
    samples: Samples,
    out: StepOutput,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Weights:
    """Return the student merged with the ingredients, or as it is where that is no better.

    Processes share the teacher's pass. The leading one merges and scores, and alone returns the
    merged student; the others return the student as it is.

    Raises:
        RecipeError: the options select no parameter, or an ingredient does not fit the student.
        SetupError: an ingredient is missing, torn or not finite.
    """

    def opened() -> OpenIngredients:
        _require_selection(step, weights)
        return open_ingredients(step.ingredients, weights, pair, out)

    ingredients = ranks.lead_alone(opened, None)
    scorer = guard = None
    if step.require_improvement:
        guard = guard_of(step.guard, samples, step.use)
    if step.require_improvement or step.method == "greedy":
        scorer = EditScorer(pair, samples, guard, out, progress, ranks, limit=SCORED_ROWS)

    def merged() -> Weights:
        assert ingredients is not None
        run = MergeRun(
            step=step,
            opened=ingredients,
            pair=pair,
            samples=samples,
            out=out,
            progress=progress,
            scorer=scorer,
        )
        merged = DRIVERS.get(step.method, _merge_all)(run)
        if not step.require_improvement:
            return merged
        remedies = [Remedy("other ingredients, or smaller weights of them")]
        if step.method not in ("greedy", "lora") and not (step.weights or step.tensors):
            chosen = "leave it to the validation texts which to take"
            remedies.append(Remedy(chosen, ("method=greedy",)))
        return accept_if_better(weights, merged, run.score, guard, out, remedies)

    return ranks.lead_alone(merged, weights)


def _merge_all(run: MergeRun) -> Weights:
    together = run.together()
    options = merge_options(run.step, len(together.ingredients))
    return merge(
        together.base, together.ingredients, options, merged_names(run.step, together.base)
    )


def _merge_greedily(run: MergeRun) -> Weights:
    """Take the best ingredient; add the others, best first, where the KL of the mean falls."""
    together = run.together()
    base, ingredients = together.base, together.ingredients
    count = len(ingredients)
    names = list(merged_names(run.step, base))

    def mean_of(members: list[int]) -> Weights:
        chosen = [ingredients[k] for k in members]
        return merge(base, chosen, merge_options(run.step, len(chosen)), names)

    alone: dict[int, float] = {}
    for k, ingredient in enumerate(ingredients):
        alone[k] = run.score(mean_of([k])).mean
        run.progress(k + 1, 2 * count, f"{ingredient.name}: validation KL {alone[k]:.4f}")
    order = sorted(alone, key=lambda k: alone[k])
    members, best = order[:1], alone[order[0]]
    with_one_more: dict[str, float] = {}
    for k in order[1:]:
        name = ingredients[k].name
        kl = run.score(mean_of([*members, k])).mean
        with_one_more[name] = kl
        if kl < best:
            members, best = [*members, k], kl
        run.progress(count + len(with_one_more) + 1, 2 * count, f"with {name}: {kl:.4f}")
    chosen = tuple(ingredients[k].name for k in members)
    run.out.report.members = chosen
    run.out.notes |= {
        "validation KL alone": {part.name: alone[k] for k, part in enumerate(ingredients)},
        "validation KL with one more": with_one_more,
        "members": list(chosen),
    }
    return mean_of(members)


def _merge_by_information(run: MergeRun) -> Weights:
    """Weigh every parameter by the Fisher information of each ingredient, in the common basis."""
    step, student = run.step, run.pair.student
    together = run.together()
    settings = FisherSettings(
        max_texts=step.fisher_texts,
        sampled=step.fisher_labels == "sampled",
        seed=step.seed,
        device=student.device,
        dtype=student.dtype,
    )
    fisher = [
        fisher_information(
            part.view, run.samples.layout, settings, run.out, f"fisher_{k}", run.progress
        )
        for k, part in enumerate(together.ingredients)
    ]
    run.out.notes["mean Fisher"] = {
        part.name: sum(float(F[n].read().float().sum()) for n in F) / part.view.parameters
        for part, F in zip(together.ingredients, fisher, strict=True)
    }
    options = merge_options(step, len(together.ingredients), fisher=fisher)
    return merge(together.base, together.ingredients, options, merged_names(step, together.base))


def _merge_loras(run: MergeRun) -> Weights:
    """Add the sum of all products to the student, and commit that sum as an adapter."""
    step, opened = run.step, run.opened
    for reference in step.ingredients:
        if reference not in opened.adapters:
            raise RecipeError(
                f"soups: lora adds up adapters, and {reference} is a whole model; merge those by "
                "another method."
            )
    base = opened.base
    loras = replayed_loras(opened, base, step.replay_folds, run.out, step.same_basis == "ignore")
    names = list(merged_names(step, base))
    selected = set(names)

    def coefficients(name: str) -> list[float]:
        weights = ingredient_weights(step, len(loras), name)
        return [step.scaling * w * (name in selected) for w in weights]

    total = sum_loras([loras[reference] for reference in step.ingredients], coefficients)
    if step.rank:
        total, error = truncate_rank(total, step.rank)
        run.out.notes["relative error of the rank"] = error._asdict()
    own = is_unedited(opened.weights, opened.student)
    write_lora(total, run.out, base, opened.student.ref.model if own else "")
    options = MergeOptions(method="lora", weights=lambda _: [1.0])
    return merge(base, [with_lora(total, base, "the sum of LoRAs")], options, names)


DRIVERS: Mapping[str, Callable[[MergeRun], Weights]] = {
    "greedy": _merge_greedily,
    "fisher": _merge_by_information,
    "lora": _merge_loras,
}
"""Methods that choose or measure something first; the others merge all ingredients at once."""


def merge_options(
    step: Soups, count: int, fisher: Sequence[Mapping[str, LazyTensor]] = ()
) -> MergeOptions:
    """Return the options of a merge of `count` ingredients."""
    return MergeOptions(
        method=step.method,
        weights=partial(ingredient_weights, step, count),
        scaling=step.scaling,
        density=step.density,
        fisher=fisher,
    )


def ingredient_weights(step: Soups, count: int, name: str) -> list[float]:
    """Return the weights of `count` ingredients for one parameter; the last match counts."""
    weights = step.weights
    for pattern, others in step.tensors.items():
        if fnmatchcase(name, pattern):
            weights = others
    return list(weights) if weights else [1.0 / count] * count


def merged_names(step: Soups, base: Weights) -> Iterator[str]:
    """Yield the parameters that are merged: those of the layers asked for, or all."""
    for name in base.entries:
        layer = name.removeprefix(f"{base.adapter.layers}.").partition(".")[0]
        if step.layers is None or (
            layer.isdigit() and step.layers[0] <= int(layer) <= step.layers[1]
        ):
            yield name


def _require_selection(step: Soups, weights: Weights) -> None:
    """Refuse layers that the student does not have, and patterns that match no parameter."""
    if step.layers and not step.layers[0] <= step.layers[1] < weights.depth:
        raise RecipeError(
            f"soups: layers = {list(step.layers)}: write first and last, from 0 to "
            f"{weights.depth - 1}."
        )
    names = list(merged_names(step, weights.untie()))
    for pattern in step.tensors:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(
                f'soups: tensors: no parameter that is merged matches "{pattern}"; names are like '
                f"{', '.join(names[:2])}."
            )
