"""A recipe whose steps are found and validated: what is carried out."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotdistill_core.plugin.engine import HasInputs, HasOptionChecks, settings_of
from rotdistill_core.plugin.origin import Origin
from rotdistill_core.plugin.source_code import source_digest
from rotdistill_core.plugin.step import (
    changes_behaviour,
    has_to_show_a_gain,
    inputs_of,
    is_exact,
    options_of,
    stage_of,
)
from rotdistill_core.recipe.document import Recipe
from rotdistill_core.store.hashing import digest

ROUND_TRIP = "round-trip"
"""The variant that is added when checkpoints are narrower than float32: exact steps, saved and read
again."""


@dataclass(frozen=True)
class RecipeStep:
    """One step of a recipe: its id, its options, and the plugin that it comes from."""

    id: str
    step: Any
    """An instance of the step class; its fields are the options."""
    origin: Origin

    @property
    def stage(self) -> str:
        """The one stage hook that the step implements."""
        return stage_of(type(self.step))

    def key(self, before: str) -> str:
        """Return the key of the step's result, given the key of everything before it.

        Two results with one key are the same: the key covers options, plugin version, all code
        that the plugin can reach, and what its options name.
        """
        return digest(
            before,
            self.id,
            options_of(self.step),
            self.origin.distribution,
            self.origin.version,
            source_digest(self.origin),
            *inputs_of(self.step),
        )


@dataclass(frozen=True)
class RecipeEngine:
    """The engine of a recipe, which answers in the teacher's name."""

    engine: Any
    """An instance of the engine class; its fields are the options."""
    origin: Origin
    folder: Path
    """The folder of the recipe, for paths in options."""

    def key(self) -> str:
        """Return the key of its answers, apart from those of model and prompts.

        It covers options (where a server is does not count), plugin version, all code that the
        plugin can reach, and what the options name.

        Raises:
            RecipeError: a file that the options name cannot be read.
        """
        inputs = self.engine.inputs(self.folder) if isinstance(self.engine, HasInputs) else ()
        return digest(
            settings_of(self.engine),
            self.origin.distribution,
            self.origin.version,
            source_digest(self.origin),
            *inputs,
        )

    def check(self) -> None:
        """Let the engine refuse options that cannot work, before any work.

        Raises:
            RotdistillError: as the engine would later.
        """
        if isinstance(self.engine, HasOptionChecks):
            self.engine.check(self.folder)


@dataclass(frozen=True)
class ResolvedRecipe:
    """A valid recipe with its steps."""

    path: Path
    text: str
    """The TOML document as it was written."""
    recipe: Recipe
    steps: tuple[RecipeStep, ...]
    engine: RecipeEngine
    left_out: tuple[str, ...] = ()
    """Ids of toggles that new variants, under `extends` or in an override, no longer name."""
    sets: tuple[str, ...] | None = ()
    """The overrides that it was read with, as `--set` takes them; None if they are not known."""
    given: Mapping[str, object] | None = None
    """The same as values; None if they are not known, or if the recipe is none of a file."""

    @property
    def notes(self) -> list[str]:
        """What is noteworthy about the recipe, a sentence each."""
        if not self.left_out:
            return []
        names = ", ".join(f'"{name}"' for name in self.left_out)
        steps, were, them = (
            (f"step {names} is", "it was a toggle", "it")
            if len(self.left_out) == 1
            else (f"steps {names} are", "they were toggles", "them")
        )
        return [
            f"{self.path}: {steps} left out: {were} before `extends` or an override changed the "
            f"variants, and no variant names {them} now."
        ]

    @property
    def judged(self) -> list[str]:
        """Ids of the steps that are not applied without a gain on validation texts."""
        return [step.id for step in self.steps if has_to_show_a_gain(step.step)]

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as JSON values, after `extends`, `--set` and defaults."""
        steps = [{"id": step.id, **options_of(step.step)} for step in self.steps]
        engine = options_of(self.engine.engine)
        tables = self.recipe.model_dump(mode="json", by_alias=True)
        return {**tables, "engine": engine, "step": steps}

    def document(self) -> dict[str, Any]:
        """Return what a run keeps of its recipe: resolved, with its baseline and its headline.

        The two change no result, so the digest leaves them out.
        """
        return {"baseline": self.baseline, "headline": self.headline, **self.resolved()}

    def digest(self) -> str:
        """Return the sha256 of the resolved recipe, without what changes no result."""
        tables = {**self.resolved(), "engine": settings_of(self.engine.engine)}
        return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()

    def folder(self, root: Path) -> Path:
        """Return the run's folder below `root`. The same recipe and options always have the same
        one."""
        return root / f"{self.recipe.name}-{self.digest()[:8]}"

    def command(self, sets: Sequence[str]) -> str:
        """Return the command that carries it out once more, with further overrides.

        It is empty where not all of its own overrides are known.
        """
        if self.sets is None:
            return ""
        chosen = {each.partition("=")[0]: each for each in (*self.sets, *sets)}
        words = [word for each in chosen.values() for word in ("--set", each)]
        return shlex.join(["rotdistill", "run", str(self.path), *words])

    @property
    def baseline(self) -> str:
        """The variant that others are compared with: as marked, else `base`, else the first."""
        names = list(self.recipe.variants)
        return self.recipe.baseline or ("base" if "base" in names else names[0])

    @property
    def headline(self) -> str:
        """The variant shown next to the baseline: as marked, else `full`, else the last."""
        names = list(self.recipe.variants)
        return self.recipe.headline or ("full" if "full" in names else names[-1])

    @property
    def toggled(self) -> frozenset[str]:
        """Ids of the steps that some variant names; the others run in every variant."""
        return frozenset(name for names in self.recipe.variants.values() for name in names)

    def chain(self, variant: str) -> tuple[RecipeStep, ...]:
        """Return the steps of a variant, in file order."""
        named = self.recipe.variants[variant]
        return tuple(step for step in self.steps if step.id not in self.toggled or step.id in named)

    def chains(self, narrow: bool) -> dict[str, tuple[RecipeStep, ...]]:
        """Return the steps of each variant.

        Args:
            narrow: checkpoints are saved in fewer than 32 bits. If the recipe has an exact fold, a
                variant `round-trip` is then added, unless the recipe has one of that name or of
                those steps.
        """
        chains = {name: self.chain(name) for name in self.recipe.variants}
        exact = self.exact_chain() if narrow else ()
        if exact and ROUND_TRIP not in chains and exact not in chains.values():
            chains[ROUND_TRIP] = exact
        return chains

    def exact_chain(self) -> tuple[RecipeStep, ...]:
        """Return the chain of the first variant that has an exact fold, without toggled steps that
        change behaviour.

        Empty when no variant has an exact fold.
        """
        for variant in self.recipe.variants:
            chain = self.chain(variant)
            if any(is_exact(step.step) for step in chain):
                return tuple(
                    step
                    for step in chain
                    if step.id not in self.toggled or not changes_behaviour(step.step)
                )
        return ()
