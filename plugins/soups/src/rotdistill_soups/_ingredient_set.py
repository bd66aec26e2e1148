"""The ingredients of a soup in one form: the student's tokens, tie, norms and basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

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
            the adapters in this order. None where the recipe does not name any.
        out: the step's output, whose ledger has the folds.
        ignore_basis: accept an adapter that was trained on weights far from the student's.

    Raises:
        RecipeError: an adapter was trained on another model; or the student's basis has changed,
            and the recipe does not say whether before or after the adapters were trained.
    """
    if opened.adapters and replay_folds is None and opened.weights.lineage.basis is not None:
        first = next(iter(opened.adapters))
        raise RecipeError(
            f"soups: the student was folded into another basis, and {first} is a LoRA, which fits "
            "one basis only. Name the folds that it is to be carried through, "
            'replay_folds = ["fold"], or none if it was trained after them, replay_folds = [].'
        )
    trained_on = opened.weights if base.tied else opened.weights.untie()
    table = base.adapter.expand(base.config)
    folds = [recorded_fold(step, out, opened.weights) for step in replay_folds or ()]
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


def recorded_fold(step: str, out: StepOutput, weights: Weights) -> Undo:
    """Return the record of an exact step that led to the student as it is.

    Raises:
        RecipeError: no such step did.
    """
    for record in out.earlier_steps():
        if record.id == step and isinstance(record.result, WeightsRef) and record.result.undo:
            return restore_undo(out.store.root / record.result.undo, weights)
    raise RecipeError(
        f'soups: replay_folds names "{step}", which is no exact fold that stands before this step; '
        "name the id of a basis-fold."
    )


def with_lora(lora: Lora, base: Weights, name: str) -> Ingredient:
    """Return the student with an adapter as an ingredient."""
    special = {parameter: lora.rows_on(base, parameter) for parameter in lora.factors}
    return Ingredient(name, lora.applied_to(base), special)
