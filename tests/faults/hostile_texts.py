"""Hostile texts: tables, system prompts, claims."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.faults.inputs import ANY, PLAN, RUN, Input

KIND = "hostile texts"
CELLS = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "Jinja": "{{ 7 * 7 }}{% for x in range(10**9) %}x{% endfor %}",
    "rich markup": "[bold red]x[/] [link=http://x]y",
    "Markdown": "| a | b |\n".strip() + " `x` **y** ![z](http://x)",
    "a formula": "=cmd|' /C calc'!A0",
    "ESC": "\x1b[31mw1\x1b]0;owned\x07",
    "NUL": "w1\x00w2",
    "C1": "w1\x9b31mw2",
    "bidi": "w1 \u202e w2 \u2066 w3",
    "no width": "w1\u200b\u200d\ufeffw2",
    "combining": "e" + "\u0301" * 500,
    "long": "w1 " * 5_000,
    "one long word": "w" * 60_000,
    "quotes": '"w1" ""w2"',
    "a quote that does not end": '"w1 w2',
    "a non-character": "w1 \ufffe\uffff w2",
    "astral": "w1 \U0001f469\u200d\U0001f680 \U00020000 w2",
    "special tokens": "<end> <system> <user> <assistant> <pad> <unk>",
    "line separators": "w1\u2028w2\u2029w3\x85w4\x0bw5\x0cw6",
    "spaces": "   \u00a0 \u3000 ",
    "empty": "",
    "a carriage return": "w1\rw2",
    "a path": "../../etc/passwd",
    "a surrogate pair": "w1 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
}
"""What a cell may hold."""
CLAIMS = (
    "[",
    "{}",
    "null",
    "[1]",
    '[{"what": 1}]',
    '[{"what": "x", "any": "y"}]',
    "[]" * 2,
    "[" * 5000,
    '[{"what": "x", "any": []}]',
    '[{"what": "x", "any": [""]}]',
    '[{"what": "<b>", "any": ["<b>"]}]',
    '[{"what": "x", "any": ["("]}]',
    "NaN",
    "1" * 5000,
    '[{"what": "x", "any": ["y"], "z": 1}]',
)
LANGUAGES = (
    "../x",
    "12",
    "en-",
    "-",
    "e" * 300,
    "EN",
    "zz",
    "en_US",
    "x-private",
    "<b>",
    "\x1b[0m",
    "é",
    "de-DE-1901-x",
    "und",
    " en",
)


def text_inputs() -> Iterator[Input]:
    """Yield all inputs of this module."""
    for title, cell in CELLS.items():
        for column in ("id", "place", "question", "blurb"):
            change = partial(_cell, table="index.tsv", column=column, text=cell)
            yield Input(KIND, f"{title} as {column}", change, ANY, early=True)
        change = partial(_cell, table="heldout.tsv", column="question", text=cell)
        yield Input(KIND, f"{title} as a held-out question", change, ANY, early=True)
        yield Input(KIND, f"{title} as the system prompt", partial(_style, text=cell), ANY)
    for language in LANGUAGES:
        for table in ("index.tsv", "heldout.tsv"):
            change = partial(_cell, table=table, column="language", text=language)
            title = f"the language {language[:20]!r} in {table}"
            yield Input(KIND, title, change, ANY, early=True)
    for k, claims in enumerate(CLAIMS):
        for column in ("facts", "falsehoods"):
            change = partial(_cell, table="heldout.tsv", column=column, text=claims)
            yield Input(KIND, f"{column} {claims[:30]!r} ({k})", change, ANY, early=True)
    for title, whole in _WHOLE.items():
        for table in ("index.tsv", "heldout.tsv"):
            change = partial(_file, table=table, whole=whole)
            yield Input(KIND, f"{title}: {table}", change, ANY, (PLAN, RUN), early=True)


def _cell(work: Path, table: str, column: str, text: str) -> None:
    """Set one cell of the first row."""
    path = work / "texts" / table
    lines = path.read_text(encoding="utf-8").split("\n")
    place = lines[0].split("\t").index(column)
    cells = lines[1].split("\t")
    cells[place] = text
    lines[1] = "\t".join(cells)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def _style(work: Path, text: str) -> None:
    (work / "texts/style.md").write_bytes(text.encode("utf-8", "surrogatepass"))


def _file(work: Path, table: str, whole: Callable[[Path], None]) -> None:
    whole(work / "texts" / table)


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return write


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _rows(count: int) -> Callable[[bytes], bytes]:
    def cut(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        return b"".join(lines[: count + 1])

    return cut


def _many(data: bytes) -> bytes:
    head, row = data.splitlines(keepends=True)[:2]
    rows = [row.replace(b"-0\t", f"-{k}\t".encode(), 1) for k in range(300_000)]
    return head + b"".join(rows)


_WHOLE: dict[str, Callable[[Path], None]] = {
    "empty": _bytes(lambda data: b""),
    "no rows": _bytes(_rows(0)),
    "one row": _bytes(_rows(1)),
    "two rows": _bytes(_rows(2)),
    "a byte-order mark": _bytes(lambda data: b"\xef\xbb\xbf" + data),
    "UTF-16": _bytes(lambda data: data.decode().encode("utf-16")),
    "Latin 1": _bytes(lambda data: data + b"en-9\ten\tS\xe3o\tland\tw1\tw2\n"),
    "CRLF": _bytes(lambda data: data.replace(b"\n", b"\r\n")),
    "CR": _bytes(lambda data: data.replace(b"\n", b"\r")),
    "no end of line": _bytes(lambda data: data.rstrip(b"\n")),
    "commas": _bytes(lambda data: data.replace(b"\t", b",")),
    "other columns": _bytes(lambda data: data.replace(b"language", b"tongue", 1)),
    "a column twice": _bytes(lambda data: data.replace(b"country", b"place", 1)),
    "a cell too few": _bytes(lambda data: data + b"en-9\ten\n"),
    "a cell too many": _bytes(lambda data: data.rstrip(b"\n") + b"\tx\n"),
    "an id twice": _bytes(lambda data: data + data.splitlines(keepends=True)[1]),
    "an empty line": _bytes(lambda data: data.replace(b"\n", b"\n\n", 1)),
    "zeros": _bytes(lambda data: bytes(len(data))),
    "only a header of 2 MB": _bytes(lambda data: b"a\t" * 1_000_000 + b"\n" + data),
    "a line of 5 MB": _bytes(lambda data: data + b"x" * 5_000_000 + b"\n"),
    "a fifo": _fifo,
    "an endless device": _endless,
    "a folder": _as_folder,
    "gone": Path.unlink,
}
"""What a whole table may be."""
