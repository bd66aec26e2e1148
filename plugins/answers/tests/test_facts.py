"""Facts and falsehoods in answers: agreement with labels, spellings, phrases and denials."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from rotdistill_answers._facts import DENIALS, named_claims, undenied_claims
from rotdistill_answers._normalize import normalize

from rotdistill_core.data.conversations import Claim

HERE = Path(__file__).parent
README = (HERE.parent / "README.md").read_text(encoding="utf-8").replace("\n", " ")
SAMPLES = HERE.parents[2] / "samples"


class Labelled(NamedTuple):
    """An answer with labels of its claims: facts 1 to 6, falsehoods a to d."""

    row: dict[str, str]
    by_hand: set[str]
    scored: set[str]

    @property
    def name(self) -> str:
        """Question and kind of answer."""
        return f"{self.row['id'].removeprefix('held-')} {self.row['kind']}"

    @property
    def errors(self) -> list[str]:
        """`-4`: the scorer misses fact 4; `+a`: it finds falsehood a, and the reader does not."""
        missed = [f"-{label}" for label in sorted(self.by_hand - self.scored)]
        return missed + [f"+{label}" for label in sorted(self.scored - self.by_hand)]


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def scored_labels(answer: dict[str, str], question: dict[str, str]) -> set[str]:
    text = normalize(answer["answer"], answer["language"])
    labels = set()
    columns = (("facts", "123456", named_claims), ("falsehoods", "abcd", undenied_claims))
    for column, names, found_in in columns:
        claims = [Claim(**claim) for claim in json.loads(question[column])]
        stated = found_in(text, claims, answer["language"])
        labels |= {name for name, claim in zip(names, claims, strict=True) if claim.what in stated}
    return labels


def labelled(file: str) -> list[Labelled]:
    questions = {row["id"]: row for row in read_table(SAMPLES / "heldout.tsv")}
    return [
        Labelled(
            row=row,
            by_hand=set(row["facts"] + row["falsehoods"]) - {"-"},
            scored=scored_labels(row, questions[row["id"]]),
        )
        for row in read_table(HERE / file)
    ]


def test_the_scorer_agrees_with_labels_made_by_hand() -> None:
    answers = labelled("labelled.tsv")
    assert len(answers) == 60
    wrong = [answer for answer in answers if answer.errors]
    decisions = sum(len(answer.errors) for answer in wrong)
    assert decisions / 600 <= 0.02, [(answer.name, answer.errors) for answer in wrong]
    assert f"in {60 - len(wrong)}, and errs in {decisions} of 600 single decisions" in README
    for answer in wrong:
        assert f"| `{answer.row['id']}` {answer.row['kind']} |" in README
    assert README.count("| `held-") == len(wrong)


def test_the_readme_gives_the_errors_on_answers_that_nobody_tuned_by() -> None:
    # Written by somebody who saw the claims, but neither scorer nor phrases. Not to be tuned by.
    answers = labelled("blind.tsv")
    assert len(answers) == 120
    for answer in answers:
        facts, falsehoods = answer.row["facts"].strip("-"), answer.row["falsehoods"].strip("-")
        assert answer.row["second"] in ("", facts + falsehoods or "-")
    wrong = [answer for answer in answers if answer.errors]
    decisions = sum(len(answer.errors) for answer in wrong)
    assert decisions / 1200 <= 0.05
    assert f"right in {120 - len(wrong)} of 120 answers" in README
    assert f"errs in {decisions} of 1,200 single decisions" in README
    listed = ", ".join(" ".join([answer.name, *answer.errors]) for answer in wrong)
    assert listed in README


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
def test_spellings_of_one_thing_are_normalised_to_one(language: str, one: str, other: str) -> None:
    assert normalize(one, language) == normalize(other, language)


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("en", "1.5", "15"),
        ("en", "1981, 300 people", "1981300 people"),
        ("de", "3,5 Millionen", "35 millionen"),
        ("en", "12.13.1789", "1789-13-12"),
    ],
)
def test_different_things_stay_different(language: str, one: str, other: str) -> None:
    assert normalize(one, language) != normalize(other, language)


DENIED = [
    ("ar", "لم يُبنَ في ١٨٨٩."),
    ("de", "Er wurde 1889 nicht gebaut."),
    ("el", "Δεν χτίστηκε το 1889."),
    ("en", "It wasn't built in 1889, as many think."),
    ("es", "No se construyó en 1889."),
    ("fr", "Elle n'a pas été construite en 1889."),
    ("hi", "यह १८८९ में नहीं बना था।"),
    ("it", "Non fu costruita nel 1889."),
    ("ja", "1889年に建てられたのではありません。"),
    ("ko", "1889년에 지어지지 않았다."),
    ("pt", "Não foi construída em 1889."),
    ("ru", "Она не построена в 1889 году."),
    ("zh", "它不是1889年建的。"),
]
ASSERTED = [
    ("ar", "بُني في ١٨٨٩. لا تفوته."),
    ("de", "Er wurde 1889 gebaut. Ein Muss, nicht wahr?"),
    ("el", "Χτίστηκε το 1889. Μην το χάσετε."),
    ("en", "It is not closed: it opened in 1889, a notable year."),
    ("es", "Abrió en 1889. No se la pierda."),
    ("fr", "Construite en 1889 (à ne pas manquer)."),
    ("hi", "यह १८८९ में बना था। इसे देखना नहीं भूलें।"),
    ("it", "Fu costruita nel 1889. Non perdetela."),
    ("ja", "1889年に建てられました。見逃せません。"),
    ("ko", "1889년에 지어졌다. 놓치지 않기를."),
    ("pt", "Foi construída em 1889. Não perca."),
    ("ru", "Она построена в 1889 году. Не пропустите."),
    ("zh", "它建于1889年。不要错过。"),
    ("sw", "Ilijengwa mwaka 1889."),
]


@pytest.mark.parametrize(("language", "text"), DENIED)
def test_a_falsehood_does_not_count_beside_a_word_of_denial(language: str, text: str) -> None:
    claims = [Claim("built in 1889", ("1889",))]
    assert undenied_claims(normalize(text, language), claims, language) == ()
    assert named_claims(normalize(text, language), claims, language) == ("built in 1889",)


@pytest.mark.parametrize(("language", "text"), ASSERTED)
def test_a_falsehood_counts_in_a_sentence_that_denies_nothing(language: str, text: str) -> None:
    claims = [Claim("built in 1889", ("1889",))]
    assert undenied_claims(normalize(text, language), claims, language) == ("built in 1889",)


def test_every_language_with_a_list_of_denials_is_tried() -> None:
    assert [language for language, _ in DENIED] == sorted(DENIALS)


def test_a_phrase_that_denies_counts_where_it_stands() -> None:
    claims = [Claim("no lift", ("no lift",)), Claim("a lift", ("a lift",))]
    assert undenied_claims("there is no lift, nor a lift plan", claims, "en") == ("no lift",)


def test_no_phrase_goes_on_behind_a_sentence_that_is_left_out() -> None:
    claims = [Claim("built in 1889", ("built 1889", "built … 1889"))]
    assert undenied_claims("it was built. not in 1889. 1889 came later", claims, "en") == ()


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
    assert not named_claims(normalize(text, "pt"), [Claim("", (phrase,))], "pt")


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
    assert named_claims(normalize(text, "en"), [Claim("", (phrase,))], "en")
