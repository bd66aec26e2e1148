"""Provenance of a run: models and texts with their hashes, the recipe, versions of all code."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from rotdistill_core.execution.outcome import RunResult
from rotdistill_core.recipe.resolved import ResolvedRecipe
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.layout import RunLayout

LIBRARIES = ("rotdistill", "torch", "transformers", "numpy", "scipy", "safetensors")


def provenance(recipe: ResolvedRecipe, outcome: RunResult) -> dict[str, dict[str, str]]:
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


def _models(recipe: ResolvedRecipe, outcome: RunResult) -> dict[str, str]:
    references = {"teacher": recipe.recipe.teacher, "student": recipe.recipe.student}
    if recipe.recipe.anchor:
        references["anchor"] = recipe.recipe.anchor
    models = {role: reference.model for role, reference in references.items()}
    if outcome.pair:
        for role in models:
            models[role] += f", sha256 {getattr(outcome.pair, role).sha256}"
    return models


def _texts(recipe: ResolvedRecipe, outcome: RunResult) -> dict[str, str]:
    samples = recipe.recipe.samples
    files = {
        "blurbs": samples.index,
        "held-out questions": samples.heldout,
        "system prompt": samples.style,
    }
    if samples.guard:
        files["guard"] = samples.guard
    texts = {name: Path(file).name for name, file in files.items()}
    frozen = RunLayout(outcome.folder).texts
    if frozen.is_file():
        texts["tokens of each"] = f"{frozen.name}, sha256 {sha256_of(frozen)}"
    return texts


def _versions(recipe: ResolvedRecipe) -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    for recipe_step in recipe.steps:
        versions[recipe_step.origin.distribution] = recipe_step.origin.version
    return versions
