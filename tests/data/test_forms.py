"""The forms of texts: what each says, and that the same texts are the same tokens in all."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rotdistill_core.data.conversations import Claim, Conversation, Turn
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import tokenize_texts
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.recipe.document import SamplesRef
from rotdistill_core.testing.pico import pico_tokenizer

Write = Callable[[Path, list[dict[str, Any]]], None]
ROWS = [
    {
        "id": f"c{k}",
        "language": "en",
        "topic": f"topic {k}",
        "question": f"w{k} w{k + 1}?",
        "answer": f"w{k + 2} „w{k}“ \N{GRINNING FACE}",
    }
    for k in range(12)
]
FACTS = [{"what": "It is one", "any": ["w1", "w2"]}]
HELDOUT = [
    {"id": "h0", "language": "en", "topic": "other", "question": "w9 w9", "facts": FACTS},
    {"id": "h1", "language": "de", "question": "w28 w9"},
]


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    lines = ["\t".join(line) for line in [columns, *cells]]
    path.write_text("\n".join(lines), encoding="utf-8")


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    keys = dict.fromkeys(key for row in rows for key in row)
    whole = [{key: row.get(key) for key in keys} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), path)


def as_pairs(row: dict[str, Any]) -> dict[str, Any]:
    return row


def as_prompts(row: dict[str, Any]) -> dict[str, Any]:
    names = {"question": "prompt", "answer": "completion"}
    return {names.get(key, key): value for key, value in row.items()}


def as_instructions(row: dict[str, Any]) -> dict[str, Any]:
    names = {"question": "instruction", "answer": "output"}
    return {names.get(key, key): value for key, value in row.items()} | {"input": ""}


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": row["question"]}]
    if "answer" in row:
        messages.append({"role": "assistant", "content": row["answer"]})
    rest = {key: value for key, value in row.items() if key not in ("question", "answer")}
    return {**rest, "messages": messages}


def as_parts(row: dict[str, Any]) -> dict[str, Any]:
    changed = as_messages(row)
    for message in changed["messages"]:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return changed


def as_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    changed = as_messages(row)
    names = {"user": "human", "assistant": "gpt"}
    changed["conversations"] = [
        {"from": names[message["role"]], "value": message["content"]}
        for message in changed.pop("messages")
    ]
    return changed


def as_conversational_prompts(row: dict[str, Any]) -> dict[str, Any]:
    changed = as_messages(row)
    messages = changed.pop("messages")
    return {**changed, "prompt": messages[:1], "completion": messages[1:] or None}


def read(
    folder: Path, index: str, heldout: str | None = None, **changes: Any
) -> tuple[Conversation, ...]:
    ref = SamplesRef(index=index, heldout=heldout, **changes)
    return read_conversations(ref, folder)[0]


def tokens_of(conversations: tuple[Conversation, ...]) -> str:
    answers = {each.id: [3, 4] for each in conversations if each.answer is None}
    return tokenize_texts(pico_tokenizer(64), conversations, answers, "w5", 512).digest()


FORMS = [
    (".tsv", write_tsv, as_pairs),
    (".tsv", write_tsv, as_prompts),
    (".jsonl", write_jsonl, as_pairs),
    (".jsonl", write_jsonl, as_prompts),
    (".jsonl", write_jsonl, as_instructions),
    (".jsonl", write_jsonl, as_messages),
    (".jsonl", write_jsonl, as_parts),
    (".jsonl", write_jsonl, as_sharegpt),
    (".jsonl", write_jsonl, as_conversational_prompts),
    (".parquet", write_parquet, as_pairs),
    (".parquet", write_parquet, as_prompts),
    (".parquet", write_parquet, as_messages),
    (".parquet", write_parquet, as_sharegpt),
]


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Conversation, ...]:
    write_tsv(tmp_path / "plain.tsv", ROWS)
    write_tsv(tmp_path / "plain-heldout.tsv", HELDOUT)
    return read(tmp_path, "plain.tsv", "plain-heldout.tsv")


@pytest.mark.parametrize(("ending", "write", "form"), FORMS)
def test_the_same_texts_are_the_same_in_every_form(
    tmp_path: Path,
    plain: tuple[Conversation, ...],
    ending: str,
    write: Write,
    form: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    write(tmp_path / f"i{ending}", [form(row) for row in ROWS])
    write(tmp_path / f"h{ending}", [form(row) for row in HELDOUT])
    found = read(tmp_path, f"i{ending}", f"h{ending}")
    assert found == plain
    assert tokens_of(found) == tokens_of(plain)


@pytest.mark.parametrize(
    "save",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"\n", b"\r"),
        lambda data: data.replace(b"\n", b"\n\n \n"),
        lambda data: data.rstrip(b"\n"),
        lambda data: json_escaped(data),
        lambda data: data.replace(b'"id"', b'"source": {"x": [1]}, "score": 1e999, "id"'),
    ],
    ids=["byte-order mark", "CRLF", "CR", "blank lines", "no last end", "escapes", "other keys"],
)
def test_json_lines_are_the_same_whoever_saves_them(
    tmp_path: Path, plain: tuple[Conversation, ...], save: Callable[[bytes], bytes]
) -> None:
    write_jsonl(tmp_path / "i.jsonl", ROWS)
    data = (tmp_path / "i.jsonl").read_bytes()
    (tmp_path / "i.jsonl").write_bytes(save(data))
    assert read(tmp_path, "i.jsonl", "plain-heldout.tsv") == plain


def json_escaped(data: bytes) -> bytes:
    lines = [json.dumps(json.loads(line)) for line in data.decode().splitlines()]
    return "\n".join(lines).encode()


CHAT = {
    "system": "w1 w2",
    "messages": [
        {"role": "user", "content": "w1\r\nw2"},
        {"role": "assistant", "content": " w3 "},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5"},
    ],
}


def test_the_last_turn_of_the_assistant_is_the_answer_and_earlier_ones_its_context(
    tmp_path: Path,
) -> None:
    write_jsonl(tmp_path / "i.jsonl", [CHAT, *ROWS])
    write_jsonl(tmp_path / "h.jsonl", HELDOUT)
    found = read(tmp_path, "i.jsonl", "h.jsonl")
    (chat,) = [each for each in found if each.earlier]
    assert chat.earlier == (Turn("user", "w1\nw2"), Turn("assistant", "w3"))
    assert (chat.question, chat.system, chat.system_under("w9")) == ("w4", "w1 w2", "w1 w2")
    written = {each.id: [3] for each in found if each.answer is None}
    layout = tokenize_texts(pico_tokenizer(64), found, written, "w9", 512).layout
    tokens = next(text for text in layout.texts if text.id == chat.id)
    words = pico_tokenizer(64).decode(tokens.tokens)
    assert words == (
        "<system> w1 w2 <end> <user> w1 w2 <end> <assistant> w3 <end> <user> w4 <end> "
        "<assistant> w5 <end>"
    )
    assert len(tokens.tokens) - tokens.answer == 2


@pytest.mark.parametrize(
    ("system", "prompt"), [("w1", "w1"), ("", ""), (None, "w9")], ids=["own", "none", "shared"]
)
def test_a_row_has_its_own_system_prompt_or_that_of_the_recipe(
    tmp_path: Path, system: str | None, prompt: str
) -> None:
    other = {**HELDOUT[1], "answer": "w5", "system": "w7"}
    write_jsonl(tmp_path / "i.jsonl", [*({**row, "system": system} for row in ROWS), other])
    assert {each.system_under("w9") for each in read(tmp_path, "i.jsonl")} == {prompt, "w7"}


THOUGHT = [
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "<think>\nw2\n</think>\n\nw3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "<think>w5</think>w6"},
]
BEGUN = [THOUGHT[0], {"role": "assistant", "content": "w2\nw3\n</think>\n\nw4"}]
"""What a model wrote whose prompt begins the block."""


def test_thoughts_of_the_assistant_are_left_out_or_kept(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**row, "topic": None} for row in ROWS]
    for name, messages in (("t", THOUGHT), ("b", BEGUN)):
        rows.append({"id": name, "language": "en", "messages": messages})
    write_jsonl(tmp_path / "i.jsonl", rows)
    write_jsonl(tmp_path / "h.jsonl", HELDOUT)
    plain = {each.id: each for each in read(tmp_path, "i.jsonl", "h.jsonl")}
    assert [turn.content for turn in plain["t"].earlier] == ["w1", "w3"]
    assert (plain["t"].answer, plain["b"].answer) == ("w6", "w4")
    found = read(tmp_path, "i.jsonl", "h.jsonl", thinking=True)
    (whole,) = [each for each in found if each.id == "t"]
    assert whole.answer == "<think>w5</think>w6"
    assert whole.earlier[1].content == "<think>\nw2\n</think>\n\nw3"


def test_without_style_there_is_no_system_prompt(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "i.jsonl", ROWS)
    assert read_conversations(SamplesRef(index="i.jsonl"), tmp_path)[1] == ""


def test_a_text_without_an_id_has_the_hash_of_its_text(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "id"} for row in ROWS]
    write_jsonl(tmp_path / "i.jsonl", [*rows, rows[0]])
    found = read(tmp_path, "i.jsonl")
    again = read(tmp_path, "i.jsonl")
    assert [each.id for each in found] == [each.id for each in again]
    assert len({each.id for each in found}) == len(rows) + 1
    (copy,) = [each for each in found if each.id.endswith("-2")]
    (first,) = [each for each in found if each.id == copy.id.removesuffix("-2")]
    assert copy.split == first.split
    write_jsonl(tmp_path / "i.jsonl", rows[::-1])
    assert {each.id for each in read(tmp_path, "i.jsonl")} == {each.id for each in found} - {
        copy.id
    }


def test_a_language_is_told_and_said(tmp_path: Path) -> None:
    texts = [
        ("My package has not arrived yet. What can I do?", "I am sorry. Please send the number."),
        ("How do I reset my password?", "Choose the link below the form, and follow the message."),
        ("refund pls", "Of course."),
        ("Wie kann ich meine Adresse ändern?", "Öffnen Sie bitte Ihr Konto und die Adressen."),
    ]
    rows = [{"id": f"c{k}", "question": q, "answer": a} for k, (q, a) in enumerate(texts)]
    write_jsonl(tmp_path / "i.jsonl", [*rows, {**ROWS[0], "id": "own", "language": "pt-BR"}])
    said: list[str] = []
    ref = SamplesRef(index="i.jsonl", validation=0.4)
    found = read_conversations(ref, tmp_path, said.append)[0]
    languages = {each.id: each.language for each in found}
    assert languages == {"c0": "en", "c1": "en", "c2": "en", "c3": "de", "own": "pt-BR"}
    (line,) = said
    assert "the language of 4 of 5 texts is told by their words: en 3, de 1" in line


def test_texts_of_one_topic_are_in_one_split(tmp_path: Path) -> None:
    rows = [{**row, "topic": f"Topic {k // 3}"} for k, row in enumerate(ROWS)]
    rows[1]["topic"] = "TOPIC  0"
    write_jsonl(tmp_path / "i.jsonl", rows)
    found = read(tmp_path, "i.jsonl", validation=0.25, heldout_share=0.25)
    splits: dict[str, set[Split]] = {}
    for each in found:
        splits.setdefault(each.topic.casefold().split()[-1], set()).add(each.split)
    assert Counter(split for (split,) in splits.values()) == {
        "fit": 2,
        "validation": 1,
        "heldout": 1,
    }


def test_places_do_not_tie_texts(tmp_path: Path) -> None:
    rows = [{**row, "place": "one place"} for row in ROWS]
    for row in rows:
        del row["topic"]
    write_tsv(tmp_path / "i.tsv", rows)
    write_tsv(tmp_path / "h.tsv", HELDOUT[1:])
    splits = Counter(each.split for each in read(tmp_path, "i.tsv", "h.tsv"))
    assert splits == {"fit": 10, "validation": 2, "heldout": 1}


def test_one_topic_cannot_be_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "i.jsonl", [{**row, "topic": "all"} for row in ROWS])
    with pytest.raises(
        RecipeError, match=r"i\.jsonl: too few different texts, none for: fit, validation"
    ):
        read(tmp_path, "i.jsonl")


def test_a_share_of_the_index_is_held_out_and_its_questions_are_asked_nowhere_else(
    tmp_path: Path,
) -> None:
    rows = [{**row, "topic": None} for row in ROWS]
    rows += [{**row, "id": f"{row['id']}-b", "answer": "w7"} for row in rows]
    write_jsonl(tmp_path / "i.jsonl", rows)
    found = read(tmp_path, "i.jsonl", heldout_share=0.3, own_answers=8)
    held = {each.question for each in found if each.split == Split.HELDOUT}
    assert len(held) == 3
    assert all(each.answer is None for each in found if each.split == Split.HELDOUT)
    assert not held & {each.question for each in found if each.split != Split.HELDOUT}


def test_a_question_without_an_answer_is_the_teachers_to_answer(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in ROWS]
    write_jsonl(tmp_path / "i.jsonl", rows)
    found = read(tmp_path, "i.jsonl", own_answers=8)
    assert {each.answer for each in found} == {None}
    assert {each.id.endswith(".own") for each in found if each.split != Split.HELDOUT} == {True}
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, "i.jsonl")
    assert "i.jsonl: line 1: has no answer; write one, or let the teacher" in str(caught.value)
    assert len(caught.value.problems) == 12


def test_held_out_rows_have_facts_or_none(plain: tuple[Conversation, ...]) -> None:
    held = {each.id: each.facts for each in plain if each.split == Split.HELDOUT}
    assert held == {"h0": (Claim("It is one", ("w1", "w2")),), "h1": ()}


def test_the_guard_takes_texts_and_conversations(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "i.jsonl", ROWS)
    guard = [
        {"id": "g0", "text": "  w1\\n\nw2 "},
        {"id": "g1", "question": "w3 w4", "answer": "w5"},
        {"id": "g2", "text": None, "question": "w6", "answer": "w7", "system": "w8"},
    ]
    write_jsonl(tmp_path / "g.jsonl", guard)
    ref = SamplesRef(index="i.jsonl", guard="g.jsonl")
    found = read_conversations(ref, tmp_path)[0]
    texts = {each.id: each for each in found if each.split.outside_domain}
    assert (texts["g0"].is_plain, texts["g0"].answer) == (True, "  w1\\n\nw2 ")
    answers = {each.id: [3] for each in found if each.answer is None}
    layout = tokenize_texts(pico_tokenizer(64), found, answers, "w9 w10 w11", 512).layout
    words = {text.id: pico_tokenizer(64).decode(text.tokens) for text in layout.texts if text.plain}
    assert words["g1"] == "<user> w3 w4 <end> <assistant> w5 <end>"
    assert words["g2"] == "<system> w8 <end> <user> w6 <end> <assistant> w7 <end>"
    own = {text.id: len(text.tokens) - text.answer for text in layout.texts if text.plain}
    assert (own["g1"], own["g2"]) == (2, 2)


def test_letters_are_kept_as_they_are_and_compared_in_any_form(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Où est-ce?")
    write_jsonl(tmp_path / "i.jsonl", [{**ROWS[0], "question": decomposed}, *ROWS[1:]])
    write_jsonl(tmp_path / "h.jsonl", [{**HELDOUT[0], "question": "où est-ce?"}])
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, "i.jsonl", "h.jsonl")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path / 'h.jsonl'}: line 1: question: ")
    assert decomposed in {each.question for each in read(tmp_path, "i.jsonl")}


# Datasets of the hub, without a network.


class Dataset(list[dict[str, Any]]):
    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def select_columns(self, names: list[str]) -> Dataset:
        return Dataset({name: row[name] for name in names} for row in self)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for the library `datasets`; return what it is asked for."""
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        if name == "me/gone":
            raise FileNotFoundError("no such dataset")
        return Dataset({**row, "score": 1} for row in [*ROWS, {**ROWS[0], "question": 5}])

    library = ModuleType("datasets")
    vars(library).update(load_dataset=load_dataset, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return asked


def test_a_dataset_of_the_hub_is_read_and_its_bad_rows_are_left_out(
    tmp_path: Path, plain: tuple[Conversation, ...], hub: list[Any]
) -> None:
    said: list[str] = []
    ref = SamplesRef(index="hub:me/texts/en:train[:13]@abc", heldout="plain-heldout.tsv")
    assert read_conversations(ref, tmp_path, said.append)[0] == plain
    assert hub == [("me/texts", "en", "train[:13]", "abc")]
    (line,) = said
    assert "1 rows are left out, the first: hub:me/texts/en:train[:13]@abc: row 13" in line


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("hub:texts", RecipeError, "write hub:owner/name"),
        ("hub:me/gone", SetupError, "hub:me/gone: cannot be loaded: FileNotFoundError"),
    ],
)
def test_a_dataset_that_cannot_be_loaded_is_named(
    tmp_path: Path, hub: list[Any], reference: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path, reference)


