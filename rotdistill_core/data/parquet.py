"""Rows of Parquet files, read with pyarrow: the reference library of the format."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rotdistill_core.data.rows import KEYS, Row, ignored_keys, known_values
from rotdistill_core.data.text_files import NAMED_BY
from rotdistill_core.errors import SetupError
from rotdistill_core.store.plain import COLLECTION_BYTES, require_plain

ROWS_AT_ONCE = 1024


def read_parquet(path: Path, problems: list[str]) -> list[Row]:
    """Return the rows of a Parquet file.

    Args:
        path: the file.
        problems: takes what is wrong, a sentence each that names file, row and column.

    Raises:
        SetupError: pyarrow is not installed.
    """
    try:
        require_plain(path, COLLECTION_BYTES)
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}. {NAMED_BY}")
        return []
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise SetupError(
            f"{path}: Parquet files are read with pyarrow, which is not installed: `pip install "
            "'rotdistill[parquet]'`, or save the texts as JSON lines (.jsonl)."
        ) from error
    rows: list[Row] = []
    try:
        with parquet.ParquetFile(path) as file:
            _append_rows(file, path, rows)
    except Exception as error:  # its errors have no class in common
        where = f"{path}: row {len(rows) + 1}" if rows else str(path)
        said = " ".join(str(error).split())[:200]
        problems.append(f"{where}: is no Parquet that can be read: {said}. Write it anew.")
    return rows


def _append_rows(file: Any, path: Path, rows: list[Row]) -> None:
    """Append all rows of an open file.

    Raises:
        ValueError: its columns are larger than any texts.
    """
    groups = (file.metadata.row_group(k) for k in range(file.metadata.num_row_groups))
    size = sum(group.total_byte_size for group in groups)
    if size > COLLECTION_BYTES:
        raise ValueError(f"it unpacks to {size} bytes; {COLLECTION_BYTES} are the most")
    columns = [name for name in file.schema_arrow.names if name in KEYS]
    others = tuple(ignored_keys(file.schema_arrow.names))
    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
        for values in batch.to_pylist():
            rows.append(Row(f"{path}: row {len(rows) + 1}", known_values(values), others))
