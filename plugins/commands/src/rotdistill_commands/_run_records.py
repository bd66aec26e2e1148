"""What a run should have and has not: documents, records of its steps, files of its records."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from rotdistill_core.errors import CheckFailed
from rotdistill_core.evaluation.rows import failed_variants
from rotdistill_core.execution.run_folder import RunFolder
from rotdistill_core.store.layout import RunLayout

FIRST_DOCUMENTS = (
    RunLayout.RECIPE,
    RunLayout.RESOLVED_RECIPE,
    RunLayout.TEXTS,
    RunLayout.SYSTEM_PROMPT,
)
"""What a run writes before its first step."""
LAST_DOCUMENTS = (
    RunLayout.RESULTS,
    RunLayout.REPORT_HTML,
    RunLayout.REPORT_MARKDOWN,
    RunLayout.REPORT_JSON,
)
"""What a run writes after its last step."""
SUFFIXES = (".json", ".safetensors", ".tsv", ".md", ".toml")
"""Of the files in a checkpoint that runs write. Files of other kinds are the user's."""


def has_documents(folder: Path) -> bool:
    """Return whether a folder looks like a run, whatever its ledger says."""
    is_there = [(folder / name).is_file() for name in (*FIRST_DOCUMENTS, RunLayout.LEDGER)]
    return is_there[-1] and any(is_there[:-1])


def run_problems(run: RunFolder) -> Iterator[str]:
    """Yield a sentence for everything that a run has lost.

    What its ledger lost at the end leaves no gap there; but the files are there that the lost
    lines committed.
    """
    ledger = run.ledger
    if not ledger.records and not ledger.faults:
        yield f"{ledger.path}: is empty; all its lines are lost."
        return
    if not ledger.is_chained or run.is_copy:
        return  # of an older version, or of another folder
    if ledger.starts or ledger.steps or ledger.checkpoints:
        yield from _missing_documents(run)
    for record in run.checkpoints.values():
        if all(not run.store.fault_of(file) for file in record.files):
            problem = run.store.manifest_problem(record)
            yield from [problem] if problem else []
    try:
        if run.rows():
            yield from _missing_records(run)
    except CheckFailed:
        pass  # its damage is told of the file
    if any((run.path / name).exists() for name in LAST_DOCUMENTS):
        yield from _uncommitted_files(run)


def _missing_documents(run: RunFolder) -> Iterator[str]:
    for name in FIRST_DOCUMENTS:
        if run.ledger.named(name) is None:
            yield f"{run.path / name}: no line of the ledger commits it; the line is lost."


def _missing_records(run: RunFolder) -> Iterator[str]:
    """Yield the records that a finished run must have, and has not."""
    ledger = run.ledger
    removed = {step for removal in ledger.removals for step in removal.steps}
    gone = {variant for removal in ledger.removals for variant in removal.variants}
    if not ledger.starts and not removed:
        yield f"{ledger.path}: the record of the start is lost."
    lost: dict[str, None] = {}
    for variant, steps in _finished_chains(run).items():
        for step in steps:
            of_step = [r for r in ledger.steps if r.id == step and r.variant in ("", variant)]
            if not of_step and step not in removed:
                scored = any(record.id == step for record in ledger.steps)
                lost[f'"{step}"' + (f' of variant "{variant}"' if scored else "")] = None
        if variant not in run.checkpoints and variant not in gone:
            yield f'{ledger.path}: the record of the checkpoint "{variant}" is lost.'
    for name in lost:
        yield f"{ledger.path}: the record of step {name} is lost."
    if not lost:
        yield from _broken_chains(run, removed)
    if not removed:
        yield from _unknown_files(run)


def _unknown_files(run: RunFolder) -> Iterator[str]:
    """Yield the steps whose result refers to files that no line commits."""
    committed = run.ledger.committed
    for record in {record.key: record for record in run.ledger.steps}.values():
        unknown = [path for path in record.result.paths() if path not in committed]
        if unknown:
            yield (
                f'{run.ledger.path}: the record of step "{record.id}" refers to {unknown[0]}, '
                "which no line commits."
            )


def _finished_chains(run: RunFolder) -> dict[str, list[str]]:
    """Return variant -> ids of its steps, without the variants that failed."""
    variants: dict[str, list[str]] = run.recipe.get("variants", {})
    failed = failed_variants(run.rows())
    steps = [step["id"] for step in run.recipe.get("step", [])]
    toggled = {step for names in variants.values() for step in names}
    return {
        variant: [step for step in steps if step not in toggled or step in names]
        for variant, names in variants.items()
        if variant not in failed
    }


def _broken_chains(run: RunFolder, removed: Collection[str]) -> Iterator[str]:
    """Yield the steps of the run whose start is the result of a step that has no record."""
    ledger = run.ledger
    known = {record.key for record in ledger.steps} | {start.key for start in ledger.starts}
    newest = {record.key: record for record in ledger.steps}
    edits = [record for record in newest.values() if not record.variant]
    for record in edits:
        if record.before not in known and not removed:
            yield (
                f'{ledger.path}: the record of the step that "{record.id}" started from is lost.'
            )


def _uncommitted_files(run: RunFolder) -> Iterator[str]:
    """Yield the files of a finished run that no line commits: its line is lost."""
    committed = {run.store.root / path for path in run.ledger.committed}
    for path in _own_files(run.path):
        if path.resolve() not in committed and path not in committed:
            yield (
                f"{path}: no line of the ledger commits it: the line is lost, or the file is not "
                "of the run."
            )


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a run's folder that have names as runs give them."""
    for name in (*FIRST_DOCUMENTS, *LAST_DOCUMENTS):
        if (folder / name).is_file():
            yield folder / name
    # Files of steps are left out: where another run has made the same, nobody needs them again.
    for path in sorted((folder / RunLayout.CHECKPOINTS).rglob("*")):
        named = path.suffix in SUFFIXES or path.name == RunLayout.MANIFEST
        if named and path.is_file():
            yield path
