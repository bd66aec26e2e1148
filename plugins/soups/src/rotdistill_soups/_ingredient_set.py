"""All ingredients of a soup in one form: the student's tokens, its tie, its norms and its basis, or a refusal with what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from rotdistill_core.checkpoint.models import Model, Pair
from rotdistill_core.checkpoint.weights import Weights
from rotdistill_core.errors import RecipeError
from rotdistill_core.forward.layerwise import Progress
from rotdistill_core.store.output import StepOutput
from rotdistill_soups._basis_check import aligned, far, fused, is_fused, mismatch, on_disk, refusal
from rotdistill_soups._ingredients import STUDENT, matched, opened, translated, with_lora
from rotdistill_soups._lora import Lora, read_lora, through, undo_of
from rotdistill_soups._merge import Ingredient


class IngredientSet:
    """The student and its ingredients, as far as they have been brought together."""

    def __init__(
        self,
        references: Sequence[str],
        weights: Weights,
        pair: Pair,
        out: StepOutput,
        progress: Progress,
    ) -> None:
        self.references, self.weights, self.student, self.out, self.progress = (
            references,
            weights,
            pair.student,
            out,
            progress,
        )
        self.dtype = torch.promote_types(pair.student.dtype, torch.float32)
        self.models: dict[str, Model] = {}
        self.adapters: dict[str, Path] = {}
        for reference in references:
            found = None if reference == STUDENT else opened(reference, weights, out)
            if isinstance(found, Path):
                self.adapters[reference] = found
            elif found is not None:
                self.models[reference] = found
        untied = [m for m in self.models.values() if not m.weights.tied]
        self.base = (
            weights.untie()
            if untied or any(_for_head(path, weights) for path in self.adapters.values())
            else weights
        )

    def models_in(self, same_basis: Literal["require", "align", "ignore"]) -> list[Ingredient]:
        """Return the checkpoints among the ingredients, in the student's basis; `base` follows where its norms or its tie have to.

        Raises:
            RecipeError: one is in another basis, and may not be aligned.
        """
        size, made, moved = (
            self.base.entries[self.base.adapter.embedding].shape[0],
            list[Ingredient](),
            False,
        )
        for k, (reference, model) in enumerate(self.models.items()):
            view = model.weights if self.base.tied else model.weights.untie()
            part = translated(
                view, self.base, matched(model, self.student, size, reference), reference
            )
            apart = mismatch(part.view, self.base)
            self.out.notes.setdefault("distance from the student", {})[reference] = apart
            if far(apart) and same_basis == "align":
                view = aligned(
                    reference, model, part.view, self.student, self.base, self.out, self.progress
                )
                part, moved = (
                    replace(
                        part, view=on_disk(view, f"aligned_{k}", self.out, self.dtype), special={}
                    ),
                    True,
                )
                self.out.notes.setdefault("aligned", []).append(reference)
            elif far(apart) and same_basis == "require":
                raise RecipeError(refusal(reference, apart, part.view, self.base))
            made.append(part)
        if (
            moved
            or len({is_fused(view) for view in (self.base, *(part.view for part in made))}) > 1
        ):
            self.base = on_disk(fused(self.base), "fused", self.out, self.dtype)
            for k, part in enumerate(made):
                if not is_fused(part.view):
                    view = on_disk(fused(part.view), f"fused_{k}", self.out, self.dtype)
                    made[k] = replace(part, view=view, special={})
        return made

    def loras(self, steps: Sequence[str] | None) -> dict[str, Lora]:
        """Return the adapters, carried through the exact steps that the student has been through since they were trained.

        Raises:
            RecipeError: the student's basis has changed and the recipe does not say whether before or after their training.
        """
        first = next(iter(self.adapters), None)
        if first and steps is None and self.weights.lineage.basis is not None:
            raise RecipeError(
                f"soups: the student was folded into another basis, and {first} is a LoRA, which fits one basis only. "
                'Name the folds that it is to be carried through, through = ["fold"], or none if it was trained behind them, through = [].'
            )
        plain, table = (
            self.weights if self.base.tied else self.weights.untie(),
            self.base.adapter.expand(self.base.config),
        )
        ways = [undo_of(step, self.out, self.weights) for step in steps or ()]
        ways += [self.base.undo] if self.base.undo else []
        found = {}
        for reference, folder in self.adapters.items():
            lora = read_lora(folder, plain)
            for undo in ways:
                lora = through(lora, undo, table)
            found[reference] = lora
        return found

    def all(
        self, same_basis: Literal["require", "align", "ignore"], steps: Sequence[str] | None
    ) -> list[Ingredient]:
        """Return all ingredients in the recipe's order; `base` is the student that they belong to."""
        models = {part.name: part for part in self.models_in(same_basis)}
        made = {
            **models,
            **{name: with_lora(lora, self.base, name) for name, lora in self.loras(steps).items()},
        }
        return [
            made.get(reference) or Ingredient(STUDENT, self.base, {})
            for reference in self.references
        ]


def _for_head(folder: Path, weights: Weights) -> bool:
    """Say whether an adapter changes the head, which then has to be a tensor of its own: else the embedding would change with it."""
    path, module = (
        folder / "adapter_model.safetensors",
        weights.adapter.head.removesuffix(".weight"),
    )
    if not path.is_file():
        return False
    with safe_open(path, "np") as file:
        return any(f".{module}.lora_" in f".{key}" for key in file.keys())  # noqa: SIM118
