"""Tables as spreadsheets and editors write them, and the form in which spellings are compared."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.drafts import drafts_of
from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.tables import read_table
from rotdistill_core.data.text_files import comparable, comparable_name
from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.document import SamplesRef

INDEX = ("id", "language", "place", "country", "question", "blurb")
HELDOUT = ("id", "language", "place", "country", "question", "facts", "falsehoods")
CLAIMS = '[{"what": "It is \\"old\\"", "any": ["old"]}]'
BLURBS = [
    [f"b{k}", "en", f"Place {k}", "Land", f'What is "{k}"?', f"It is {k}, and old."]
    for k in range(4)
]
QUESTIONS = [["h0", "en", "São Tomé", "Land", "Where?", CLAIMS, "[]"]]
REF = SamplesRef(index="index.tsv", heldout="heldout.tsv", style="style.md", validation=0.25)


def plain(rows: list[list[str]]) -> str:
    return "".join("\t".join(cells) + "\n" for cells in rows)


def as_spreadsheet(rows: list[list[str]], quoting: int) -> str:
    out = io.StringIO()
    dialect = {0: csv.QUOTE_MINIMAL, 1: csv.QUOTE_ALL}[quoting]
    csv.writer(out, delimiter="\t", quoting=dialect).writerows(rows)
    return out.getvalue()


def written(folder: Path, save: Callable[[list[list[str]]], bytes], style: bytes = b"Hi.") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "index.tsv").write_bytes(save([list(INDEX), *BLURBS]))
    (folder / "heldout.tsv").write_bytes(save([list(HELDOUT), *QUESTIONS]))
    (folder / "style.md").write_bytes(style)
    return folder


def problems(folder: Path) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read_conversations(REF, folder)
    return caught.value.problems


def read_plain(folder: Path) -> tuple[tuple[Conversation, ...], str]:
    return read_conversations(REF, written(folder, lambda rows: plain(rows).encode()))


@pytest.mark.parametrize(
    "save",
    [
        lambda rows: b"\xef\xbb\xbf" + plain(rows).encode(),
        lambda rows: plain(rows).replace("\n", "\r\n").encode(),
        lambda rows: plain(rows).replace("\n", "\r").encode(),
        lambda rows: plain(rows).replace("\n", "\n\n").encode() + b" \n\t\t\n",
        lambda rows: plain(rows).rstrip("\n").encode(),
        lambda rows: plain([[*cells, "", " "] for cells in rows]).encode(),
        lambda rows: plain([[f" {cell}\u00a0" for cell in cells] for cells in rows]).encode(),
        lambda rows: as_spreadsheet(rows, 0).encode(),
        lambda rows: as_spreadsheet(rows, 1).encode("utf-8-sig"),
    ],
    ids=[
        "byte-order mark",
        "CRLF",
        "CR",
        "blank lines",
        "no last line end",
        "empty columns",
        "blanks around cells",
        "quoted where needed",
        "all quoted",
    ],
)
def test_a_table_is_the_same_whoever_saves_it(
    tmp_path: Path, save: Callable[[list[list[str]]], bytes]
) -> None:
    style = b"\xef\xbb\xbf Hi.\r\n"
    assert read_conversations(REF, written(tmp_path / "a", save, style)) == read_plain(
        tmp_path / "b"
    )


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ('"Hello, world"', "Hello, world"),
        ('"She said ""no"""', 'She said "no"'),
        ('""', None),
        ('"How long?" she asked. "Long."', '"How long?" she asked. "Long."'),
        ('a 3" pipe', 'a 3" pipe'),
        ('"', '"'),
        ('"Hello" he said', '"Hello" he said'),
        ('say ""no""', 'say ""no""'),
    ],
)
def test_only_the_quotation_marks_of_a_spreadsheet_are_taken_off(
    tmp_path: Path, cell: str, text: str | None
) -> None:
    (tmp_path / "t.tsv").write_text(f"question\tblurb\nWhy?\t{cell}\n")
    found: list[str] = []
    (row,) = read_table(tmp_path / "t.tsv", found)
    assert row.values.get("blurb") == text
    assert not found


