"""Facts and falsehoods in answers: agreement with labels made by hand, spellings of numbers and dates, and what denies."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from rotdistill_answers._facts import judge, states
from rotdistill_answers._normalize import plain

from rotdistill_core.data.questions import Claim

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def labelled(name: str) -> list[tuple[dict[str, str], set[str], set[str]]]:
    """Return each labelled answer with the claims that a reader and the scorer find in it: facts 1 to 6, falsehoods a to d."""
    asked = {row["id"]: row for row in table(ROOT / "samples" / "heldout.tsv")}
    found = []
    for row in table(HERE / name):
        claims = [
            [Claim(**c) for c in json.loads(asked[row["id"]][column])]
            for column in ("facts", "falsehoods")
        ]
        judged = judge(row["answer"], *claims, row["language"])
        named = zip(claims, judged, ("123456", "abcd"), strict=True)
        scored = {
            mark
            for some, what, marks in named
            for claim, mark in zip(some, marks, strict=True)
            if claim.what in what
        }
        found.append((row, set(row["facts"] + row["falsehoods"]) - {"-"}, scored))
    return found


def test_the_scorers_agree_with_labels_made_by_hand() -> None:
    found = labelled("labelled.tsv")
    assert len(found) == 60
    differ = [
        (row["id"], row["kind"], sorted(said), sorted(scored))
        for row, said, scored in found
        if said != scored
    ]
    assert len(differ) / 60 <= 0.05, differ
    listed = (HERE.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` {kind} |" in listed for name, kind, *_ in differ)
    assert listed.count("| `held-") == len(differ)


def test_on_answers_that_nobody_tuned_by_the_readme_says_how_often_it_errs() -> None:
    found = labelled(
        "blind.tsv"
    )  # by somebody who saw the claims, and neither scorer nor phrases; not to be improved on
    assert len(found) == 120
    assert all(
        row["second"] in ("", row["facts"].strip("-") + row["falsehoods"].strip("-") or "-")
        for row, *_ in found
    )
    wrong = [len(said ^ scored) for _, said, scored in found]
    assert sum(wrong) / 1200 <= 0.05
    listed = (HERE.parent / "README.md").read_text(encoding="utf-8")
    assert (
        f"right in {wrong.count(0)} of 120 answers, and errs in {sum(wrong)} of 1,200 single decisions"
        in listed
    )
    signs = (
        " ".join(
            [*(f"-{m}" for m in sorted(said - scored)), *(f"+{m}" for m in sorted(scored - said))]
        )
        for _, said, scored in found
    )
    errors = [
        f"{row['id'][5:]} {row['kind']} {sign}"
        for (row, *_), sign in zip(found, signs, strict=True)
        if sign
    ]
    assert ", ".join(errors) in listed.replace("\n", " ")


SAME = [
    ("en", "Queen's. 18 rooms", "queen's. 18 rooms"),
    ("ga", "a 3 mile walk", "a 3 mi walk"),
    ("en", "1,234", "1234"),
    ("de", "1.234", "1234"),
    ("fr", "1 234", "1234"),
    ("fr", "1\u202f234", "1234"),
    ("en", "3,000,000", "3000000"),
    ("hi", "१२,३४,५६७", "1234567"),
    ("ar", "١٩٨٩", "1989"),
    ("ja", "１９８９年", "1989年"),
    ("zh", "一九八七", "1987"),
    ("ja", "八千体", "8000体"),
    ("zh", "三万二千", "32000"),
    ("en", "nineteen eighty-nine", "1989"),
    ("de", "dreißig Meter", "30 meter"),
    ("it", "millecinquecento", "1500"),
    ("en", "14 July 1789", "July 14, 1789"),
    ("fr", "14 juillet 1789", "14/07/1789"),
    ("es", "14 de julio de 1789", "14.7.1789"),
    ("de", "14. Juli 1789", "14.07.1789"),
    ("ru", "14 июля 1789", "14.07.1789"),
    ("ja", "1789年7月14日", "14.07.1789"),
    ("pt", "Belém", "belem"),
    ("fr", "l’œuvre", "l'œuvre"),
    ("ko", "1789년 7월 14일", "14.07.1789"),
    ("en", "the twelfth century", "the 12th century"),
    ("en", "the 12th and 13th centuries", "the century-12 and century-13"),
    ("en", "the 1100s", "the 12th century"),
    ("fr", "XIIe siècle", "12th century"),
    ("es", "siglo XII", "12th century"),
    ("it", "XII secolo", "12th century"),
    ("de", "12. Jahrhundert", "12th century"),
    ("ru", "XII век", "12th century"),
    ("ja", "十二世紀", "12th century"),
    ("en", "57-metre", "57 m"),
    ("ru", "57 метров", "57 m"),
    ("de", "187 Fuß", "187 feet"),
    ("en", "3.2 million", "3,200,000"),
    ("ru", "3,2 млн", "3 200 000"),
    ("zh", "300万", "三百万"),
]


@pytest.mark.parametrize(("language", "one", "other"), SAME)
def test_spellings_of_one_thing_are_one(language: str, one: str, other: str) -> None:
    assert plain(one, language) == plain(other, language)


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("en", "1.5", "15"),
        ("en", "1981, 300 people", "1981300 people"),
        ("de", "3,5 Millionen", "35 millionen"),
        ("en", "12.13.1789", "1789-13-12"),
    ],
)
def test_what_is_not_one_thing_stays_apart(language: str, one: str, other: str) -> None:
    assert plain(one, language) != plain(other, language)


DENIED = [
    ("en", "It was not built in 1889.", "built in 1889"),
    ("en", "It was not, as many think, built in 1889.", "built in 1889"),
    ("fr", "Elle n'a pas été construite en 1889.", "construite en 1889"),
    ("de", "Er wurde 1889 nicht gebaut.", "1889"),
    ("es", "No se construyó en 1889.", "en 1889"),
    ("it", "Non fu costruita nel 1889.", "nel 1889"),
    ("pt", "Não foi construída em 1889.", "em 1889"),
    ("ru", "Она не построена в 1889 году.", "в 1889"),
    ("ja", "1889年に建てられたのではありません。", "1889"),
    ("zh", "它不是1889年建的。", "1889"),
    ("hi", "यह १८८९ में नहीं बना था।", "1889"),
    ("ar", "لم يُبنَ في ١٨٨٩.", "1889"),
    ("el", "Δεν χτίστηκε το 1889.", "1889"),
    ("ko", "1889년에 지어지지 않았다.", "1889"),
    ("en", "Was it built in 1889?", "built in 1889"),
    ("en", "Gustave Eiffel did not design it.", "Gustave Eiffel"),
    ("en", "It is not in Egypt, Syria or Lebanon.", "Syria"),
    ("en", "It is a myth that it was built in 1889.", "built in 1889"),
    ("en", "That it was built in 1889 is a myth.", "built in 1889"),
    ("en", "Many people believe it was built in 1889.", "built in 1889"),
    ("de", "Es stimmt nicht, dass er 1889 gebaut wurde.", "1889"),
    ("ru", "Неверно, что она построена в 1889 году.", "1889"),
    ("zh", "它不在洛阳。", "在洛阳"),
    ("es", "Muchos creen que se construyó en 1889.", "en 1889"),
    ("es", "Es falso que se construyera en 1889.", "en 1889"),
    ("fr", "Le Mont n'a rien de cistercien.", "cistercien"),
    ("fr", "Guernica n'y est pas.", "Guernica"),
    ("it", "È un mito che fu costruita nel 1889.", "nel 1889"),
    ("pt", "É mentira que foi construída em 1889.", "em 1889"),
    ("de", "Es ist ein Irrtum, dass er 1889 gebaut wurde.", "1889"),
    ("ru", "Многие считают, что она построена в 1889 году.", "1889"),
    ("zh", "很多人以为它建于1889年。", "1889"),
]
SAID = [
    ("en", "It was not built in 1889 but in 1887.", "1887"),
    ("en", "It was built in 1889, not in 1887.", "1889"),
    ("fr", "Pas en 1887, mais en 1889.", "1889"),
    ("en", "Not only in 1889 was it shown.", "1889"),
    ("de", "Nicht 1887, sondern 1889.", "1889"),
    ("es", "No te pierdas la torre de 1889.", "1889"),
    ("en", "It is closed. No, it opened in 1889.", "1889"),
    ("ja", "1887年ではなく1889年です。", "1889"),
    ("zh", "不是1887年，而是1889年。", "1889"),
    ("ko", "1887년이 아니라 1889년이다.", "1889"),
    ("it", "Non nel 1887, ma nel 1889.", "1889"),
    ("ru", "Не в 1887, а в 1889 году.", "1889"),
    ("en", "It did not open until 1889.", "1889"),
    ("en", "Nobody should leave without seeing the Siq.", "Siq"),
    ("en", "It was not built by the Romans and lies in Wiltshire.", "Wiltshire"),
    ("en", "Cape Town's mountain is not a volcano.", "Cape Town"),
    ("en", "The museum in Paris does not own Guernica.", "Paris"),
    ("en", "Did you know that it opened in 1889?", "1889"),
    ("es", "No te pierdas la torre ni el patio de 1889.", "1889"),
    ("fr", "Ne manquez ni la tour ni Guernica.", "Guernica"),
    ("it", "Non è di Palladio e fu costruita nel 1889.", "nel 1889"),
    ("pt", "Não deixe de ver a torre de 1889.", "1889"),
    ("de", "Niemand sollte gehen, ohne den Turm von 1889 zu sehen.", "1889"),
    ("ja", "城は戦災で焼けずに1609年の姿を残す。", "1609"),
    ("zh", "它不在洛阳而在西安。", "西安"),
]


@pytest.mark.parametrize(("language", "text", "phrase"), [*DENIED, *SAID])
def test_a_phrase_that_is_denied_is_not_stated(language: str, text: str, phrase: str) -> None:
    assert states(plain(text, language), Claim("", (phrase,)), language) is (
        (language, text, phrase) in SAID
    )


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("30 metros", "130 metros"),
        ("1889", "11889"),
        ("Ludwig II", "ludwig iii"),
        ("siglo XV ", "siglo xvi"),
        ("em São Paulo", "tambem sao paulo"),
        ("2,300", "2,300,000"),
        ("built … by Rome", "built, and seen by rome"),
        ("built … 1889", "built in 1887 and shut in 1889"),
        ("opened in [!1889]", "opened in 1889"),
        ("built in the [!12th century]", "built in the century-12"),
    ],
)
def test_a_phrase_is_not_found_inside_another(phrase: str, text: str) -> None:
    assert not states(plain(text, "pt"), Claim("", (phrase,)), "pt")


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("[built|raised] … by [Rome|Greece]", "It was raised long ago by Greece."),
        ("opened in [!1889]", "It opened in 1887."),
        ("built in the [!12th century]", "It was built in the ninth century."),
        ("castl[e|es] of", "the castles of Spain"),
    ],
)
def test_signs_stand_for_several_phrases(phrase: str, text: str) -> None:
    assert states(plain(text, "en"), Claim("", (phrase,)), "en")
