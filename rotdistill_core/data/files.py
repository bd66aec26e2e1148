"""The forms of files that hold texts, told apart by the ends of their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from rotdistill_core.data.hub import HUB, read_hub
from rotdistill_core.data.json_lines import read_json_lines
from rotdistill_core.data.parquet import read_parquet
from rotdistill_core.data.rows import Row
from rotdistill_core.data.tables import read_table

Log = Callable[[str], None]

READERS: dict[str, Callable[[Path, list[str]], list[Row]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
}
"""Ending -> reader. Files of other endings are tab-separated tables."""
OTHER_FORMS = {
    ".json": "write one object a line, and call the file `.jsonl`",
    ".csv": "save the table with tabs, as `.tsv`",
    ".xlsx": "save the table with tabs, as `.tsv`",
    ".ods": "save the table with tabs, as `.tsv`",
    ".gz": "unpack it",
    ".zip": "unpack it",
    ".zst": "unpack it",
}
"""Endings that are not read -> what to do."""


def text_path(reference: str, base: Path) -> str:
    """Return where texts are, as messages name it: a path, or a dataset of the hub."""
    return reference if reference.startswith(HUB) else str(base / reference)


def read_rows(reference: str, base: Path, problems: list[str]) -> Sequence[Row]:
    """Return the rows of a file of texts, or of a dataset of the hub.

    Args:
        reference: what the recipe names.
        base: folder of the recipe, to which a path is relative.
        problems: takes what is wrong, a sentence each that names file, line and column.

    Raises:
        SetupError: a library for the form is not installed, or the hub does not give the dataset.
    """
    if reference.startswith(HUB):
        return read_hub(reference)
    ending = PurePath(reference).suffix.lower()
    if ending in OTHER_FORMS and (base / reference).is_file():
        problems.append(f"{base / reference}: {ending} is not read; {OTHER_FORMS[ending]}.")
        return []
    return READERS.get(ending, read_table)(base / reference, problems)
