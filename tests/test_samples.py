"""The shipped texts, how tables are read and split, and how texts are laid out as rows."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch

from rotdistill_core.data.packed import PackedTexts, Text
from rotdistill_core.data.questions import (
    HELDOUT_COLUMNS,
    INDEX_COLUMNS,
    Claim,
    Question,
    read_questions,
)
from rotdistill_core.data.tokenization import tokenize_for_both, tokenize_texts
from rotdistill_core.errors import RecipeError, SetupError
from rotdistill_core.recipe.document import SamplesRef
from rotdistill_core.testing import pico_tokenizer

SAMPLES = Path(__file__).parents[1] / "samples"
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
def test_shipped_facts_and_falsehoods_can_be_looked_for(row: dict[str, str]) -> None:
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
    questions, style = read_questions(SamplesRef(), SAMPLES.parent / "recipes")
    assert Counter(q.split for q in questions) == {"fit": 160, "validation": 40, "heldout": 20}
    assert all((q.answer is None) == (q.split == "heldout") for q in questions)
    assert style.startswith("You are a")


def blurb(name: str) -> list[str]:
    return [name, "en", f"Place {name}", "Nowhere", f"What is {name}?", f"It is {name}."]


def write_tables(
    folder: Path, blurbs: list[list[str]], heldout: list[list[str]] | None = None
) -> Path:
    question = ["h1", "en", "Elsewhere", "Nowhere", "Where?", "[]", "[]"]
    for file, columns, rows in (
        ("index.tsv", INDEX_COLUMNS, blurbs),
        ("heldout.tsv", HELDOUT_COLUMNS, [question] if heldout is None else heldout),
    ):
        lines = ["\t".join(cells) + "\n" for cells in (columns, *rows)]
        (folder / file).write_text("".join(lines), encoding="utf-8", newline="")
    (folder / "style.md").write_text(" Be brief.\n", encoding="utf-8")
    return folder


def splits(folder: Path, ref: SamplesRef = REF) -> dict[str, str]:
    return {q.id: q.split for q in read_questions(ref, folder)[0]}


def test_the_split_follows_ids_and_not_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [blurb(f"b{k}") for k in range(12)]
    first = splits(write_tables(tmp_path, rows))
    assert Counter(first.values()) == {"fit": 9, "validation": 3, "heldout": 1}
    assert splits(write_tables(tmp_path, rows[::-1])) == first
    changed = [[*row[:5], "Another text."] for row in rows]
    assert splits(write_tables(tmp_path, changed)) == first


def test_a_limit_takes_the_same_blurbs_in_any_order(tmp_path: Path) -> None:
    rows, few = [blurb(f"b{k}") for k in range(12)], REF.model_copy(update={"limit": 4})
    first = splits(write_tables(tmp_path, rows), few)
    assert len(first) == 5
    assert splits(write_tables(tmp_path, rows[::-1]), few) == first


def problems_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read_questions(REF, folder)
    return caught.value.problems


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (["b9", "en", "", "x", "y", "z"], "line 4: needs 6 non-empty cells, has 5"),
        (["b9", "en", " ", "x", "y", "z"], "line 4: needs 6 non-empty cells, has 5"),
        (["b9", "en", "w", "x", "y"], "line 4: needs 6 non-empty cells, has 5"),
        (["b9", "en", "w", "x", "y", "z", "more"], "line 4: needs 6 non-empty cells, has 7"),
        (blurb("b1"), "line 4: the id b1 is already used"),
        (["b9", "en", "w", "x", "y", "z" * 200_000], ""),
    ],
    ids=["empty cell", "blank cell", "short", "long", "duplicate", "huge cell"],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: list[str], wanted: str) -> None:
    (problem,) = problems_of(
        write_tables(tmp_path, [blurb("b0"), blurb("b1"), row, *map(blurb, ("b2", "b3"))])
    )
    assert problem.startswith(f"{tmp_path / 'index.tsv'}: {wanted}")


@pytest.mark.parametrize(
    "text", ["", "id\tlanguage\n", "id,language,place,country,question,blurb\n"]
)
def test_wrong_columns_are_named_by_file_and_line(tmp_path: Path, text: str) -> None:
    (write_tables(tmp_path, [blurb("b0")]) / "index.tsv").write_text(text)
    assert problems_of(tmp_path)[0].startswith(
        f"{tmp_path / 'index.tsv'}: line 1: the columns must be id, language"
    )


def test_every_missing_file_is_named(tmp_path: Path) -> None:
    problems = problems_of(tmp_path)
    assert all(
        name in problem
        for name, problem in zip(("index.tsv", "heldout.tsv", "style.md"), problems, strict=True)
    )


def test_a_held_out_place_among_the_blurbs_is_refused(tmp_path: Path) -> None:
    heldout = [["h1", "en", "place B0", "x", "y?", "[]", "[]"]]
    (problem,) = problems_of(write_tables(tmp_path, [blurb(f"b{k}") for k in range(4)], heldout))
    assert "heldout.tsv: h1: place B0 is also in the blurbs" in problem


def test_an_id_in_both_tables_is_refused(tmp_path: Path) -> None:
    heldout = [["b0", "en", "Elsewhere", "x", "y?", "[]", "[]"]]
    assert (
        "b0" in problems_of(write_tables(tmp_path, [blurb(f"b{k}") for k in range(4)], heldout))[0]
    )


def test_copies_of_a_text_fall_on_one_side_and_a_question_is_asked_once(tmp_path: Path) -> None:
    rows = [
        [f"{name}-{k}", *blurb(name)[1:]] for k in range(20) for name in ("b1", "b2", "b3", "b4")
    ]
    rows += [["other", *blurb("b1")[1:5], "Another answer."]]
    ref = REF.model_copy(update={"own_answers": 8, "validation": 0.5})
    questions, _ = read_questions(ref, write_tables(tmp_path, rows))
    texts = {
        split: {(q.question, q.answer) for q in questions if q.split == split and q.answer}
        for split in ("fit", "validation")
    }
    assert not texts["fit"] & texts["validation"]
    assert texts["fit"]
    assert texts["validation"]
    own = [q for q in questions if q.id.endswith(".own")]
    assert sorted(q.question for q in own) == [f"What is b{k}?" for k in (1, 2, 3, 4)]
    fitted = {q.question for q in questions if q.split == "fit"}
    assert all(q.split == "fit" for q in own if q.question in fitted)


def test_too_few_texts_are_refused(tmp_path: Path) -> None:
    assert "too few different texts" in problems_of(write_tables(tmp_path, [blurb("b0")]))[0]
    (problem,) = problems_of(write_tables(tmp_path, [blurb(f"b{k}") for k in range(4)], []))
    assert problem.startswith(
        f"{tmp_path / 'heldout.tsv'}: too few different texts: heldout has none"
    )


@pytest.mark.parametrize(
    "cell", ["none", "[1]", '[{"what": "x"}]', '[{"what": "x", "any": "y"}]', "{"]
)
def test_facts_that_are_no_claims_are_named(tmp_path: Path, cell: str) -> None:
    heldout = [["h1", "en", "Elsewhere", "x", "y?", "[]", cell]]
    (problem,) = problems_of(write_tables(tmp_path, [blurb(f"b{k}") for k in range(4)], heldout))
    assert problem.startswith(f"{tmp_path / 'heldout.tsv'}: h1: falsehoods: ")
    assert "must be a JSON list of objects with `what` and `any`" in problem


def test_facts_are_read_with_their_question(tmp_path: Path) -> None:
    heldout = [["h1", "en", "Elsewhere", "x", "y?", '[{"what": "a", "any": ["b", "c"]}]', "[]"]]
    questions, _ = read_questions(
        REF, write_tables(tmp_path, [blurb(f"b{k}") for k in range(4)], heldout)
    )
    assert [(q.facts, q.falsehoods) for q in questions if q.split == "heldout"] == [
        ((Claim("a", ("b", "c")),), ())
    ]


TEXTS = (
    Text("a", "en", "fit", (1, 2, 3, 4, 5), 3),
    Text("b", "de", "heldout", (1, 2, 6, 7, 8, 9), 4),
    Text("c", "en", "fit", (1, 2, 10), 2),
    Text("d", "fr", "heldout", (1, 2, 11, 12), 3),
)
FULL = PackedTexts(TEXTS, 2)


def test_the_prefix_is_there_once_and_each_text_has_its_rows() -> None:
    assert FULL.starts == [2, 5, 9, 10, 12]
    assert FULL.rows == len(FULL.tokens) == 12
    assert FULL.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert FULL.split("fit").tolist() == [True] * 5 + [False] * 4 + [True] + [False] * 2
    assert not bool((FULL.split("fit") & FULL.split("heldout")).any())
    assert bool(FULL.split("fit", "heldout").all())


@pytest.mark.parametrize(
    ("split", "targets", "languages"),
    [("fit", [4, 5, 10], ["en", "en", "en"]), ("heldout", [8, 9, 12], ["de", "de", "fr"])],
)
def test_predicting_rows_are_the_tokens_before_each_answer_token(
    split: str, targets: list[int], languages: list[str]
) -> None:
    rows, found, texts = FULL.prediction_rows(split)
    assert found.tolist() == targets
    assert [t.language for t in texts] == languages
    assert [t.id for t in texts] == [
        t.id for t in TEXTS if t.split == split for _ in range(t.answer, len(t.tokens))
    ]
    before = [
        t.tokens[p - 1] for t in TEXTS if t.split == split for p in range(t.answer, len(t.tokens))
    ]
    assert FULL.tokens[rows].tolist() == before


@pytest.mark.parametrize("chosen", [("fit",), ("heldout",), ("fit", "heldout"), ("validation",)])
def test_selected_rows_are_found_again_in_the_full_layout(chosen: tuple[str, ...]) -> None:
    some = FULL.select(*chosen)
    assert some.prefix == FULL.prefix
    if some.texts:
        assert torch.equal(FULL.tokens[some.row_indices_in(FULL)], some.tokens)
    assert len(some.row_indices_in(FULL)) == some.rows
    assert [t.id for t in some.texts] == [t.id for t in TEXTS if t.split in chosen]


def test_a_selection_may_be_cut_short() -> None:
    assert [t.id for t in FULL.select("fit", "heldout", most=3).texts] == ["a", "b", "c"]
    assert FULL.select("fit", "heldout").digest() == FULL.digest() != FULL.select("fit").digest()


MIXED = PackedTexts(
    (
        TEXTS[0],
        Text("g", "en", "guard", (20, 21, 22), 1, plain=True),
        TEXTS[1],
        Text("h", "en", "guard", (23, 24), 1, plain=True),
    ),
    2,
)


def test_plain_texts_have_all_their_rows_and_no_prefix() -> None:
    assert MIXED.starts == [2, 5, 8, 12, 14]
    assert MIXED.tokens.tolist() == [1, 2, 3, 4, 5, 20, 21, 22, 6, 7, 8, 9, 23, 24]
    rows, targets, _ = MIXED.prediction_rows("guard")
    assert MIXED.tokens[rows].tolist() == [20, 21, 23]
    assert targets.tolist() == [21, 22, 24]
    alone = MIXED.select("guard")
    assert (alone.prefix, alone.tokens.tolist()) == (0, [20, 21, 22, 23, 24])
    assert torch.equal(MIXED.tokens[alone.row_indices_in(MIXED)], alone.tokens)
    assert MIXED.select("guard", "heldout").prefix == 2
    for batch in MIXED.batches():
        assert len({MIXED.texts[k].plain for k in batch}) == 1
    assert sorted(k for batch in MIXED.batches(4) for k in batch) == [0, 1, 2, 3]


def test_the_guard_is_read_as_it_stands(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, [blurb(f"b{k}") for k in range(6)])
    (folder / "guard.tsv").write_text(
        "id\tlanguage\tkind\ttext\n" + "".join(f"g{k}\ten\tcode\ta\\nb{k}\n" for k in range(4))
    )
    ref = REF.model_copy(update={"guard": "guard.tsv"})
    guard = [q for q in read_questions(ref, folder)[0] if q.split.startswith("guard")]
    assert Counter(q.split for q in guard) == {"guard": 2, "guard-validation": 2}
    layout = tokenize_texts(Letters(), [*ASKED, *guard], {"q": [7, 8]}, "Be brief.", 30).layout
    assert layout.prefix == len("<s>Be brief.\n<u>Wh")
    assert {"".join(map(chr, t.tokens)) for t in layout.texts if t.plain} == {
        f"a\nb{k}" for k in range(4)
    }
    assert (
        tokenize_for_both(Letters(), Letters(), [*ASKED, *guard], {"q": [7, 8]}, "Be brief.", 500)
        .layout.texts[-1]
        .id
        == "q"
    )


def test_a_guard_with_an_id_of_a_blurb_is_refused(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, [blurb(f"b{k}") for k in range(6)])
    (folder / "guard.tsv").write_text("id\tlanguage\tkind\ttext\nb0\ten\tcode\tx\n")
    with pytest.raises(RecipeError, match=r"guard\.tsv: the id b0 is also in another file"):
        read_questions(REF.model_copy(update={"guard": "guard.tsv"}), folder)


def test_the_shipped_guard_is_about_something_else() -> None:
    questions, _ = read_questions(
        SamplesRef(guard="../samples/general/index.tsv"), SAMPLES.parent / "recipes"
    )
    guard = [q for q in questions if q.split.startswith("guard")]
    assert Counter(q.split for q in guard) == {"guard": 20, "guard-validation": 20}
    assert len({q.language for q in guard}) >= 12
    places = {row["place"].casefold() for row in (*BLURBS[1], *HELDOUT[1])}
    for q in guard:
        assert not [place for place in places if place in str(q.answer).casefold()]


@pytest.mark.parametrize("budget", [1, 5, 8, 1000])
def test_batches_hold_every_text_once_and_keep_their_budget(budget: int) -> None:
    batches = FULL.batches(budget)
    assert sorted(k for batch in batches for k in batch) == [0, 1, 2, 3]
    for batch in batches:
        assert (
            len(batch) == 1
            or len(batch) * max(len(TEXTS[k].tokens) - FULL.prefix for k in batch) <= budget
        )


class Letters:
    """A tokenizer of single characters with a chat template."""

    chat_template = "yes"
    name_or_path = "letters"
    eos_token_id = 0
    all_special_ids = (0,)

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(
        self, chat: list[dict[str, str]], add_generation_prompt: bool = False, **_: bool
    ) -> dict[str, list[int]]:
        text = (
            "".join(f"<{turn['role'][0]}>{turn['content']}\n" for turn in chat)
            + "<a>" * add_generation_prompt
        )
        return {"input_ids": [ord(c) for c in text]}


ASKED = [Question("p", "en", "fit", "Who?", "Me."), Question("q", "en", "heldout", "When?", None)]


def test_the_shared_prompt_becomes_the_prefix() -> None:
    layout = tokenize_texts(Letters(), ASKED, {"q": [7, 8]}, "Be brief.", 500).layout
    shared = "<s>Be brief.\n<u>Wh"
    assert layout.prefix == len(shared)
    assert "".join(map(chr, layout.tokens[: layout.prefix])) == shared
    first, second = layout.texts
    assert "".join(map(chr, first.tokens[first.answer :])) == "Me.\n"
    assert second.tokens[second.answer :] == (7, 8)


def test_one_text_alone_keeps_the_token_that_predicts_its_answer() -> None:
    layout = tokenize_texts(Letters(), ASKED[:1], {}, "Be brief.", 500).layout
    rows, targets, _ = layout.prediction_rows("fit")
    assert chr(layout.tokens[rows[0]]) == ">"
    assert "".join(map(chr, targets)) == "Me.\n"
    assert int(rows[0]) >= layout.prefix


def test_a_text_is_cut_but_never_to_its_prompt_alone() -> None:
    whole = tokenize_texts(Letters(), ASKED[:1], {}, "Be brief.", 500).layout.texts[0]
    cut = tokenize_texts(Letters(), ASKED[:1], {}, "Be brief.", whole.answer + 1).layout.texts[0]
    assert cut.tokens == whole.tokens[: whole.answer + 1]
    with pytest.raises(SetupError, match="text p: its prompt alone has"):
        tokenize_texts(Letters(), ASKED[:1], {}, "Be brief.", whole.answer)


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    plain = Letters()
    plain.chat_template = ""
    with pytest.raises(SetupError, match="letters: the tokenizer has no chat template"):
        tokenize_texts(plain, ASKED, {"q": [1]}, "Be brief.", 500)


def test_held_out_answers_are_never_cut() -> None:
    questions = [
        Question("a", "en", "fit", "w1", "w2 " * 40),
        Question("h", "en", "heldout", "w3", None),
    ]
    made = tokenize_texts(pico_tokenizer(64), questions, {"h": [7] * 40}, "w4", 20)
    lengths = {text.id: len(text.tokens) for text in made.layout.texts}
    assert lengths["a"] == 20
    assert lengths["h"] > 40
