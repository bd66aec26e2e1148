"""TODO: rotdistill_core.recipe.resolved."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotdistill_core.plugin.origin import Origin, source_digest
from rotdistill_core.plugin.step import options_of, stage_of
from rotdistill_core.recipe.document import Recipe
from rotdistill_core.store.hashing import digest


@dataclass(frozen=True)
class RecipeStep:
    """A step in its place: id, options and where its plugin comes from."""

    id: str
    step: Any
    origin: Origin

    @property
    def stage(self) -> str:
        """The one hook that the step answers."""
        return stage_of(type(self.step))

    def key(self, before: str) -> str:
        """Return the key of the step behind everything before it."""
        named: list[str] = getattr(
            self.step, "inputs", list
        )()  # the content of what its options name, such as other models
        origin = self.origin
        return digest(
            before,
            self.id,
            options_of(self.step),
            origin.distribution,
            origin.version,
            source_digest(origin),
            *named,
        )


@dataclass(frozen=True)
class ResolvedRecipe:
    """A valid recipe with its steps."""

    path: Path
    text: str
    recipe: Recipe
    steps: tuple[RecipeStep, ...]

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as JSON values after `extends`, `--set` and defaults."""
        steps = [{"id": p.id, **options_of(p.step)} for p in self.steps]
        return {**self.recipe.model_dump(mode="json"), "step": steps}

    def digest(self) -> str:
        """Return the sha256 of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()

    def folder(self, root: Path) -> Path:
        """Return the run's folder: the same recipe, options included, always has the same one."""
        return root / f"{self.recipe.name}-{self.digest()[:8]}"

    def chain(self, variant: str) -> tuple[RecipeStep, ...]:
        """Return the steps of a variant in file order: those that no variant names, and those that this one names."""
        toggles = {name for names in self.recipe.variants.values() for name in names}
        return tuple(
            p for p in self.steps if p.id not in toggles or p.id in self.recipe.variants[variant]
        )

    def chains(self, narrow: bool) -> dict[str, tuple[RecipeStep, ...]]:
        """Return the steps of each variant; `round-trip` is one more where checkpoints are `narrow` (below 32 bits) and a fold is exact."""
        found = {name: self.chain(name) for name in self.recipe.variants}
        return (
            {**found, "round-trip": exact, **found}
            if narrow and (exact := self.exact_chain())
            else found
        )

    def exact_chain(self) -> tuple[RecipeStep, ...]:
        """Return the first variant's chain that has an exact fold, without its toggled transfers; empty when there is none."""
        toggles = {name for names in self.recipe.variants.values() for name in names}
        for chain in map(self.chain, self.recipe.variants):
            if any(getattr(p.step, "exact", False) for p in chain):
                return tuple(
                    p
                    for p in chain
                    if p.id not in toggles or getattr(p.step, "exact", p.stage != "style")
                )
        return ()
