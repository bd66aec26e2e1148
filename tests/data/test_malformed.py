"""Files of texts that are wrong: each gets one paragraph that names file, line or row, and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rotdistill_core.data.reading import read_conversations
from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.document import SamplesRef

GOOD = [
    json.dumps({"id": f"c{k}", "language": "en", "question": f"{k}?", "answer": "Yes."})
    for k in range(10)
]


def problems_of(folder: Path, name: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read_conversations(SamplesRef(index=name), folder)
    return caught.value.problems


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def chat(*turns: dict[str, Any], **more: Any) -> str:
    return json.dumps({"language": "en", "messages": turns, **more})


def pair(**more: Any) -> str:
    return json.dumps({"language": "en", "question": "Why?", "answer": "So.", **more})


USER, ASSISTANT = turn("user", "Why?"), turn("assistant", "So.")
LINES = {
    "a cut line": (
        pair()[:-4],
        ", column 50: is no JSON: Unterminated string. The line seems",
    ),
    "a cut object": (pair()[:-1], ", column 55: is no JSON: Expecting ',' delimiter. The line"),
    "a quotation mark inside": (
        '{"question": "A "b"?", "answer": "c"}',
        ", column 18: is no JSON: Expecting ',' delimiter (an unescaped quotation mark?). Write",
    ),
    "a misspelt question": (
        '{"qestion": "Why?", "answer": "So."}',
        ": has no question (it has answer, qestion; did you mean question?). It needs messages,",
    ),
    "a misspelt answer": (
        '{"question": "Why?", "anwser": "So."}',
        ": has no answer (it has anwser; did you mean answer?); write one, or let the teacher",
    ),
    "no JSON": ("Why? So.", ", column 1: is no JSON: Expecting value"),
    "single quotes": ("{'question': 'Why?'}", ", column 2: is no JSON"),
    "two objects in a line": (pair() + pair(), ", column 56: is no JSON: Extra data"),
    "a list": ("[1, 2]", ": must be a JSON object (it is [1, 2])"),
    "a number": ("5", ": must be a JSON object (it is 5)"),
    "NaN": ('{"question": NaN}', ": is no JSON: NaN is no number of JSON"),
    "a number of 5,000 digits": ('{"id": 1' + "0" * 5000 + "}", ": Exceeds the limit"),
    "deep nesting": ("[" * 100_000, ": is nested too deeply"),
    "a key twice": ('{"question": "a", "question": "b"}', ": has the key 'question' twice"),
    "a key twice in a message": (
        '{"messages": [{"role": "user", "role": "user", "content": "x"}]}',
        ": has the key 'role' twice",
    ),
    "a lone surrogate": (pair(question="a\ud800b"), ": question: holds U+D800"),
    "NUL": (pair(answer="a\0b"), ": answer: holds U+0000"),
    "a control character": (pair(answer="\x1b[31m"), ": answer: holds U+001B"),
    "a byte-order mark inside": (pair(answer="a\ufeff"), ": answer: holds U+FEFF"),
    "10 MB": (pair(answer="x" * 10_000_000), ": answer: has 10000000 characters; 131072 are"),
    "a number for a text": (pair(question=5), ": question: must be a text (it is 5)"),
    "an object for a text": (pair(answer={"a": 1}), ": answer: must be a text (it is {'a': 1})"),
    "an empty question": (pair(question=" "), ": question: is empty"),
    "an empty answer": (pair(answer=""), ": answer: is empty"),
    "no question": ('{"answer": "So."}', ": has no question (it has answer). It needs messages,"),
    "a null question": ('{"question": null, "answer": "x"}', ": has no question"),
    "nothing": ("{}", ": has no question (it has nothing). It needs messages"),
    "unknown keys": (
        '{"user": "Why?", "bot": "So."}',
        ": has no question (it has bot, user). It needs messages, conversations, question and",
    ),
    "a list for an id": (pair(id=["a"]), ": id: must be a text (it is ['a'])"),
    "an id of ours": (pair(id="a.own"), ": id: a.own must not end with .own or .place"),
    "an id twice": (pair(id="C3"), ": the id C3 is already used"),
    "two lines for an id": (pair(id="a\nb"), ": id: holds U+000A"),
    "a tab in a topic": (pair(topic="a\tb"), ": topic: holds U+0009"),
    "a language by name": (pair(language="english"), ": language: must be a code of ISO 639"),
    "messages as a text": ('{"messages": "Why?"}', ": messages: must be a list of messages"),
    "messages as an object": ('{"messages": {}}', ": messages: must be a list of messages"),
    "no messages": (chat(), ": messages: must be a list of messages (it is [])"),
    "a message as a text": ('{"messages": ["Why?"]}', ": messages.0: must be an object with role"),
    "nested messages": (
        chat([USER]),  # type: ignore[arg-type]
        ": messages.0: must be an object with role and content",
    ),
    "no role": ('{"messages": [{"content": "x"}]}', ": messages.0.role: must be system, user"),
    "an unknown role": (
        chat(USER, turn("tool", "x")),
        ": messages.1.role: must be system, user or assistant (it is 'tool')",
    ),
    "a role in capitals": (chat(turn("User", "x")), ": messages.0.role: must be system, user"),
    "the assistant first": (chat(ASSISTANT), ": messages.0.role: must be user (it is assistant)"),
    "the user twice": (chat(USER, USER), ": messages.1.role: must be assistant (it is user)"),
    "the assistant twice": (chat(USER, ASSISTANT, ASSISTANT), ": messages.2.role: must be user"),
    "a late system prompt": (
        chat(USER, turn("system", "x")),
        ": messages.1.role: a system prompt stands first",
    ),
    "two system prompts": (
        chat(turn("system", "x"), turn("system", "y"), USER, ASSISTANT),
        ": messages.1.role: a system prompt stands first, and once",
    ),
    "only a system prompt": (chat(turn("system", "x")), ": messages: has no turn of a user"),
    "another system prompt": (
        chat(turn("system", "x"), USER, ASSISTANT, system="y"),
        ": system: the messages have another system prompt",
    ),
    "an empty turn": (chat(turn("user", " "), ASSISTANT), ": messages.0.content: is empty"),
    "no content": (chat(turn("user", None)), ": messages.0.content: must be a text (it is None)"),
    "nothing but thoughts": (
        chat(USER, turn("assistant", "<think>Why indeed?")),
        ": a turn of the assistant holds thoughts and no answer",
    ),
    "a call of a tool": (
        chat(USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}),
        ": messages.1.tool_calls: calls of tools are not read",
    ),
    "an image": (
        chat(turn("user", [{"type": "text", "text": "x"}, {"type": "image_url"}]), ASSISTANT),
        ": messages.0.content.1: must be a text, as {'type': 'text', 'text': ...} (its type is",
    ),
    "a ShareGPT role": (
        '{"conversations": [{"from": "bing", "value": "x"}]}',
        ": conversations.0.from: must be system, user or assistant (it is 'bing')",
    ),
    "facts as a text": (pair(facts="none"), ": facts: Invalid JSON"),
    "facts without phrases": (
        pair(facts=[{"what": "x", "any": []}]),
        ": facts: an empty statement or phrase",
    ),
    "falsehoods as a number": (pair(falsehoods=3), ": falsehoods: Input should be a valid tuple"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_gets_one_paragraph_with_file_and_line(tmp_path: Path, name: str) -> None:
    line, message = LINES[name]
    (tmp_path / "i.jsonl").write_text("\n".join([*GOOD[:4], line, *GOOD[4:]]), encoding="utf-8")
    (problem,) = problems_of(tmp_path, "i.jsonl")
    assert problem.startswith(f"{tmp_path / 'i.jsonl'}: line 5{message}"), problem
    assert "\n" not in problem
    assert len(problem) < 400 + len(str(tmp_path))


WHOLE: dict[str, tuple[str, bytes, str]] = {
    "one JSON list": ("i.jsonl", b"[\n" + GOOD[0].encode() + b"\n]", ": line 1: is one JSON list"),
    "UTF-16": ("i.jsonl", "\n".join(GOOD).encode("utf-16"), ": is not UTF-8 text but UTF-16"),
    "Latin 1": ("i.jsonl", b'{}\n{"question": "\xe9"}', ": is not UTF-8 text (invalid"),
    "no Parquet": ("i.parquet", "\n".join(GOOD).encode(), ": is no Parquet that can be read"),
    "an empty Parquet": ("i.parquet", b"", ": is no Parquet that can be read"),
    "half a Parquet": ("i.parquet", b"PAR1" + bytes(100), ": is no Parquet that can be read"),
    "JSON": ("i.json", b"[]", ": .json is not read; write one object a line"),
    "CSV": ("i.csv", b"id,question\n", ": .csv is not read; save the table with tabs"),
    "packed": ("i.jsonl.gz", b"\x1f\x8b", ": .gz is not read; unpack it"),
    "JSON lines as a table": ("i.tsv", "\n".join(GOOD).encode(), ": line 1: is no tab-separated"),
    "a table as JSON lines": ("i.jsonl", b"id\tquestion\na\tWhy?", ": line 1, column 1: is no"),
    "no texts": ("i.jsonl", b"\n\n", ": too few different texts, none for: "),
    "one text": ("i.jsonl", GOOD[0].encode(), ": too few different texts, none for: "),
}


@pytest.mark.parametrize("title", WHOLE)
def test_a_bad_file_is_named(tmp_path: Path, title: str) -> None:
    name, content, message = WHOLE[title]
    (tmp_path / name).write_bytes(content)
    problem = problems_of(tmp_path, name)[0]
    assert problem.startswith(f"{tmp_path / name}{message}"), problem
    assert "\n" not in problem


def parquet_problem(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    whole = [*map(json.loads, GOOD[:2]), *rows]
    if changes:
        whole = [{**row, **changes} for row in whole]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), folder / "i.parquet")
    problem, *_ = problems_of(folder, "i.parquet")
    return problem.removeprefix(f"{folder / 'i.parquet'}: ")


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path: Path) -> None:
    assert parquet_problem(tmp_path, [{"id": "x"}]).startswith("row 3: has no question")
    empty = {"id": "x", "question": " ", "answer": "x"}
    assert parquet_problem(tmp_path, [empty]) == "row 3: question: is empty."


def test_a_column_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    assert parquet_problem(tmp_path, [], question=5).startswith("row 1: question: must be a text")
    assert parquet_problem(tmp_path, [], answer=b"x").startswith("row 1: answer: must be a text")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    table = pyarrow.table({"question": pyarrow.array([b"ok", b"\xff\xfe"])})
    wrong = table["question"].combine_chunks().view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"question": wrong}), tmp_path / "i.parquet")
    (problem,) = problems_of(tmp_path, "i.parquet")
    assert problem.startswith(f"{tmp_path / 'i.parquet'}: is no Parquet that can be read: ")


def test_at_most_24_problems_of_a_file_are_listed(tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_text("x\n" * 1000, encoding="utf-8")
    problems = problems_of(tmp_path, "i.jsonl")
    assert len(problems) == 25
    assert problems[-1] == "there are more problems like these."


@pytest.mark.parametrize("name", ["i.jsonl", "i.parquet", "i.tsv"])
def test_a_file_that_is_gone_is_named(tmp_path: Path, name: str) -> None:
    (problem,) = problems_of(tmp_path, name)
    assert problem.startswith(f"{tmp_path / name}: cannot be read: No such file")


@pytest.mark.parametrize(("name", "unit"), [("t.jsonl", "line"), ("t.parquet", "row")])
def test_a_misspelt_column_is_named_with_its_first_row(
    tmp_path: Path, name: str, unit: str
) -> None:
    rows = [{**json.loads(line), "topic": f"t{k}"} for k, line in enumerate(GOOD)]
    rows[2]["topci"], rows[6]["topci"] = rows[2].pop("topic"), rows[6].pop("topic")
    rows[5]["anwser"] = rows[5].pop("answer")
    rows[7] |= {"reviewer": "me", "prompt_id": "5"}  # beside a question, no prompt is read
    path = tmp_path / name
    if unit == "row":
        columns = dict.fromkeys(key for row in rows for key in row)
        table = [columns | row for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: list[str] = []
    read_conversations(SamplesRef(index=name, own_answers=8), tmp_path, found.append)
    assert found == [
        f"warning: {path}: {unit} 3: topci is not read; did you mean topic? So it is in 2 rows.",
        f"warning: {path}: {unit} 6: has no answer (it has anwser; did you mean answer?); the "
        "teacher will write it.",
    ]


def test_notes_do_not_come_before_what_is_wrong(tmp_path: Path) -> None:
    lines = [
        line.replace(', "language": "en"', "").replace('"language": "en", ', "") for line in GOOD
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    found: list[str] = []
    read_conversations(SamplesRef(index="t.jsonl"), tmp_path, found.append)
    assert len(found) == 1  # of languages
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, "no JSON"]))
    with pytest.raises(RecipeError, match="line 11"):
        read_conversations(SamplesRef(index="t.jsonl"), tmp_path, found.append)
    assert len(found) == 1
