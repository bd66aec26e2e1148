"""What was done to what: hashes and versions of everything that had a part in a run, and the model card of each checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotdistill_core.checkpoint.models import Model, Pair
    from rotdistill_core.execution.outcome import RunResult
    from rotdistill_core.recipe.resolved import ResolvedRecipe


VERSIONS = ("rotdistill", "torch", "transformers", "numpy", "scipy", "safetensors")


def made_of(loaded: ResolvedRecipe, outcome: RunResult) -> dict[str, dict[str, str]]:
    """Return references and hashes of models and texts, and the versions of everything that had a part; no hash of what is not there."""
    from rotdistill_core.store.hashing import sha256_of

    recipe, pair, frozen = loaded.recipe, outcome.pair, outcome.folder / "samples.tsv"
    roles = {"teacher": recipe.teacher, "student": recipe.student} | (
        {"anchor": recipe.anchor} if recipe.anchor else {}
    )
    hashes = {role: f", sha256 {getattr(pair, role).sha256}" if pair else "" for role in roles}
    texts = {
        "blurbs": recipe.samples.index,
        "held-out questions": recipe.samples.heldout,
        "system prompt": recipe.samples.style,
    }
    texts |= {"guard": recipe.samples.guard} if recipe.samples.guard else {}
    texts = {what: Path(file).name for what, file in texts.items()}
    texts |= (
        {"tokens of each": f"{frozen.name}, sha256 {sha256_of(frozen)}"} if frozen.is_file() else {}
    )
    plugins = {
        recipe_step.origin.distribution: recipe_step.origin.version for recipe_step in loaded.steps
    }
    return {
        "models": {role: f"{reference.model}{hashes[role]}" for role, reference in roles.items()},
        "texts": texts,
        "recipe": {
            "name": recipe.name,
            "sha256 when resolved": loaded.digest(),
            "seed": str(recipe.seed),
        },
        "versions": {"Python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS}
        | plugins,
    }


UNKNOWN = "unknown"
STRICTER = (
    r"cc0|unlicense|wtfpl|pddl", r"mit|bsd|isc|zlib", r"apache|cc-by-\d|cc-by$|odc-by", r"lgpl|mpl|epl|cdla|openrail|cc-by-sa", r"gpl",
    r"agpl", r".*-n[cd](?:-|$)|.*noncommercial", r".*",
)  # fmt: skip
"""Licences from free to strict; what nothing else matches (a vendor's own, `other`, or none that is known) comes last."""


def licence_of(model: Model) -> str:
    """Return the licence that a model's card names."""
    card = model.folder / "README.md"
    front = (
        card.read_text(encoding="utf-8", errors="replace").split("---")[1:2]
        if card.is_file()
        else []
    )
    found = (
        re.search(r"^license(?:_name)?:\s*[\"']?([\w.+-]+)", front[0], re.MULTILINE)
        if front
        else None
    )
    return found[1].lower() if found else UNKNOWN


def strictest(licences: list[str]) -> str:
    """Return the licence under which something made of all of them can be passed on: the strictest."""
    return max(
        licences,
        key=lambda name: next(k for k, pattern in enumerate(STRICTER) if re.match(pattern, name)),
    )


def card_of(
    told: Any, loaded: ResolvedRecipe, outcome: RunResult, pair: Pair, variant: str, template: Any
) -> str:
    """Return the README.md of a checkpoint."""
    chain = loaded.chain(variant) if variant in loaded.recipe.variants else loaded.exact_chain()
    models = (
        {"student": pair.student}
        | ({} if pair.same else {"teacher": pair.teacher})
        | ({"anchor": pair.anchor} if pair.anchor else {})
    )
    licences = {role: licence_of(model) for role, model in models.items()}
    ran = [recipe_step for recipe_step in chain if recipe_step.stage != "evaluate"]
    kinds = {
        recipe_step.id: "exact" if getattr(recipe_step.step, "exact", False) else recipe_step.stage
        for recipe_step in ran
    }
    languages = sorted(
        {
            row.language
            for row in outcome.rows
            if row.language and re.fullmatch(r"[a-z]{2,3}", row.language)
        }
    )
    return str(
        template.render(
            told=told, variant=variant, models=models, licences=licences, licence=strictest(list(licences.values())), kinds=kinds,
            languages=languages, relation="finetune", quote=json.dumps,
            exact=[name for name, kind in kinds.items() if kind == "exact"], edits=[n for n, k in kinds.items() if k in ("fold", "style")],
        )
    )  # fmt: skip
