"""Tab-separated tables as editors and spreadsheets write them.

A cell holds no tab and no line break. Quotation marks are plain characters, unless they are the
ones that spreadsheets put around a cell whose own marks they double.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rotdistill_core.data.rows import KEYS, Row
from rotdistill_core.data.text_files import LINE_END, decode_file, foreign_characters
from rotdistill_core.errors import first_few, suggest

VERBATIM = ("text",)
"""Columns whose cells keep the blanks around them, because models read them as they are."""
NESTED = ("messages", "conversations")
"""Columns that no cell can hold."""
ASKING = ("question", "prompt", "instruction", "text")
"""Columns of which a table has one: those of questions, and that of texts outside the domain."""


def read_table(path: Path, problems: list[str]) -> list[Row]:
    """Return the rows of a table; a line break in a cell of `text` is written `\\n`.

    Args:
        path: the file.
        problems: takes what is wrong, a sentence each that names file, line and column.
    """
    text = decode_file(path, problems)
    if text is None:
        return []
    first, *others = LINE_END.split(text)
    header = _header(first)
    faults = first_few(_header_faults(header))
    if faults:
        problems += [f"{path}: line 1: {fault}" for fault in faults]
        return []
    rows = []
    for number, line in enumerate(others, 2):
        if not line.strip():
            continue  # at the end of most files, and between paragraphs of some
        where = f"{path}: line {number}"
        cells = _cells(line, header)
        if len(cells) != len(header):
            problems.append(f"{where}: needs {len(header)} cells, has {len(cells)}.{_torn(cells)}")
            continue
        rows.append(Row(where, _values(header, cells)))
    return rows


def _header(line: str) -> list[str]:
    """Return the names of the columns, without empty ones behind the last."""
    names = [_unquoted(cell).strip() for cell in line.split("\t")]
    while names and not names[-1]:
        names.pop()
    return names


def _header_faults(header: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the names of the columns, a sentence each."""
    if not header:
        yield "the columns must be named here, with a tab between."
    if len(header) == 1 and any(sign in header[0] for sign in ",;{"):
        yield (
            f"is no tab-separated header ({header[0]!r:.60}). Save the table with tabs, or call a "
            "file of JSON lines `.jsonl`."
        )
        return
    if header and not {*ASKING} & {*header}:
        yield f"has none of the columns {', '.join(ASKING)}; the first three hold what is asked."
    for name, times in Counter(header).items():
        shown = "".join(c for c in name if not [*foreign_characters(c)])[:60]
        if times > 1:
            yield f"has the column {shown} twice."
        if name in NESTED:
            yield f"a table holds no {name}; write them as JSON lines (.jsonl)."
        elif name not in KEYS:
            yield f"the column {shown!r} is unknown.{suggest(name, sorted(KEYS))}"


def _cells(line: str, columns: Sequence[str]) -> list[str]:
    """Return the cells of a line, without the empty ones that follow the last column."""
    cells = [_unquoted(cell) for cell in line.split("\t")]
    while len(cells) > len(columns) and not cells[-1].strip():
        cells.pop()
    return cells


def _values(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """Return column -> cell, without empty cells."""
    values = {}
    for column, cell in zip(columns, cells, strict=True):
        if cell.strip():
            values[column] = cell.replace("\\n", "\n") if column in VERBATIM else cell.strip()
    return values


def _unquoted(cell: str) -> str:
    """Return a cell without the quotation marks of a spreadsheet.

    A spreadsheet doubles the marks inside. A cell with a single mark inside is text that begins and
    ends with a quotation.
    """
    inner = cell.strip()[1:-1]
    if len(cell.strip()) < 2 or cell.strip() != f'"{inner}"' or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _torn(cells: Sequence[str]) -> str:
    """Return a hint for a line of which a tab or a line break inside a quoted cell took a part."""
    if not any(cell.startswith('"') or cell.endswith('"') for cell in cells):
        return ""
    return " A cell holds no tab and no line break, inside quotation marks neither."
