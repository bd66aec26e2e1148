"""The ingredients of a soup in one form: the student's tokens, tie, norms and basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rotdistill_core.checkpoint.lora import Lora
from rotdistill_core.checkpoint.models import Model
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.store.output import StepOutput
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
from rotdistill_soups._replay import replayed_loras
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


def with_lora(lora: Lora, base: Weights, name: str) -> Ingredient:
    """Return the student with an adapter as an ingredient."""
    special = {parameter: lora.rows_on(base, parameter) for parameter in lora.factors}
    return Ingredient(name, lora.applied_to(base), special)