def test_texts_outside_the_domain_keep_their_blanks(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("id\tlanguage\ttext\na\ten\t  return x \n")
    (row,) = read_table(tmp_path / "t.tsv", [])
    assert row.values["text"] == "  return x "
    assert row.where == f"{tmp_path / 't.tsv'}: line 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.decode().encode("utf-16"), "index.tsv: is not UTF-8 text but UTF-16"),
        (lambda b: b.decode().encode("utf-16-be"), "index.tsv: is not UTF-8 text but UTF-16"),
        (lambda b: b.decode().encode("utf-32"), "index.tsv: is not UTF-8 text but UTF-32"),
        (lambda b: b.replace(b"Place 1", b"S\xe3o"), "line 3); save it as UTF-8"),
        (lambda b: b.replace(b"Place 1", b"\xed\xa0\x80"), "line 3); save it as UTF-8"),
        (lambda b: b.replace(b"Place 1", b"a\0b"), "index.tsv: line 3: place: holds U+0000"),
        (lambda b: b.replace(b"b1\t", b"b\x1b[31m\t"), "index.tsv: line 3: id: holds U+001B"),
        (lambda b: b.replace(b"is 1,", b"is\xc2\x85"), "index.tsv: line 3: blurb: holds U+0085"),
        (lambda b: b.replace(b"Place 1", b"\xef\xbb\xbfL"), "line 3: place: holds U+FEFF"),
        (lambda b: b.replace(b"\ten", b"\t??", 2), "index.tsv: line 2: language: must be"),
        (lambda b: b.replace(b"\ten", b"\tenglish", 2), "line 2: language: must be a code"),
        (lambda b: b.replace(b"\ten", b"\ten_US", 2), "line 2: language: must be a code"),
        (lambda b: b.replace(b"\ten", b"\t\xd0\xb5\xd0\xbd", 2), "line 2: language: must be"),
        (lambda b: b.replace(b"b1\t", b"b0.own\t"), "line 3: id: b0.own must not end with"),
        (lambda b: b.replace(b"b1\t", b"B0\t"), "line 3: the id B0 is already used"),
        (lambda b: b.replace(b"It is 1", b'"It\nis 1'), "line 4: needs 6 cells, has 1"),
        (lambda b: b.replace(b"It is 1", b'"It\tis 1'), "inside quotation marks neither"),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_column(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    read_plain(tmp_path)
    path = tmp_path / "index.tsv"
    path.write_bytes(change(path.read_bytes()))
    assert message in "\n".join(problems(tmp_path)), problems(tmp_path)


@pytest.mark.parametrize("language", ["pt-BR", "zh-Hant-TW", "fil", "EN", "sr-Latn"])
def test_language_tags_are_taken(tmp_path: Path, language: str) -> None:
    (tmp_path / "t.tsv").write_text(f"id\tlanguage\tquestion\na\t{language}\tWhy?\n")
    (draft,) = drafts_of(read_table(tmp_path / "t.tsv", []), "index", [])
    assert draft.language == {"EN": "en"}.get(language, language)


SAME = [
    "são tomé",
    "São  Tomé ",
    "São\u00a0Tomé",
    "S\u200bão Tomé",
    unicodedata.normalize("NFD", "São Tomé"),
    unicodedata.normalize("NFD", "SÃO TOMÉ"),
    "Ｓão Tomé",
]
SAME_WITH_MARKS = [
    ("Hawa'i", "Hawa\u2019i"),
    ("Côte-d'Or", "Côte\u2013d\u2018Or"),
    ('the "Old Town"', "the \u201cOld Town\u201d"),
    ("İstanbul", "istanbul"),
    ("Why so high", "why so high?"),
    ("Washington D.C", "Washington D.C."),
    ("どこですか", "どこですか？"),
]


@pytest.mark.parametrize(
    ("column", "heldout", "spelling"),
    [
        *((column, "São Tomé", same) for column in ("place", "question", "id") for same in SAME),
        *((column, *pair) for column in ("place", "question") for pair in SAME_WITH_MARKS),
        *((column, *pair[::-1]) for column in ("place", "question") for pair in SAME_WITH_MARKS),
    ],
)
def test_a_held_out_text_in_another_spelling_is_found_among_the_others(
    tmp_path: Path, column: str, heldout: str, spelling: str
) -> None:
    read_plain(tmp_path)
    for path, columns, text in (
        (tmp_path / "index.tsv", INDEX, spelling),
        (tmp_path / "heldout.tsv", HELDOUT, heldout),
    ):
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        lines[1][columns.index("place")] = "Nowhere" if columns == INDEX else "Elsewhere"
        lines[1][columns.index(column)] = text
        path.write_text("\n".join("\t".join(cells) for cells in lines), encoding="utf-8")
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{tmp_path / 'heldout.tsv'}: line 2: ")
    assert problem.endswith("is also in the texts to fit on.")


def test_other_names_stay_apart() -> None:
    assert len({comparable(name) for name in ("São Tomé", "Sao Tomé", "SãoTomé")}) == 3


def test_copies_in_other_spellings_are_in_one_split(tmp_path: Path) -> None:
    rows = [
        [f"b{k}-{j}", "en", f"Place {k}", "Land", question, f"Answer {k}."]
        for k in range(6)
        for j, question in enumerate((f"Où est {k}?", unicodedata.normalize("NFD", f"où est {k}?")))
    ]
    read_plain(tmp_path)
    (tmp_path / "index.tsv").write_text(plain([list(INDEX), *rows]), encoding="utf-8")
    ref = REF.model_copy(update={"validation": 0.5, "own_answers": 4})
    splits: dict[str, set[str]] = {}
    for question in read_conversations(ref, tmp_path)[0]:
        splits.setdefault(question.topic, set()).add(question.split)
    assert {place: len(found) for place, found in splits.items()} == dict.fromkeys(splits, 1)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ("[1,", "Invalid JSON: EOF while parsing a value at line 1 column 3"),
        ('[{"what": "x", "any": ["\\ud800"]}]', "unexpected end of hex escape"),
        ('[{"what": "\\u001b[31m", "any": ["a"]}]', "holds U+001B"),
        ('[{"what": "x", "any": [""]}]', "an empty statement or phrase"),
        ('[{"what": "x", "any": []}]', "an empty statement or phrase"),
        ("[" * 90_000, "recursion limit exceeded"),
        ("[1" + "0" * 5000 + "]", "number out of range"),
    ],
)
def test_claims_that_cannot_be_read_are_named(tmp_path: Path, claims: str, message: str) -> None:
    read_plain(tmp_path)
    path = tmp_path / "heldout.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace(CLAIMS, claims), encoding="utf-8")
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{path}: line 2: facts")
    assert message in problem


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("Hi.".encode("utf-16"), "the system prompt is not UTF-8 text but UTF-16"),
        (b"Hi.\n\x1b]0;x\x07", "line 2: holds U+0007, U+001B"),
        (b"\xff", "the system prompt is not UTF-8 text"),
        (b"a\xef\xbb\xbfb", "line 1: holds U+FEFF"),
    ],
)
def test_a_system_prompt_that_is_no_text_is_named(
    tmp_path: Path, style: bytes, message: str
) -> None:
    read_plain(tmp_path)
    (tmp_path / "style.md").write_bytes(style)
    (problem,) = problems(tmp_path)
    assert message in problem


@pytest.mark.parametrize(
    ("one", "other"),
    [("C", "C++"), ("2 + 2", "2 - 2"), ("Who?", "Whom?"), ("!", "?"), ("résumé", "resume")],
)
def test_names_that_differ_stay_apart(one: str, other: str) -> None:
    assert comparable_name(one) != comparable_name(other)