@pytest.mark.parametrize(
    ("reference", "module", "extra"),
    [("hub:me/texts", "datasets", "hub"), ("i.parquet", "pyarrow.parquet", "parquet")],
)
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, module: str, extra: str
) -> None:
    write_parquet(tmp_path / "i.parquet", ROWS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SetupError, match=rf"pip install 'rotdistill\[{extra}\]'"):
        read(tmp_path, reference)


PROMPT = "Be brief."


def shared(**changes: Any) -> list[dict[str, Any]]:
    return [{**row, "id": f"s{k}", "system": PROMPT, **changes} for k, row in enumerate(ROWS)]


def test_a_prompt_that_all_rows_have_is_that_of_the_run(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "i.jsonl", shared())
    said: list[str] = []
    found, style = read_conversations(SamplesRef(index="i.jsonl"), tmp_path, said.append)
    assert style == PROMPT
    assert {each.system for each in found} == {None}
    assert f"all {len(ROWS)} conversations have one system prompt" in "\n".join(said)
    # The texts stay as they were: they have it as their own where one row has another.
    other = shared()
    other[0]["system"] = "Be long."
    write_jsonl(tmp_path / "i.jsonl", other)
    mixed, style = read_conversations(SamplesRef(index="i.jsonl"), tmp_path)
    assert style == ""
    assert {each.id: each.split for each in mixed} == {each.id: each.split for each in found}
    assert {each.system for each in mixed} == {PROMPT, "Be long."}


