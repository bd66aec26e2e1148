"""Hostile rows: JSON lines and Parquet files of conversations, and files of answers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.inputs import ANY, CHECK_RECIPE, PLAN, RUN, Input, replace_in

KIND = "hostile rows"
ROOT = Path(__file__).parents[2]
LINE = 3
"""Where a hostile line stands."""
HUGE = 100_000_000
"""Bytes of a line that does not end."""
USER = {"role": "user", "content": "w1 w2"}
ASSISTANT = {"role": "assistant", "content": "w3 w4"}
PAIR = {"id": "x", "language": "en", "question": "w1 w2", "answer": "w3 w4"}


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
    "another text than the tokens": _answer(tokens=[7, 8]),
    "100 MB cut off": b'{"id": "held-0", "answer": "' + b"w1 " * (HUGE // 3),
    "a text of 100 MB": _answer(answer="@").replace(b"@", b"w1 " * (HUGE // 3)),
    "a list": b"[1]",
}
"""Lines of answers that are refused."""
EMPTY: Mapping[str, bytes] = {
    "an empty answer": _answer(answer=""),
    "no tokens": _tokens(b"[]"),
}
"""Answers that end at once, as those of a model may."""

PARQUET = (
    "empty",
    "no rows",
    "cut off",
    "half of it",
    "another beginning of the footer",
    "a changed page",
    "JSON",
    "numbers as questions",
    "infinite answers",
    "bytes as answers",
    "a NUL",
    "an empty answer",
    "a list as a question",
    "50 lists as messages",
    "messages without roles",
    "null as content",
    "numbers as content",
    "no messages",
    "the assistant first",
    "dates as ids",
    "an id twice",
    "a language that is none",
)
"""Names of the files of `parquet_rows`, all of which are refused."""


def row_inputs() -> Iterator[Input]:
    """Yield all inputs of this module."""
    calls = (CHECK_RECIPE, PLAN, RUN)
    for title, line in TEXTS.items():
        tells = "not UTF-8 text" if "bytes of" in title else f"index.jsonl: line {LINE}"
        change = partial(_lines, line=line)
        yield Input(KIND, f"JSON lines: {title}", change, {2}, calls, early=True, tells=tells)
    for title, line in TAKEN.items():
        yield Input(KIND, f"JSON lines: {title}", partial(_lines, line=line), ANY, early=True)
    for title in PARQUET:
        yield Input(
            KIND,
            f"Parquet: {title}",
            partial(_parquet, title=title),
            {2},
            calls,
            early=True,
            tells="index.parquet",
        )
    for title, line in ANSWERS.items():
        tells = "not UTF-8 text" if "bytes of" in title else "answers.jsonl, line "
        change = partial(_answers, line=line)
        yield Input(KIND, f"answers: {title}", change, {2}, tells=tells)
    for title, line in EMPTY.items():
        yield Input(KIND, f"answers: {title}", partial(_answers, line=line), {0})


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


def _parquet(work: Path, title: str) -> None:
    """Let the index be Parquet. Another process writes it: pyarrow leaves threads behind."""
    path = work / "texts/index.parquet"
    words = [sys.executable, "-m", "tests.faults.parquet_rows", title, str(path)]
    rows = json.dumps(_rows(work))
    subprocess.run(words, cwd=ROOT, input=rows, text=True, check=True, timeout=300)
    replace_in(work / "trial.toml", "texts/index.tsv", "texts/index.parquet")
