"""The ingredients of a soup in one form: the student's tokens, tie, norms and basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rotdistill_core.architecture.table import Config
from rotdistill_core.checkpoint.adapter_config import read_adapter_config
from rotdistill_core.checkpoint.lora import Lora, read_lora, transform_lora
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Undo, Weights, restore_undo
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.store.output import StepOutput
from rotdistill_core.store.records import WeightsRef
from rotdistill_soups._adapter_base import compare_base
from rotdistill_soups._align import (
    align_to_student,
    commit_view,
    edited_model,
    fold_norms,
    norms_are_folded,
)
from rotdistill_soups._basis_check import basis_distances, is_other_basis, refusal
from rotdistill_soups._ingredients import OpenIngredients
from rotdistill_soups._merge import STUDENT
from rotdistill_soups._mixture import Ingredient
from rotdistill_soups._vocabulary import as_ingredient, match_tokens

SameBasis = Literal["require", "align", "ignore"]


@dataclass(frozen=True)
class IngredientSet:
    """The ingredients of a soup, and the student in the form that they have."""

    base: Weights
    ingredients: list[Ingredient]
    """In the recipe's order."""


def bring_together(
    opened: OpenIngredients,
    same_basis: SameBasis,
    replay_folds: Sequence[str] | None,
    out: StepOutput,
    progress: Progress,
) -> IngredientSet:
    """Return all ingredients in the student's form.

    Args:
        opened: the ingredients.
        same_basis: what happens to a checkpoint in another basis.
        replay_folds: see `replayed_loras`.
        out: the step's output; what had to be computed is committed there.
        progress: reports alignments.

    Raises:
        RecipeError: an ingredient is in another basis, and may not or cannot be aligned.
    """
    base = opened.base
    models = _models_in_basis(opened, base, same_basis, out, progress)
    aligned = any(ingredient.aligned for ingredient in models.values())
    ingredients = {name: found.ingredient for name, found in models.items()}
    base, ingredients = _with_norms_alike(base, ingredients, aligned, opened.student, out)
    ignore = same_basis == "ignore"
    for name, lora in replayed_loras(opened, base, replay_folds, out, ignore).items():
        ingredients[name] = with_lora(lora, base, name)
    student = Ingredient(STUDENT, base, {})
    return IngredientSet(base, [ingredients.get(name, student) for name in opened.references])


@dataclass(frozen=True)
class _ModelInBasis:
    ingredient: Ingredient
    aligned: bool


def _models_in_basis(
    opened: OpenIngredients,
    base: Weights,
    same_basis: SameBasis,
    out: StepOutput,
    progress: Progress,
) -> dict[str, _ModelInBasis]:
    """Return the checkpoints among the ingredients, in the student's basis if that is asked."""
    found: dict[str, _ModelInBasis] = {}
    student_rows = base.entries[base.adapter.embedding].shape[0]
    for k, (name, model) in enumerate(opened.models.items()):
        view = model.weights if base.tied else model.weights.untie()
        token_rows = match_tokens(model, opened.student, student_rows, name)
        ingredient = as_ingredient(view, base, token_rows, name)
        distances = basis_distances(ingredient.view, base)
        out.notes.setdefault("distance from the student", {})[name] = distances
        align = is_other_basis(distances) and same_basis == "align"
        if is_other_basis(distances) and same_basis == "require":
            raise RecipeError(refusal(name, distances, ingredient.view, base))
        if align:
            target = edited_model(opened.student, base)
            view = align_to_student(name, model, ingredient.view, target, out, progress)
            view = commit_view(view, f"aligned_{k}", out, _stored_dtype(opened.student))
            ingredient = replace(ingredient, view=view, special={})
            out.notes.setdefault("aligned", []).append(name)
        found[name] = _ModelInBasis(ingredient, align)
    return found


def _with_norms_alike(
    base: Weights,
    ingredients: Mapping[str, Ingredient],
    aligned: bool,
    student: Model,
    out: StepOutput,
) -> tuple[Weights, dict[str, Ingredient]]:
    """Return student and ingredients with their norms folded, if some of them have that already.

    An aligned ingredient has them folded.
    """
    views = [base, *(ingredient.view for ingredient in ingredients.values())]
    if not aligned and len({norms_are_folded(view) for view in views}) == 1:
        return base, dict(ingredients)
    dtype = _stored_dtype(student)
    base = commit_view(fold_norms(base), "fused", out, dtype)
    alike: dict[str, Ingredient] = {}
    for k, (name, ingredient) in enumerate(ingredients.items()):
        alike[name] = ingredient
        if not norms_are_folded(ingredient.view):
            view = commit_view(fold_norms(ingredient.view), f"fused_{k}", out, dtype)
            alike[name] = replace(ingredient, view=view, special={})
    return base, alike


def _stored_dtype(student: Model) -> torch.dtype:
    """Return the dtype of committed views: that in which the student computes, float32 at least."""
    return torch.promote_types(student.dtype, torch.float32)


