"""The languages of texts that name none: those of the library, however many texts there are."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from rotdistill_core.data import languages
from rotdistill_core.data.languages import NO_LANGUAGE, SURE, can_be_told, told_languages

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "index.tsv"


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Return the shipped texts in fourteen languages, whole and in parts of some words."""
    with SAMPLES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = {row["id"]: row["blurb"] for row in rows}
    found |= {f"{row['id']}-q": row["question"] for row in rows}
    found |= {f"{row['id']}-s": row["blurb"][:9] for row in rows}
    return found | {
        "upper": "WHAT IS IT ALL ABOUT?",
        "none": "",
        "digits": "1 2 3",
        "long": "ab " * 4000,
    }


def of_the_library(texts: dict[str, str]) -> dict[str, str]:
    """Return the languages as the library tells them, one text after the other."""
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    first = {name: model.classify(text) for name, text in texts.items()}
    model.set_languages(sorted({language for language, odds in first.values() if odds >= SURE}))
    return {
        name: language if odds >= SURE else model.classify(texts[name])[0]
        for name, (language, odds) in first.items()
    }


@pytest.mark.parametrize("in_step", [1, 10_000])
@pytest.mark.parametrize("at_once", [64, 4096])
def test_languages_are_those_of_the_library(
    texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, in_step: int, at_once: int
) -> None:
    monkeypatch.setattr(languages, "IN_STEP", in_step)
    monkeypatch.setattr(languages, "TEXTS_AT_ONCE", at_once)
    monkeypatch.setattr(languages, "LETTERS_AT_ONCE", 8 * at_once)
    assert told_languages(texts) == of_the_library(texts)


def test_texts_are_read_in_step_if_many_and_alone_if_long() -> None:
    lengths = [2, 9, 5_000_000, 4]
    blocks = list(languages._blocks([b"a" * length for length in lengths]))
    assert blocks == [[2], [1, 3, 0]]


def test_short_texts_are_in_a_known_language() -> None:
    assert told_languages({"a": "ok"}, ["pt-BR"]) == {"a": "pt"}
    assert told_languages({"a": "1"}) == {"a": NO_LANGUAGE}
    assert told_languages({}, ["en"]) == {}


@pytest.mark.parametrize(
    ("language", "can"), [("en", True), ("pt-BR", True), ("eng", False), (NO_LANGUAGE, False)]
)
def test_codes_that_the_model_does_not_know_cannot_be_told(language: str, can: bool) -> None:
    assert can_be_told(language) is can
