"""What is in a folder of runs: which there are, what each stands on, and which of its files others stand on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotdistill_core.errors import RecipeError, suggest
from rotdistill_core.store.ledger import Ledger

if TYPE_CHECKING:
    from rotdistill_core.evaluation.rows import MetricRow


Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @cached_property
    def ledger(self) -> Ledger:
        """Its ledger."""
        return Ledger(self.path)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe with everything resolved; empty where the run has lost it."""
        try:
            found: dict[str, Any] = json.loads(
                (self.path / "recipe.resolved.json").read_text(encoding="utf-8")
            )
        except (OSError, ValueError):
            return {}
        return found

    @property
    def state(self) -> str:
        """`done`, `unfinished`, `kept files` where only what other runs stand on is left, or `copy of` another."""
        files = [r for r in self.ledger.records if r["kind"] == "file"]
        owners = {r["path"].split("/")[0] for r in files}
        if owners and self.path.name not in owners:
            return f"copy of {', '.join(sorted(owners))}"
        names = {r["name"] for r in files if (self.path.parent / r["path"]).is_file()}
        return (
            "done"
            if "results.jsonl" in names
            else "unfinished"
            if "recipe.resolved.json" in names
            else "kept files"
        )

    @property
    def bytes(self) -> int:
        """Size of everything in the folder."""
        return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())

    @property
    def changed(self) -> str:
        """When something was last committed, in local time."""
        return (
            datetime.fromtimestamp(self.ledger.path.stat().st_mtime)
            .astimezone()
            .isoformat(" ", "minutes")[:16]
        )

    def rows(self) -> list[MetricRow]:
        """Return what the variants scored in the newest finished run; empty before."""
        from rotdistill_core.evaluation.rows import MetricRow

        path = self.path / "results.jsonl"
        return (
            [
                MetricRow(**json.loads(line))
                for line in path.read_text(encoding="utf-8").splitlines()
            ]
            if path.is_file()
            else []
        )

    def chains(self) -> dict[str, dict[str, Record]]:
        """Return variant -> step id -> record of the newest result, as far as each variant came."""
        variants, steps = (
            self.recipe.get("variants", {}),
            [step["id"] for step in self.recipe.get("step", [])],
        )
        toggled = {name for names in variants.values() for name in names}
        return {
            variant: self._chain(variant, [s for s in steps if s not in toggled or s in names])
            for variant, names in variants.items()
        }

    def _chain(self, variant: str, steps: list[str]) -> dict[str, Record]:
        """Follow the keys from step to step: a record says behind which other it was made. The longest chain wins, then the newest."""
        records = [r for r in self.ledger.records[::-1] if r["kind"] == "step"]
        best: dict[str, Record] = {}
        for start in [r for r in records if steps and r["id"] == steps[0]]:
            chain, before = dict[str, Record]({steps[0]: start}), start["key"]
            for step in steps[1:]:
                found = next(
                    (r for r in records if r["id"] == step and r["before"] == before), None
                )
                if found:
                    before = found["key"]
                else:  # evaluators stand behind a checkpoint, not behind a key
                    found = next((r for r in records if r["id"] == f"{step} {variant}"), None)
                if found:
                    chain[step] = found
            best = max(best, chain, key=len)
        return best


def all_runs(root: Path) -> list[RunFolder]:
    """Return every run under a folder, the newest first."""
    paths = sorted(root.glob("*/ledger.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [RunFolder(path.parent) for path in paths]


def find_run(name: str, root: Path, log: Callable[[str], None] | None = None) -> RunFolder:
    """Return the run called `name`: its folder, its name under `root`, or the beginning of one that no other run has.

    With `say`, the name of a recipe is enough where it was run several times: the newest finished run is taken, else the newest.

    Raises:
        RecipeError: there is none, or there are several.
    """
    if (Path(name) / "ledger.jsonl").is_file():
        return RunFolder(Path(name))
    known = {run.path.name: run for run in all_runs(root)}
    if name in known:
        return known[name]
    begin = [each for each in known if each.startswith(name)]
    if (
        len(begin) > 1
        and log
        and all(re.fullmatch("-[0-9a-f]{8}", each.removeprefix(name)) for each in begin)
    ):
        taken = next((each for each in begin if known[each].state == "done"), begin[0])
        log(
            f"{taken}, {known[taken].state}, of {known[taken].changed}: the newest of {len(begin)} runs called {name}"
        )
        return known[taken]
    if len(begin) > 1:
        listed = ", ".join(f"{each} (of {known[each].changed})" for each in begin)
        raise RecipeError(
            f'"{name}" is the beginning of {len(begin)} runs, the newest first: {listed}. Write one of these names.'
        )
    if not begin:
        listed = suggest(name, known) or f" `rotdistill runs` lists those in {root}/."
        raise RecipeError(f'there is no run "{name}".{listed}')
    return known[begin[0]]


def mentioned(value: Any, run: str) -> Iterator[str]:
    """Yield every path into a run's folder that a ledger record mentions, wherever it stands."""
    if isinstance(value, str):
        if value.startswith(f"{run}/"):
            yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from mentioned(item, run)


def needed_by(run: RunFolder, others: Iterable[RunFolder]) -> dict[str, list[str]]:
    """Return each file of a run that results of other runs consist of, with the names of those runs."""
    found: dict[str, list[str]] = {}
    for other in others:
        if other.path.resolve() != run.path.resolve():
            for path in {
                p
                for r in other.ledger.records
                if r["kind"] == "step"
                for p in mentioned(r, run.path.name)
            }:
                found.setdefault(path, []).append(other.path.name)
    return found