def test_a_named_prompt_that_no_row_reads_is_noted(tmp_path: Path) -> None:
    (tmp_path / "s.md").write_text("Be long.")
    write_jsonl(tmp_path / "i.jsonl", shared())
    said: list[str] = []
    ref = SamplesRef(index="i.jsonl", style="s.md")
    found, style = read_conversations(ref, tmp_path, said.append)
    assert (style, {each.system for each in found}) == ("Be long.", {PROMPT})
    assert "no conversation reads this system prompt" in "\n".join(said)
    for rows in (ROWS, shared(system="Be long.")):
        said.clear()
        write_jsonl(tmp_path / "i.jsonl", rows)
        read_conversations(ref, tmp_path, said.append)
        assert "no conversation reads" not in "\n".join(said)


def test_rows_without_a_question_are_one_problem(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "i.jsonl", [{"user": "Why?", "bot": "So."}] * 24)
    with pytest.raises(RecipeError) as caught:
        read_conversations(SamplesRef(index="i.jsonl"), tmp_path)
    (problem,) = caught.value.problems
    assert "line 1: has no question (it has bot, user)" in problem
    assert problem.endswith("So it is in 24 rows.")


def test_the_index_is_not_held_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "i.jsonl", ROWS)
    with pytest.raises(RecipeError) as caught:
        read_conversations(SamplesRef(index="i.jsonl", heldout="./i.jsonl"), tmp_path)
    (problem,) = caught.value.problems
    assert "heldout is the index file" in problem
