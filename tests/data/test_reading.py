"""The shipped tables, and how tables are read, checked and split."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rotdistill_core.data.conversations import Claim, Conversation, facts_digest
from rotdistill_core.data.drafts import Draft
from rotdistill_core.data.partition import assign_splits, shuffled
from rotdistill_core.data.reading import (
    read_conversations,
)
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import tokenize_texts
from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.document import SamplesRef
from rotdistill_core.store.hashing import digest
from rotdistill_core.testing.pico import pico_tokenizer

SAMPLES = Path(__file__).parents[2] / "samples"
INDEX_COLUMNS = ("id", "language", "place", "country", "question", "blurb")
GUARD_COLUMNS = ("id", "language", "kind", "text")
HELDOUT_COLUMNS = ("id", "language", "place", "country", "question", "facts", "falsehoods")
SCRIPTS = (
    "LATIN",
    "CYRILLIC",
    "GREEK",
    "ARABIC",
    "DEVANAGARI",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
)
REF = SamplesRef(index="index.tsv", heldout="heldout.tsv", style="style.md", validation=0.25)


def read_tsv(path: Path) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    with path.open(encoding="utf-8", newline="") as stream:
        head, *rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    return tuple(head), [dict(zip(head, row, strict=True)) for row in rows]


BLURBS = read_tsv(SAMPLES / "index.tsv")
HELDOUT = read_tsv(SAMPLES / "heldout.tsv")


def script_of(text: str) -> str:
    names = [unicodedata.name(c, "").split(" ")[0].split("-")[0] for c in text if c.isalpha()]
    return Counter(name for name in names if name in SCRIPTS).most_common(1)[0][0]


def test_the_shipped_blurbs_are_many_and_in_many_languages() -> None:
    head, rows = BLURBS
    assert head == INDEX_COLUMNS
    assert len(rows) == len({row["id"] for row in rows}) == 200
    assert all(cell == cell.strip() != "" for row in rows for cell in row.values())
    languages = Counter(row["language"] for row in rows)
    assert len(languages) >= 10
    assert languages["en"] >= 80
    assert len({row["place"] for row in rows}) >= 100
    assert len({script_of(row["blurb"]) for row in rows}) >= 5


@pytest.mark.parametrize("row", BLURBS[1], ids=lambda row: row["id"])
def test_a_shipped_blurb_has_the_length_of_a_blurb(row: dict[str, str]) -> None:
    if row["language"] in ("zh", "ja"):
        assert 80 <= len(row["blurb"]) <= 200
    else:
        assert 40 <= len(row["blurb"].split()) <= 90


def test_the_shipped_held_out_questions_are_twenty_in_six_languages() -> None:
    head, rows = HELDOUT
    assert head == HELDOUT_COLUMNS
    assert len(rows) == len({row["id"] for row in rows}) == 20
    assert len({row["language"] for row in rows}) >= 6
    assert not {row["id"] for row in rows} & {row["id"] for row in BLURBS[1]}


@pytest.mark.parametrize("row", HELDOUT[1], ids=lambda row: row["id"])
def test_shipped_facts_and_falsehoods_have_phrases(row: dict[str, str]) -> None:
    facts, falsehoods = json.loads(row["facts"]), json.loads(row["falsehoods"])
    assert 3 <= len(facts) <= 6
    assert 2 <= len(falsehoods) <= 4
    for claim in (*facts, *falsehoods):
        assert claim.keys() == {"what", "any"}
        assert claim["what"].strip()
        assert claim["any"]
        assert all(isinstance(phrase, str) and phrase.strip() for phrase in claim["any"])


@pytest.mark.parametrize("row", HELDOUT[1], ids=lambda row: row["id"])
def test_no_shipped_held_out_place_is_in_the_blurbs(row: dict[str, str]) -> None:
    place = row["place"].casefold()
    for blurb in BLURBS[1]:
        assert blurb["place"].casefold() != place
        assert place not in f"{blurb['question']} {blurb['blurb']}".casefold()


def test_the_shipped_texts_are_read() -> None:
    questions, style = read_conversations(SamplesRef(), SAMPLES.parent / "recipes")
    assert Counter(q.split for q in questions) == {"fit": 160, "validation": 40, "heldout": 20}
    assert all((q.answer is None) == (q.split == Split.HELDOUT) for q in questions)
    assert style.startswith("You are a")


def test_the_shipped_texts_keep_their_ids_splits_and_tokens() -> None:
    ref = SamplesRef(guard="../samples/general/index.tsv", own_answers=8)
    conversations, style = read_conversations(ref, SAMPLES.parent / "recipes")
    topics = {c.id: "" if c.split == Split.HELDOUT else c.topic for c in conversations}
    rows = [[c.id, c.language, c.split, c.question, c.answer, topics[c.id]] for c in conversations]
    assert digest(rows) == "7735859745a3fdf08f180ca4771d064764e2264667929bd9f04e5a885f46c230"
    answers = {c.id: [3, 4] for c in conversations if c.answer is None}
    samples = tokenize_texts(pico_tokenizer(64), conversations, answers, style, 512)
    tokens = "60e33334cfabc25010ae5a9360ffbb13af5b50379d143138999ef382df914fff"
    assert samples.layout.digest() == tokens


def test_the_shipped_guard_is_about_other_subjects() -> None:
    ref = SamplesRef(guard="../samples/general/index.tsv")
    questions, _ = read_conversations(ref, SAMPLES.parent / "recipes")
    guard = [q for q in questions if q.split.outside_domain]
    assert Counter(q.split for q in guard) == {"guard": 20, "guard-validation": 20}
    assert len({q.language for q in guard}) >= 12
    places = {row["place"].casefold() for row in (*BLURBS[1], *HELDOUT[1])}
    for q in guard:
        assert not [place for place in places if place in str(q.answer).casefold()]


def blurb(name: str) -> list[str]:
    return [name, "en", f"Place {name}", "Nowhere", f"What is {name}?", f"It is {name}."]


def blurbs(count: int) -> list[list[str]]:
    return [blurb(f"b{k}") for k in range(count)]


def write_table(path: Path, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    lines = ["\t".join(cells) + "\n" for cells in (columns, *rows)]
    path.write_text("".join(lines), encoding="utf-8", newline="")


def write_tables(
    folder: Path, index: list[list[str]], heldout: list[list[str]] | None = None
) -> Path:
    question = ["h1", "en", "Elsewhere", "Nowhere", "Where?", "[]", "[]"]
    write_table(folder / "index.tsv", INDEX_COLUMNS, index)
    write_table(folder / "heldout.tsv", HELDOUT_COLUMNS, [question] if heldout is None else heldout)
    (folder / "style.md").write_text(" Be brief.\n", encoding="utf-8")
    return folder


def splits_of(folder: Path, ref: SamplesRef = REF) -> dict[str, Split]:
    return {q.id: q.split for q in read_conversations(ref, folder)[0]}


def problems_of(folder: Path, ref: SamplesRef = REF) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read_conversations(ref, folder)
    return caught.value.problems


def draft(name: str, question: str = "?", topic: str = "", answer: str = "Yes.") -> Draft:
    return Draft("", name, "en", question, answer, topic, has_group=bool(topic))


def test_shuffling_follows_ids_alone() -> None:
    rows = [draft(f"b{k}") for k in range(12)]
    order = [row.id for row in shuffled(rows)]
    assert sorted(order) != order
    assert [row.id for row in shuffled(rows[::-1])] == order
    assert [row.id for row in shuffled(replace(row, question="!") for row in rows)] == order


def test_the_first_share_of_texts_is_for_validation() -> None:
    rows = [draft(f"b{k}", f"{k}?") for k in range(10)]
    validation = {f"b{k}": Split.VALIDATION for k in range(3)}
    fit = {f"b{k}": Split.FIT for k in range(3, 10)}
    assert assign_splits(rows, 0.3) == validation | fit


def test_however_small_the_share_one_text_is_for_validation() -> None:
    assert assign_splits([draft("a", "1?"), draft("b", "2?")], 0.2) == {
        "a": Split.VALIDATION,
        "b": Split.FIT,
    }


def test_copies_of_a_text_get_the_split_of_their_first() -> None:
    rows = [draft(f"b{k}", question) for k, question in enumerate("abcabd")]
    splits = assign_splits(rows, 0.25)
    assert splits.keys() == {row.id for row in rows}
    assert {name for name, split in splits.items() if split == Split.VALIDATION} == {"b0", "b3"}


@pytest.mark.parametrize("heldout", [None, 0.25])
def test_another_system_prompt_makes_no_other_text(heldout: float | None) -> None:
    """A question that is held out is not fitted under another prompt, nor a text for validation."""
    rows = [
        replace(draft(f"b{k}", f"{k % 8}?", answer=f"{k % 8}"), system=f"Prompt {k // 8}.")
        for k in range(24)
    ]
    splits = assign_splits(rows, 0.25, heldout)
    for k in range(8):
        assert len({splits[f"b{n}"] for n in (k, k + 8, k + 16)}) == 1
    assert len({*splits.values()}) == (3 if heldout else 2)


def test_a_system_prompt_may_be_what_is_asked_about() -> None:
    """The same question about another document has another answer, and is another text."""
    rows = [
        replace(draft(f"b{k}", "Summarise it.", answer=f"{k}"), system=f"Document {k}.")
        for k in range(20)
    ]
    counts = Counter(assign_splits(rows, 0.2, 0.2).values())
    assert counts == {Split.HELDOUT: 4, Split.VALIDATION: 4, Split.FIT: 12}


@pytest.mark.parametrize("form", ["jsonl", "tsv"])
def test_texts_without_a_topic_have_none_in_common(tmp_path: Path, form: str) -> None:
    rows = [{"question": f"w{k} w1?", "answer": f"w{k}", "topic": ""} for k in range(20)]
    path = tmp_path / f"index.{form}"
    if form == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    else:
        write_table(path, ("question", "answer", "topic"), [[*row.values()] for row in rows])
    found = splits_of(tmp_path, SamplesRef(index=path.name, heldout_share=0.2))
    assert Counter(found.values()) == {"fit": 12, "validation": 4, "heldout": 4}


def test_the_split_follows_ids_and_not_the_order_of_the_file(tmp_path: Path) -> None:
    rows = blurbs(12)
    first = splits_of(write_tables(tmp_path, rows))
    assert Counter(first.values()) == {"fit": 9, "validation": 3, "heldout": 1}
    assert splits_of(write_tables(tmp_path, rows[::-1])) == first
    changed = [[*row[:5], "Another text."] for row in rows]
    assert splits_of(write_tables(tmp_path, changed)) == first


def test_a_limit_leaves_files_of_held_out_and_guard_texts_whole() -> None:
    whole = SamplesRef(guard="../samples/general/index.tsv")
    limited = whole.model_copy(update={"limit": 20})
    found, all_texts = (
        Counter(each.split for each in read_conversations(ref, SAMPLES.parent / "recipes")[0])
        for ref in (limited, whole)
    )
    assert found[Split.FIT] + found[Split.VALIDATION] == 20
    for split in (Split.HELDOUT, Split.GUARD, Split.GUARD_VALIDATION):
        assert found[split] == all_texts[split] > 0


def test_a_limit_takes_the_same_blurbs_in_any_order(tmp_path: Path) -> None:
    rows = blurbs(12)
    limited = REF.model_copy(update={"limit": 4})
    first = splits_of(write_tables(tmp_path, rows), limited)
    assert len(first) == 5
    assert splits_of(write_tables(tmp_path, rows[::-1]), limited) == first


def test_copies_of_a_text_are_in_one_split_and_a_question_is_asked_once(tmp_path: Path) -> None:
    rows = [
        [f"{name}-{k}", *blurb(name)[1:]] for k in range(20) for name in ("b1", "b2", "b3", "b4")
    ]
    rows += [["other", *blurb("b1")[1:5], "Another answer."]]
    ref = REF.model_copy(update={"own_answers": 8, "validation": 0.5})
    questions, _ = read_conversations(ref, write_tables(tmp_path, rows))
    texts = {
        split: {(q.question, q.answer) for q in questions if q.split == split and q.answer}
        for split in (Split.FIT, Split.VALIDATION)
    }
    assert not texts[Split.FIT] & texts[Split.VALIDATION]
    assert texts[Split.FIT]
    assert texts[Split.VALIDATION]
    own = [q for q in questions if q.id.endswith(".own")]
    assert all(q.answer is None for q in own)
    assert sorted(q.question for q in own) == [f"What is b{k}?" for k in (1, 2, 3, 4)]
    fitted = {q.question for q in questions if q.split == Split.FIT}
    assert all(q.split == Split.FIT for q in own if q.question in fitted)


@pytest.mark.parametrize(("own_answers", "own"), [(0, []), (8, [f"b{k}.own" for k in range(4)])])
def test_the_teacher_answers_held_out_questions_and_own_copies_of_blurbs(
    tmp_path: Path, own_answers: int, own: list[str]
) -> None:
    folder = write_tables(tmp_path, blurbs(4))
    write_table(folder / "guard.tsv", GUARD_COLUMNS, [["g0", "en", "code", "x"]])
    ref = REF.model_copy(update={"guard": "guard.tsv", "own_answers": own_answers})
    questions, _ = read_conversations(ref, folder)
    assert [q.id for q in questions if q.answer is None] == [*own, "h1"]


def test_the_guard_is_read_as_it_is_and_halved(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, blurbs(6))
    rows = [[f"g{k}", "en", "code", f"a\\nb{k}"] for k in range(4)]
    write_table(folder / "guard.tsv", GUARD_COLUMNS, rows)
    questions, _ = read_conversations(REF.model_copy(update={"guard": "guard.tsv"}), folder)
    guard = [q for q in questions if q.split.outside_domain]
    assert Counter(q.split for q in guard) == {"guard": 2, "guard-validation": 2}
    assert {q.answer for q in guard} == {f"a\nb{k}" for k in range(4)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["b9", "en", "w", "x", "", "z"], "line 4: has no question"),
        (["b9", "en", "w", "x", " ", "z"], "line 4: has no question"),
        (["b9", "en", "w", "x", "y", ""], "line 4: has no answer; write one, or let the teacher"),
        (["b9", "en", "w", "x", "y"], "line 4: needs 6 cells, has 5"),
        (["b9", "en", "w", "x", "y", "z", "more"], "line 4: needs 6 cells, has 7"),
        (blurb("b1"), "line 4: the id b1 is already used"),
        (["b9", "en", "w", "x", "y", "z" * 200_000], "line 4: blurb: has 200000 characters"),
    ],
    ids=["empty cell", "blank cell", "no answer", "short", "long", "duplicate", "huge cell"],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: list[str], message: str) -> None:
    index = [blurb("b0"), blurb("b1"), row, blurb("b2"), blurb("b3")]
    (problem,) = problems_of(write_tables(tmp_path, index))
    assert problem.startswith(f"{tmp_path / 'index.tsv'}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the columns must be named here"),
        ("id,language,place,country,question,blurb\n", "is no tab-separated header"),
        ("id\tprompt\tquestoin\n", "the column 'questoin' is unknown. Did you mean \"question"),
        ("id\tquestion\tid\n", "has the column id twice"),
        ("id\tlanguage\n", "has none of the columns question, prompt, instruction, text"),
        ("question\tmessages\n", "a table holds no messages; write them as JSON lines"),
    ],
)
def test_wrong_columns_are_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (write_tables(tmp_path, blurbs(1)) / "index.tsv").write_text(text)
    assert problems_of(tmp_path)[0].startswith(f"{tmp_path / 'index.tsv'}: line 1: {message}")


def test_every_missing_file_is_named(tmp_path: Path) -> None:
    problems = problems_of(tmp_path)
    names = ("index.tsv", "heldout.tsv", "style.md")
    assert all(name in problem for name, problem in zip(names, problems, strict=True))


def test_a_held_out_place_among_the_blurbs_is_refused(tmp_path: Path) -> None:
    heldout = [["h1", "en", "place B0", "x", "y?", "[]", "[]"]]
    (problem,) = problems_of(write_tables(tmp_path, blurbs(4), heldout))
    assert "heldout.tsv: line 2: place: place B0 is also in the texts to fit on" in problem


def test_an_id_in_both_tables_is_refused(tmp_path: Path) -> None:
    heldout = [["b0", "en", "Elsewhere", "x", "y?", "[]", "[]"]]
    (problem,) = problems_of(write_tables(tmp_path, blurbs(4), heldout))
    assert "heldout.tsv: line 2: the id b0 is also in the texts to fit on" in problem


def test_a_guard_with_an_id_of_a_blurb_is_refused(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, blurbs(6))
    write_table(folder / "guard.tsv", GUARD_COLUMNS, [["b0", "en", "code", "x"]])
    (problem,) = problems_of(folder, REF.model_copy(update={"guard": "guard.tsv"}))
    assert problem == f"{folder / 'guard.tsv'}: line 2: the id b0 is also in another file."


def test_a_held_out_question_that_repeats_another_is_left_out(tmp_path: Path) -> None:
    heldout = [
        ["h1", "en", "Elsewhere", "x", "Why is it so?", "[]", "[]"],
        ["h2", "en", "Elsewhere", "x", "why is it  so?", "[]", "[]"],
        ["h3", "en", "Elsewhere", "x", "When was it?", "[]", "[]"],
    ]
    folder = write_tables(tmp_path, blurbs(4), heldout)
    lines: list[str] = []
    conversations, _ = read_conversations(REF, folder, lines.append)
    assert [each.id for each in conversations if each.split == Split.HELDOUT] == ["h1", "h3"]
    assert lines == ["note: held-out questions that repeat others: 1. Each is scored once."]


def test_copies_in_the_guard_are_one_text(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, blurbs(6))
    rows = [[f"g{k}", "en", "code", "print(1)" if k else "x = 2"] for k in range(5)]
    write_table(folder / "guard.tsv", GUARD_COLUMNS, rows)
    conversations, _ = read_conversations(REF.model_copy(update={"guard": "guard.tsv"}), folder)
    guard = [each for each in conversations if each.split.outside_domain]
    assert sorted(str(each.answer) for each in guard) == ["print(1)", "x = 2"]


def test_too_few_texts_are_refused(tmp_path: Path) -> None:
    assert "too few different texts" in problems_of(write_tables(tmp_path, blurbs(1)))[0]
    (problem,) = problems_of(write_tables(tmp_path, blurbs(4), []))
    assert problem == (
        f"{tmp_path / 'heldout.tsv'}: too few different texts, none for: heldout. Copies, texts "
        "of one topic, and texts that ask the same where a share is held out, stay together; "
        "add texts that differ, about other topics."
    )


@pytest.mark.parametrize(
    "cell", ["none", "[1]", '[{"what": "x"}]', '[{"what": "x", "any": "y"}]', "{"]
)
def test_a_cell_that_holds_no_claims_is_named(tmp_path: Path, cell: str) -> None:
    heldout = [["h1", "en", "Elsewhere", "x", "y?", "[]", cell]]
    (problem,) = problems_of(write_tables(tmp_path, blurbs(4), heldout))
    assert problem.startswith(f"{tmp_path / 'heldout.tsv'}: line 2: falsehoods")
    assert "It must be a JSON list of objects with `what` and `any`" in problem


def test_claims_are_read_with_their_question(tmp_path: Path) -> None:
    heldout = [["h1", "en", "Elsewhere", "x", "y?", '[{"what": "a", "any": ["b", "c"]}]', "[]"]]
    questions, _ = read_conversations(REF, write_tables(tmp_path, blurbs(4), heldout))
    (question,) = [q for q in questions if q.split == Split.HELDOUT]
    assert question.facts == (Claim("a", ("b", "c")),)
    assert question.falsehoods == ()


def test_the_digest_of_facts_depends_on_facts_and_falsehoods_alone() -> None:
    claim = Claim("a", ("b",))
    question = Conversation("h", "en", Split.HELDOUT, "?", None, facts=(claim,))
    other = Conversation("i", "de", Split.HELDOUT, "!", None, facts=(claim,))
    wrong = Conversation("h", "en", Split.HELDOUT, "?", None, facts=(Claim("a", ("c",)),))
    assert facts_digest([question]) == facts_digest([other]) != facts_digest([wrong])
