"""Provenance of a run: models and texts with their hashes, the recipe, versions of all code."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rotdistill_core.data.hub import HUB
from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout


@dataclass(frozen=True)
class Source:
    """A model or file that had a part in a run."""

    name: str
    """The reference of the model, or the name of the file."""
    sha256: str = ""
    """Empty where it was not hashed."""

    def __str__(self) -> str:
        """Return both in one line."""
        return f"{self.name}, sha256 {self.sha256}" if self.sha256 else self.name


LIBRARIES = ("rotdistill", "torch", "transformers", "numpy", "scipy", "safetensors")


def provenance(recipe: ResolvedRecipe, outcome: RunResult) -> dict[str, Mapping[str, str | Source]]:
    """Return group -> name -> value, in the order of the report.

    Hashes of models are left out where the models were not opened.
    """
    return {
        "models": _models(recipe, outcome),
        "texts": _texts(recipe, outcome),
        "recipe": {
            "name": recipe.recipe.name,
            "sha256 when resolved": recipe.digest(),
            "seed": str(recipe.recipe.seed),
        },
        "versions": _versions(recipe),
    }


def _models(recipe: ResolvedRecipe, outcome: RunResult) -> dict[str, Source]:
    references = {"teacher": recipe.recipe.teacher, "student": recipe.recipe.student}
    if recipe.recipe.anchor:
        references["anchor"] = recipe.recipe.anchor
    if outcome.pair is None:
        return {role: Source(reference.model) for role, reference in references.items()}
    return {
        role: Source(reference.model, getattr(outcome.pair, role).sha256)
        for role, reference in references.items()
    }


def _texts(recipe: ResolvedRecipe, outcome: RunResult) -> dict[str, Source]:
    samples = recipe.recipe.samples
    files = {
        "texts to fit on": samples.index,
        "held-out questions": samples.heldout,
        "system prompt": samples.style,
        "guard": samples.guard,
    }
    texts = {
        name: Source(file if file.startswith(HUB) else Path(file).name)
        for name, file in files.items()
        if file
    }
    frozen = RunLayout(outcome.folder).texts
    if frozen.is_file():
        texts["tokens of each"] = Source(frozen.name, sha256_of(frozen))
    return texts


def _versions(recipe: ResolvedRecipe) -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    for recipe_step in recipe.steps:
        versions[recipe_step.origin.distribution] = recipe_step.origin.version
    return versions
