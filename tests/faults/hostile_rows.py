"""Hostile rows: JSON lines and Parquet files of conversations, and files of answers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.faults.inputs import ANY, CHECK_RECIPE, PLAN, RUN, Input, replace_in

KIND = "hostile rows"
LINE = 3
"""Where a hostile line stands."""
HUGE = 100_000_000
"""Bytes of a line that does not end."""
PAIR = {"id": "x", "language": "en", "question": "w1 w2", "answer": "w3 w4"}
USER = {"role": "user", "content": "w1 w2"}
ASSISTANT = {"role": "assistant", "content": "w3 w4"}


def _pair(**more: object) -> bytes:
    return json.dumps({**PAIR, **more}).encode()


def _chat(*messages: object, **more: object) -> bytes:
    return json.dumps({"id": "x", "language": "en", "messages": messages, **more}).encode()


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def _with(key: str, value: bytes) -> bytes:
    """Return a line with a value as it stands, which may be no JSON."""
    return _pair()[:-1] + f', "{key}": '.encode() + value + b"}"


TEXTS: Mapping[str, bytes] = {
    "a raw NUL": _pair(answer="w3 @").replace(b"@", b"\0"),
    "an escaped NUL": _pair(answer="w3 \0"),
    "a lone surrogate": _pair(question="w1 \ud800"),
    "a lone surrogate in a turn": _chat({**USER, "content": "\udfff"}, ASSISTANT),
    "bytes of a surrogate": _pair(answer="@").replace(b"@", b"\xed\xa0\x80"),
    "1e400 as an answer": _pair(answer="@").replace(b'"@"', b"1e400"),
    "1e400 as an id": _pair(id="@").replace(b'"@"', b"1e400"),
    "NaN": _pair(answer="@").replace(b'"@"', b"NaN"),
    "a number of 5,000 digits": _pair(id="@").replace(b'"@"', b"9" * 5000),
    "a key twice": _pair()[:-1] + b', "answer": "w5"}',
    "a key twice in a turn": b'{"messages": [{"role": "user", "role": "user", "content": "w1"}]}',
    "10,000 lists in a turn": _chat({**USER, "content": "@"}).replace(b'"@"', _nested(10_000)),
    "10,000 lists as messages": _chat("@").replace(b'"@"', _nested(10_000)),
    "100 lists as a turn": _chat({**USER, "content": "@"}).replace(b'"@"', _nested(100)),
    "10,000 objects": b'{"a": ' * 10_000 + b"1" + b"}" * 10_000,
    "100 MB cut off": b'{"question": "' + b"w1 " * (HUGE // 3),
    "a text of 100 MB": _pair(answer="@").replace(b"@", b"w1 " * (HUGE // 3)),
    "a number as content": _chat({**USER, "content": 7}, ASSISTANT),
    "null as content": _chat({**USER, "content": None}, ASSISTANT),
    "true as a question": _pair(question=True),
    "the assistant first": _chat(ASSISTANT, USER),
    "the user twice": _chat(USER, USER, ASSISTANT),
    "a system prompt last": _chat(USER, ASSISTANT, {"role": "system", "content": "w1"}),
    "a role of nobody": _chat({**USER, "role": "root"}),
    "a role as a list": _chat({**USER, "role": ["user"]}),
    "no messages": _chat(),
    "a message as a number": _chat(1),
    "messages as an object": _pair(messages={"0": USER}),
    "two system prompts": _chat({"role": "system", "content": "w1"}, USER, system="w2"),
    "a cut line": _pair()[:-7],
    "two objects": _pair() + _pair(),
    "a list": b"[1]",
    "markup as a language": _pair(language="<b>"),
    "facts 10,000 lists deep": _with("facts", _nested(10_000)),
}
"""Lines of conversations that are refused."""
TAKEN: Mapping[str, bytes] = {
    "a key that is not read, 1e400": _with("score", b"1e400"),
    "messages beside a question": _chat(USER, ASSISTANT, question="w5"),
    "a pair among messages": _pair(),
    "an empty line": b"   ",
}
"""Lines that may be read."""
ANSWER = {"id": "held-0", "answer": "w3"}


def _answer(**more: object) -> bytes:
    return json.dumps({**ANSWER, **more}).encode()


def _tokens(value: bytes) -> bytes:
    return b'{"id": "held-0", "tokens": ' + value + b"}"


ANSWERS: Mapping[str, bytes] = {
    "a lone surrogate": _answer(answer="w3 \ud800"),
    "bytes of a surrogate": _answer(answer="@").replace(b"@", b"\xed\xa0\x80"),
    "a number": _answer(answer=1),
    "1e400": _answer(answer="@").replace(b'"@"', b"1e400"),
    "an empty answer": _answer(answer=""),
    "a key twice": _answer()[:-1] + b', "answer": "w5"}',
    "an answer twice": _answer() + b"\n" + _answer(),
    "no answer": b'{"id": "held-0"}',
    "no name": b'{"answer": "w3"}',
    "tokens 10,000 lists deep": _tokens(_nested(10_000)),
    "tokens 100 lists deep": _tokens(_nested(100)),
    "tokens as a text": _tokens(b'"w3"'),
    "1e400 as a token": _tokens(b"[1e400]"),
    "1.0 as a token": _tokens(b"[1.0]"),
    "true as a token": _tokens(b"[true]"),
    "a token below 0": _tokens(b"[-1]"),
    "a token of nobody": _tokens(b"[99999999999999999999]"),
    "no tokens": _tokens(b"[]"),
    "another text than the tokens": _answer(tokens=[7, 8]),
    "100 MB cut off": b'{"id": "held-0", "answer": "' + b"w1 " * (HUGE // 3),
    "a text of 100 MB": _answer(answer="@").replace(b"@", b"w1 " * (HUGE // 3)),
    "a list": b"[1]",
}
"""Lines of answers that are refused."""


def row_inputs() -> Iterator[Input]:
    """Yield all inputs of this module."""
    calls = (CHECK_RECIPE, PLAN, RUN)
    for title, line in TEXTS.items():
        tells = "not UTF-8 text" if "bytes of" in title else f"index.jsonl: line {LINE}"
        change = partial(_lines, line=line)
        yield Input(KIND, f"JSON lines: {title}", change, {2}, calls, early=True, tells=tells)
    for title, line in TAKEN.items():
        yield Input(KIND, f"JSON lines: {title}", partial(_lines, line=line), ANY, early=True)
    for title, make in _PARQUET.items():
        yield Input(
            KIND,
            f"Parquet: {title}",
            partial(_parquet, make=make),
            {2},
            calls,
            early=True,
            tells="index.parquet",
        )
    for title, line in ANSWERS.items():
        tells = "not UTF-8 text" if "bytes of" in title else "answers.jsonl, line "
        change = partial(_answers, line=line)
        yield Input(KIND, f"answers: {title}", change, {2}, tells=tells)


def _rows(work: Path) -> list[dict[str, Any]]:
    """Return the conversations of a workspace."""
    with (work / "texts/index.tsv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t"))
    return [
        {"id": row["id"], "language": "en", "question": row["question"], "answer": row["blurb"]}
        for row in found
    ]


def _lines(work: Path, line: bytes) -> None:
    """Let the index be JSON lines, with a hostile one among them."""
    lines = [json.dumps(row).encode() for row in _rows(work)]
    lines.insert(LINE - 1, line)
    (work / "texts/index.jsonl").write_bytes(b"\n".join(lines))
    replace_in(work / "trial.toml", "texts/index.tsv", "texts/index.jsonl")


def _answers(work: Path, line: bytes) -> None:
    """Let a file answer, whose first line is hostile."""
    second = json.dumps({"id": "held-1", "answer": "w3"}).encode()
    (work / "answers.jsonl").write_bytes(b"\n".join([second, line]))
    engine = 'engine = { use = "file", path = "answers.jsonl" }\n'
    recipe = work / "trial.toml"
    recipe.write_text(engine + recipe.read_text(encoding="utf-8"), encoding="utf-8")


def _parquet(work: Path, make: Callable[[list[dict[str, Any]]], bytes]) -> None:
    (work / "texts/index.parquet").write_bytes(make(_rows(work)))
    replace_in(work / "trial.toml", "texts/index.tsv", "texts/index.parquet")


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


_PARQUET: Mapping[str, Callable[[list[dict[str, Any]]], bytes]] = {
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
