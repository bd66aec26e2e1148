"""Characters that no text has, and the form in which spellings of one text are equal."""

from __future__ import annotations

import sys
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from rotdistill_core.data.text_files import MARK, comparable, foreign_characters


def test_foreign_characters_are_controls_surrogates_and_byte_order_marks() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    expected = [c for c in every if unicodedata.category(c) in ("Cc", "Cs") or c == MARK]
    assert list(foreign_characters(every)) == [f"U+{ord(c):04X}" for c in expected]
    assert list(foreign_characters("a\tb\n\0", allowed="\t\n")) == ["U+0000"]


@given(st.text(st.characters() | st.sampled_from("\u200b\u00ad\u202e\t\n \u3000éÉßΣ")))
def test_the_comparable_form_has_no_characters_that_are_not_seen(text: str) -> None:
    form = comparable(text)
    assert not any(unicodedata.category(c) == "Cf" for c in form)
    assert comparable(form) == form
    assert comparable(f" {text.upper()}\u200b ") == comparable(text.upper())