def replayed_loras(
    opened: OpenIngredients,
    base: Weights,
    replay_folds: Sequence[str] | None,
    out: StepOutput,
    ignore_basis: bool,
) -> dict[str, Lora]:
    """Return the adapters in the student's basis.

    Args:
        opened: the ingredients.
        base: the student, in the form that the ingredients have.
        replay_folds: ids of the exact folds since the adapters were trained; they are applied to
            the adapters in the order in which they were made. None where the recipe does not name
            any.
        out: the step's output, whose ledger has the folds.
        ignore_basis: accept an adapter that was trained on weights far from the student's.

    Raises:
        RecipeError: an adapter was trained on another model; the student's basis has changed, and
            the recipe does not say whether before or after the adapters were trained; or the folds
            that it names do not lead from there to the student.
        SetupError: an adapter is torn, or does not fit the model before the folds.
    """
    if opened.adapters and replay_folds is None:
        _require_first_basis(opened, out)
    recorded = recorded_folds(replay_folds or (), opened.weights, opened.student, out)
    trained_on = _before_folds(opened.weights, recorded)
    if not base.tied:
        trained_on = trained_on.untie()
    table = base.adapter.expand(base.config)
    folds = [fold.undo for fold in recorded]
    if base.undo:
        folds.append(base.undo)
    loras: dict[str, Lora] = {}
    for name, folder in opened.adapters.items():
        about = compare_base(read_adapter_config(folder), opened.student, ignore_basis)
        if about:
            out.notes.setdefault("bases of adapters", {})[name] = about
        lora = read_lora(folder, trained_on, [opened.student.weights])
        for fold in folds:
            lora = transform_lora(lora, fold, table)
        loras[name] = lora
    return loras


def _require_first_basis(opened: OpenIngredients, out: StepOutput) -> None:
    """Refuse adapters for a student that some step has folded: nobody said on which side they are.

    A fold of heads or neurons leaves the stream's basis as it is, and their order is another one.
    """
    folds = [
        record.id
        for record in out.earlier_steps()
        if isinstance(record.result, WeightsRef) and record.result.undo
    ]
    if not folds and opened.weights.lineage.basis is None:
        return
    first = next(iter(opened.adapters))
    names = ", ".join(f'"{name}"' for name in reversed(folds)) or '"fold"'
    raise RecipeError(
        f"soups: the student was folded into another basis, and {first} is a LoRA, which fits one "
        f"basis only. Name the folds that it is to be carried through, replay_folds = [{names}], "
        "or none if it was trained after them, replay_folds = []."
    )


@dataclass(frozen=True)
class RecordedFold:
    """An exact step before this one, from its record in the ledger."""

    step: str
    """Its id in the recipe."""
    undo: Undo
    config_after: Config
    """The student's config behind it."""


def recorded_folds(
    steps: Sequence[str], weights: Weights, student: Model, out: StepOutput
) -> list[RecordedFold]:
    """Return exact steps that led to the student as it is, in the order in which they were made.

    Args:
        steps: their ids, in any order.
        weights: the student as it is.
        student: the student as it was opened.
        out: the step's output, whose ledger has the records.

    Raises:
        RecipeError: a name is that of no exact step, or an exact step behind a named one is left
            out.
    """
    edits = [each for each in out.earlier_steps() if isinstance(each.result, WeightsRef)]
    edits.reverse()
    found: list[RecordedFold] = []
    config: Config = student.weights.config
    for record in edits:
        result = record.result
        assert isinstance(result, WeightsRef)
        if result.undo and record.id in steps:
            undo = restore_undo(out.store.root / result.undo, config, weights.adapter)
            found.append(RecordedFold(record.id, undo, result.config))
        elif result.undo and found:
            raise RecipeError(
                f'soups: replay_folds names "{found[-1].step}" and leaves out "{record.id}", an '
                "exact fold behind it. An adapter that is carried through the first goes through "
                "the second too; name both."
            )
        config = result.config
    missing = [step for step in steps if step not in {fold.step for fold in found}]
    if missing:
        raise RecipeError(
            f'soups: replay_folds names "{missing[0]}", which is no exact fold that stands before '
            "this step; name the id of a basis-fold."
        )
    return found


def _before_folds(weights: Weights, folds: Sequence[RecordedFold]) -> Weights:
    """Return the student with the folds taken back: the shape and basis that it had before them.

    Edits that were made behind a fold stay in it.

    Raises:
        RecipeError: a step behind a fold has changed the student's shape.
    """
    for fold in reversed(folds):
        shape, recorded = _shape(weights, weights.config), _shape(weights, fold.config_after)
        if shape != recorded:
            size = next(key for key in recorded | shape if shape.get(key) != recorded.get(key))
            raise RecipeError(
                f'soups: replay_folds names "{fold.step}", and a step behind it changed the '
                f"student: {size} was {recorded.get(size)} and is {shape.get(size)}. An adapter "
                "cannot be carried through the fold of another shape; put the cut before the "
                "fold, or the soup before the cut."
            )
        weights = weights.unfold(fold.undo)
    return weights


def _shape(weights: Weights, config: Config) -> dict[str, int]:
    """Return the depth and the size of every space, by name."""
    return {"layers": weights.adapter.depth(config), **weights.adapter.sizes(config)}


def with_lora(lora: Lora, base: Weights, name: str) -> Ingredient:
    """Return the student with an adapter as an ingredient."""
    special = {parameter: lora.rows_on(base, parameter) for parameter in lora.factors}
    return Ingredient(name, lora.applied_to(base), special)
