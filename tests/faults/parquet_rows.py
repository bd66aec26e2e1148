"""Writes a hostile Parquet file: a program of its own, because pyarrow leaves threads behind.

    python -m tests.faults.parquet_rows TITLE FILE < ROWS

Rows come as a JSON list.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.faults.hostile_rows import ASSISTANT, USER


def _table(rows: list[dict[str, Any]], **columns: Any) -> bytes:
    """Return rows as Parquet, some columns replaced."""
    table = pyarrow.Table.from_pylist(rows)
    for name, values in columns.items():
        own = values if isinstance(values, pyarrow.Array) else pyarrow.array(values)
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, own)
        else:
            table = table.append_column(name, own)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return bytes(sink.getvalue())


def _deep(depth: int) -> pyarrow.Array:
    value: Any = "w1"
    for _ in range(depth):
        value = [value]
    return pyarrow.array([value] * 8)


def _changed(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


FILES: Mapping[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "empty": lambda _: b"",
    "no rows": lambda rows: _table(rows[:0]),
    "cut off": lambda rows: _table(rows)[:-20],
    "half of it": lambda rows: _table(rows)[: len(_table(rows)) // 2],
    "another beginning of the footer": lambda rows: _changed(_table(rows), -200),
    "a changed page": lambda rows: _changed(_table(rows), 30),
    "JSON": lambda rows: json.dumps(rows).encode(),
    "numbers as questions": lambda rows: _table(rows, question=list(range(8))),
    "infinite answers": lambda rows: _table(rows, answer=[float("inf")] * 8),
    "bytes as answers": lambda rows: _table(rows, answer=[b"\xff\x00"] * 8),
    "a NUL": lambda rows: _table(rows, answer=["w1\0"] * 8),
    "an empty answer": lambda rows: _table(rows, answer=[*["w1"] * 7, ""]),
    "a list as a question": lambda rows: _table(rows, question=_deep(1)),
    "50 lists as messages": lambda rows: _table(rows, messages=_deep(50)),
    "messages without roles": lambda rows: _table(rows, messages=[[{"content": "w1"}]] * 8),
    "null as content": lambda rows: _table(
        rows, messages=[[USER, {"role": "assistant", "content": None}]] * 8
    ),
    "numbers as content": lambda rows: _table(
        rows, messages=[[{"role": "user", "content": 1}]] * 8
    ),
    "no messages": lambda rows: _table(rows, messages=[[USER, ASSISTANT]] * 7 + [[]]),
    "the assistant first": lambda rows: _table(rows, messages=[[ASSISTANT, USER]] * 8),
    "dates as ids": lambda rows: _table(
        rows, id=pyarrow.array(range(8), type=pyarrow.timestamp("s"))
    ),
    "an id twice": lambda rows: _table([*rows, rows[0]]),
    "a language that is none": lambda rows: _table(rows, language=["../x"] * 8),
}
"""Files that are refused."""


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(FILES[sys.argv[1]](json.loads(sys.stdin.read())))
