"""Rows of JSON lines: one object a line, as editors, scripts and chat services write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rotdistill_core.data.rows import Row, ignored_keys, known_values
from rotdistill_core.data.text_files import LINE_END, decode_file


def read_json_lines(path: Path, problems: list[str]) -> list[Row]:
    """Return the rows of a file of JSON lines; blank lines are none.

    Args:
        path: the file.
        problems: takes what is wrong, a sentence each that names file, line and column.
    """
    text = decode_file(path, problems)
    if text is None:
        return []
    lines = LINE_END.split(text)
    if lines[0].lstrip().startswith("["):
        problems.append(f"{path}: line 1: is one JSON list; write one object a line, without it.")
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            values = json_object(line)
            rows.append(Row(where, known_values(values), tuple(ignored_keys(values))))
        except BadLineError as error:
            problems.append(f"{where}{error}")
    return rows


AFTER_A_TEXT = ("Expecting ',' delimiter", "Expecting ':' delimiter")
"""What json reports where a text is followed by something else."""


class BadLineError(ValueError):
    """What is wrong with a line: `, column 3: ...` or `: ...`, to follow its number."""


def json_object(line: str) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises:
        BadLineError: there is none, or it has a key twice.
    """
    try:
        value = json.loads(line, object_pairs_hook=_without_twins, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(line.rstrip()) or error.msg.startswith("Unterminated string")
        cut = " The line seems to be cut off." if is_cut else ""
        # A text that goes on after its end is mostly one with a plain quotation mark inside.
        is_quoted = not is_cut and error.msg in AFTER_A_TEXT and '"' in line[: error.pos]
        cause = " (an unescaped quotation mark?)" if is_quoted else ""
        raise BadLineError(
            f", column {error.colno}: is no JSON: {error.msg.removesuffix(' starting at')}{cause}."
            f"{cut} Write one object a line."
        ) from error
    except RecursionError as error:
        raise BadLineError(": is nested too deeply for a text.") from error
    except BadLineError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise BadLineError(f": {error}.") from error
    if not isinstance(value, dict):
        raise BadLineError(f": must be a JSON object (it is {value!r:.40}).")
    return value


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise BadLineError(f": has the key {twin!r:.40} twice; which one counts is not clear.")
    return values


def _no_number(name: str) -> NoReturn:
    raise BadLineError(f": is no JSON: {name} is no number of JSON.")
