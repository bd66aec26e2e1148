"""Tab-separated tables as editors and spreadsheets write them.

A cell holds no tab and no line break. Quotation marks are plain characters, unless they are the
ones that spreadsheets put around a cell whose own marks they double.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rotdistill_core.data.text_files import (
    NotUtf8Error,
    comparable,
    decode_utf8,
    foreign_characters,
)
from rotdistill_core.store.plain import COLLECTION_BYTES, read_bytes

LINE_END = re.compile(r"\r\n|\r|\n")
VERBATIM = ("text",)
"""Columns whose cells keep the blanks around them, because models read them as they are."""
LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}")
"""A language as in BCP 47: a code of ISO 639, and subtags such as `pt-BR` has."""
RESERVED_ENDINGS = (".own", ".place")
"""Ends of the ids of texts that are made from others."""

LONGEST_CELL = 131_072
"""Characters of a cell. More is not one text, but a table whose line ends are lost."""

TableRow = Mapping[str, str]
"""Column -> cell."""


class NumberedRow(dict[str, str]):
    """A row of a table: column -> cell, and the number of its line."""

    def __init__(self, line: int, cells: Mapping[str, str]) -> None:
        super().__init__(cells)
        self.line = line


def read_table(path: Path, columns: Sequence[str], problems: list[str]) -> list[NumberedRow]:
    """Return the rows of a table that has these columns.

    Args:
        path: the file.
        columns: the names in its first line.
        problems: takes what is wrong, a sentence each that names file, line and column.
    """
    try:
        text = decode_utf8(read_bytes(path, COLLECTION_BYTES))
    except NotUtf8Error as error:
        problems.append(f"{path}: {error}. The recipe names it under [samples].")
        return []
    except OSError as error:
        problems.append(
            f"{path}: cannot be read: {error.strerror}. The recipe names it under [samples]."
        )
        return []
    first, *others = LINE_END.split(text)
    header = _cells(first, columns)
    if header != list(columns):
        problems.append(f"{path}: line 1: the columns must be {', '.join(columns)}.")
        return []
    rows: dict[str, NumberedRow] = {}
    for number, line in enumerate(others, 2):
        if not line.strip():
            continue  # at the end of most files, and between paragraphs of some
        cells = _cells(line, columns)
        found = list(_row_problems(cells, columns))
        if not found and comparable(cells[0]) in rows:
            found.append(f"the id {cells[0]} is already used.")
        problems += [f"{path}: line {number}: {problem}" for problem in found]
        if not found:
            rows[comparable(cells[0])] = _row(number, cells, columns)
    return list(rows.values())


def _cells(line: str, columns: Sequence[str]) -> list[str]:
    """Return the cells of a line, without the empty ones that follow the last column."""
    cells = [_unquoted(cell) for cell in line.split("\t")]
    while len(cells) > len(columns) and not cells[-1].strip():
        cells.pop()
    verbatim = {k for k, column in enumerate(columns) if column in VERBATIM}
    return [cell if k in verbatim else cell.strip() for k, cell in enumerate(cells)]


def _unquoted(cell: str) -> str:
    """Return a cell without the quotation marks of a spreadsheet.

    A spreadsheet doubles the marks inside. A cell with a single mark inside is text that begins and
    ends with a quotation.
    """
    inner = cell.strip()[1:-1]
    if len(cell.strip()) < 2 or cell.strip() != f'"{inner}"' or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _row(number: int, cells: Sequence[str], columns: Sequence[str]) -> NumberedRow:
    row = dict(zip(columns, cells, strict=True))
    primary, dash, subtags = row["language"].partition("-")
    # Case means nothing in a language tag, and results are grouped by it.
    return NumberedRow(number, {**row, "language": f"{primary.lower()}{dash}{subtags}"})


def _row_problems(cells: Sequence[str], columns: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the cells of one line."""
    filled = sum(bool(cell.strip()) for cell in cells)
    if len(cells) != len(columns) or filled != len(cells):
        yield f"needs {len(columns)} non-empty cells, has {filled}.{_torn(cells)}"
        return
    for column, cell in zip(columns, cells, strict=True):
        if len(cell) > LONGEST_CELL:
            yield f"{column}: has {len(cell)} characters; {LONGEST_CELL} are the most."
        foreign = sorted(set(foreign_characters(cell)))
        if foreign:
            yield (
                f"{column}: holds {', '.join(foreign)}, which is no character of a text; remove it."
            )
    row = dict(zip(columns, cells, strict=True))
    if not LANGUAGE.fullmatch(row["language"]):
        yield (
            f"language: must be a code of ISO 639 such as en, or a tag such as pt-BR (it is "
            f"{row['language']!r:.40})."
        )
    if row["id"].endswith(RESERVED_ENDINGS):
        yield f"id: {row['id']} must not end with {' or '.join(RESERVED_ENDINGS)}, which are ours."


def _torn(cells: Sequence[str]) -> str:
    """Return a hint for a line of which a tab or a line break inside a quoted cell took a part."""
    if not any(cell.startswith('"') or cell.endswith('"') for cell in cells):
        return ""
    return " A cell holds no tab and no line break, inside quotation marks neither."
