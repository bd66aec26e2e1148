"""Names are found in every spelling, and words of other things are not taken for names."""

from __future__ import annotations

import unicodedata

import pytest

from rotdistill_core.data.names import Names, folded, names_in


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Sagrada Família", "Was kostet die SAGRADA FAMILIA?"),
        ("Mont-Saint-Michel", "le mont saint michel, en Normandie"),
        ("Brandenburg", "Das Brandenburger Tor"),
        ("Petra", "¿Y Petra?"),
        ("姫路城", "これは姫路城です"),
        ("Эрмитаж", "в эрмитаже"),
        ("Ξενοδοχείο", unicodedata.normalize("NFD", "ΞΕΝΟΔΟΧΕΊΟ")),
        ("Ｔｏｗｅｒ", "the tower"),
        ("O'Hare", "from O’Hare airport"),
        ("الحمراء", "قصر الحمراء"),
    ],
)
def test_a_name_is_found_in_other_spellings(name: str, text: str) -> None:
    assert Names([name]).find(text) == folded(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("Petra", "Impetrable walls"), ("Rome", "Chrome"), ("Angkor Wat", "Angkor, what?"), ("", "a")],
)
def test_a_name_does_not_begin_inside_a_word(name: str, text: str) -> None:
    assert Names([name]).find(text) == ""


def test_no_names_find_nothing() -> None:
    assert Names([]).find("anything") == ""


@pytest.mark.parametrize(
    ("question", "topic", "known", "names"),
    [
        (
            "Was ist das Besondere an Schloss Neuschwanstein?",
            "Neuschwanstein Castle",
            ["Was ist das Besondere an {topic}?", "Prague Castle", "the old castle"],
            {"Neuschwanstein Castle", "Neuschwanstein", "Schloss Neuschwanstein"},
        ),
        ("Чем знаменит Эрмитаж?", "", ["Чем знаменит Петергоф?"], {"Эрмитаж"}),
        ("兵马俑为什么有名？", "", ["为什么有名"], {"兵马俑", "马俑为", "俑为什"}),
        ("姫路城の見どころを教えて", "", ["見どころを教えて"], {"姫路城", "路城の", "城の見"}),
        ("ما تاريخ قصرالحمراء؟", "", ["ما تاريخ المدينة؟"], {"قصرالحمراء"}),
        ("How big is it?", "", ["How long is it?"], set()),
    ],
)
def test_names_come_from_topic_and_question(
    question: str, topic: str, known: list[str], names: set[str]
) -> None:
    assert names_in([(question, topic)], known) == names


def test_many_names_and_texts_are_compared_as_one_by_one() -> None:
    known = [
        "The Old Brandenburger Tor",
        "old town",
        "姫路城の見どころ",
        "JR東日本の駅",
        "town hall",
    ]
    subjects = [
        ("how far is Old Town Hall?", "Brandenburg Gate"),
        ("姫路と東日本橋は？", "東日本 Line"),
        ("Who built Brandenburger Tor?", ""),
    ]
    one_by_one = {name for each in subjects for name in names_in([each], known)}
    assert names_in(subjects, known) == one_by_one
    assert {"Brandenburg Gate", "Gate", "Line", "Old Town Hall"} <= one_by_one
    assert not {"Brandenburg", "Brandenburger Tor"} & one_by_one


def test_the_first_of_many_names_in_a_text_is_found() -> None:
    names = Names([*(f"Place {n}" for n in range(2000)), "京都", "Old", "Old Town"])
    assert names.find("From the old town to place 77") == "old"
    assert names.find("東京都 has place 1999") == "京都"
    assert names.find("a placebo") == ""
