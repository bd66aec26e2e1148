"""Which results are there already, told by the keys that `run` will look for, and why the others are not.

A run writes into its ledger what it starts from (`inputs`: hashes that need no tokenizer and hardly a byte of the weights) beside the
key of that. Where the same inputs are found again every key behind them follows without opening a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rotdistill_core.execution.keys import checkpoint_key, evaluation_key
from rotdistill_core.plugin.step import options_of
from rotdistill_core.recipe.resolved import RecipeStep, ResolvedRecipe
from rotdistill_core.store.ledger import Ledger
from rotdistill_core.store.records import CheckpointRecord, StartRecord, StepRecord

UNKNOWN = "?"
"""Stands for the key of inputs that no run has had; what is behind it has keys of its own, which nothing was made under."""


@dataclass
class StepStatus:
    """One result of a run: a step behind others, for all variants that share it."""

    recipe_step: RecipeStep
    behind: tuple[RecipeStep, ...]
    """The steps that change weights or maps before it."""
    key: str
    variants: list[str]
    record: StepRecord | None
    """What was made under this key, or None."""
    why: str
    """Where it is, or why it has to be made."""
    last: StepRecord | None
    """The newest result of a step of this name, whatever its key."""


class ReuseIndex:
    """Everything that the ledgers say was made, as far as its files are there with their length."""

    def __init__(self, ledgers: Iterable[Ledger], own: str) -> None:
        self.ledgers = sorted(
            ledgers, key=lambda ledger: ledger.folder.name == own
        )  # the run's own last, so that it is looked at first
        self.start = UNKNOWN
        self.made = {
            r.key: (ledger.folder.name, r)
            for ledger in self.ledgers
            for r in ledger.steps
            if _there(ledger, r)
        }
        self.saved = {
            r.key: ledger.folder.name
            for ledger in self.ledgers
            for r in ledger.checkpoints
            if _there(ledger, r)
        }

    def base(self, inputs: Mapping[str, str]) -> str:
        """Return the key of what a run starts from, or UNKNOWN."""
        self.start = next((r.key for r in self._starts() if r.inputs == inputs), UNKNOWN)
        return self.start

    def changed(self, inputs: Mapping[str, str]) -> str:
        """Return in what the inputs differ from those that were most alike; nothing where there were none."""
        starts = [r.inputs for r in self._starts()]
        if not starts:
            return ""
        nearest = max(starts, key=lambda old: sum(old.get(k) == v for k, v in inputs.items()))
        return ", ".join(k for k in inputs if nearest.get(k) != inputs[k])

    def last(self, step: str, variant: str) -> StepRecord | None:
        """Return the newest result of a step by its id; `variant` is empty but for evaluators."""
        newest_first = [r for ledger in self.ledgers[::-1] for r in ledger.steps[::-1]]
        return next((r for r in newest_first if (r.id, r.variant) == (step, variant)), None)

    def _starts(self) -> list[StartRecord]:
        return [r for ledger in self.ledgers[::-1] for r in ledger.starts[::-1]]


def _there(ledger: Ledger, record: StepRecord | CheckpointRecord) -> bool:
    root = ledger.folder.parent
    return all(
        (path := root / f.path).is_file() and path.stat().st_size == f.bytes for f in record.files
    )


def step_statuses(
    loaded: ResolvedRecipe,
    past: ReuseIndex,
    inputs: Mapping[str, str] | None,
    dtype: str,
    claims: str,
    fresh: bool = False,
) -> Iterator[StepStatus]:
    """Yield every result of a run in the order in which it needs them.

    Args:
        loaded: the recipe.
        past: what was made.
        inputs: what the run starts from; None where the models are not here.
        dtype: of the checkpoints.
        claims: the hash of what answers are scored against.
        fresh: nothing is to be reused.
    """
    known = UNKNOWN if inputs is None else past.base(inputs)
    start = past.changed(inputs) if inputs is not None and known == UNKNOWN else ""
    seen: dict[str, StepStatus] = {}
    for variant, chain in loaded.chains(dtype in ("bfloat16", "float16")).items():
        before, missing, behind = known, f"{start} changed" if start else "", list[RecipeStep]()
        for recipe_step in chain:
            judged = recipe_step.stage == "evaluate"
            key = recipe_step.key(
                evaluation_key(variant, before, dtype, claims) if judged else before
            )
            if key not in seen:
                run, record = ("", None) if fresh else past.made.get(key, ("", None))
                last = past.last(recipe_step.id, variant if judged else "")
                why = (
                    run
                    if record
                    else ("asked for with --fresh" if fresh else _why(recipe_step, last, missing))
                )
                seen[key] = StepStatus(recipe_step, tuple(behind), key, [], record, why, last)
            seen[key].variants.append(variant)
            if not judged:
                before = key
                behind.append(recipe_step)
                missing = missing if seen[key].record else missing or f"behind {recipe_step.id}"
    yield from seen.values()


def has_checkpoint(
    past: ReuseIndex, run: str, variant: str, found: Iterable[StepStatus], dtype: str
) -> bool:
    """Return whether the checkpoint of a variant lies in the run's own folder."""
    key = next(
        (
            f.key
            for f in reversed([*found])
            if variant in f.variants and f.recipe_step.stage != "evaluate"
        ),
        past.start,
    )
    return past.saved.get(checkpoint_key(variant, key, dtype)) == run


def _why(recipe_step: RecipeStep, last: StepRecord | None, missing: str) -> str:
    """Say why a step has to be made: itself first, then what is before it."""
    if last is None:
        return "not made before"
    old, new = last.options, options_of(recipe_step.step)
    differ = [
        f"{key} {old.get(key)} → {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if differ:
        return "changed: " + ", ".join(differ)
    if last.plugin != (plugin := f"{recipe_step.origin.distribution} {recipe_step.origin.version}"):
        return f"changed: {last.plugin} → {plugin}"
    if last.before and recipe_step.key(last.before) != last.key:
        return f"changed: the code of {recipe_step.origin.distribution}"
    return missing or "its files are gone, or made from something else"
