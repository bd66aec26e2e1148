"""Characters that are not seen become escapes, and nothing else changes."""

from __future__ import annotations

import json
import math
import tomllib

import pytest

from rotdistill_core.characters import escaped_in_strings, visible, visible_json

UNSEEN = {
    "\x00": r"\x00",
    "\x07": r"\x07",
    "\r": r"\x0d",
    "\x1b": r"\x1b",
    "\x7f": r"\x7f",
    "\x9b": r"\x9b",
    "\x85": r"\x85",
    "\u202a": r"\u202a",
    "\u202e": r"\u202e",
    "\u2066": r"\u2066",
    "\u2069": r"\u2069",
    "\u200b": r"\u200b",
    "\u200f": r"\u200f",
    "\u2028": r"\u2028",
    "\ufeff": r"\ufeff",
    "\udcff": r"\udcff",
    "\U000e0041": r"\U000e0041",
}
SEEN = (
    "plain",
    "a\tb\nc",
    "[bold] \\x1b",
    "Ångström Å",
    "漢字 ひらがな",
    "مرحبا",
    "می\u200cخواهم",  # Persian is not written without the joiner
    "क\u094d\u200dष",
    "👩\u200d💻",
    "−½ λ ‖ ·",
)


@pytest.mark.parametrize(("character", "shown"), UNSEEN.items(), ids=list(UNSEEN.values()))
def test_what_is_not_seen_becomes_its_escape(character: str, shown: str) -> None:
    assert visible(f"a{character}b") == f"a{shown}b"
    assert visible(visible(character)) == shown


def test_all_controls_are_escaped_but_tab_and_line_end() -> None:
    controls = [chr(k) for k in (*range(32), *range(127, 160))]
    assert [c for c in controls if visible(c) == c] == ["\t", "\n"]


@pytest.mark.parametrize("text", SEEN)
def test_texts_of_all_scripts_stay(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize("text", [*UNSEEN, *SEEN])
def test_json_reads_back_equal_and_holds_nothing_unseen(text: str) -> None:
    shown = visible_json({text: [text]})
    assert json.loads(shown) == {text: [text]}
    assert visible(shown) == shown


def test_numbers_that_are_not_finite_are_text_in_json() -> None:
    shown = visible_json({"a": math.nan, "b": [math.inf, 1.5], "c": (-math.inf, None)})
    assert json.loads(shown) == {"a": "nan", "b": ["inf", 1.5], "c": ["-inf", None]}
    assert "NaN" not in shown


@pytest.mark.parametrize("text", [c for c in UNSEEN if c not in "\x00\x07\r\x1b\x7f\udcff"])
def test_toml_reads_back_equal_and_holds_nothing_unseen(text: str) -> None:
    shown = escaped_in_strings(f'key = "a{text}b"')
    assert tomllib.loads(shown) == {"key": f"a{text}b"}
    assert visible(shown) == shown
