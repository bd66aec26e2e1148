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
    assert set(names_in(question, topic, known)) == names
