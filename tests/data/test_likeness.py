"""Texts that are nearly the same are found as by comparing all of them."""

from __future__ import annotations

import random

import pytest
from rapidfuzz import fuzz

from rotdistill_core.data.likeness import Likeness


@pytest.mark.parametrize("least", [75.0, 90.0, 100.0])
def test_the_same_texts_are_near_as_if_all_were_compared(least: float) -> None:
    draw = random.Random(0)
    alphabet = "abcdefgh \u59eb\u8def\u57ce"
    texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 40))) for _ in range(300)]
    alike = Likeness(least, texts)
    found = []
    for text in texts:
        places = [draw.randrange(len(text) + 1) for _ in range(draw.randint(0, 6))]
        other = "".join(c for k, c in enumerate(text) if k not in places) + draw.choice(["", "xy"])
        expected = any(fuzz.ratio(other, each) >= least for each in texts)
        assert alike.has_near(other) == expected, (other, text)
        found.append(expected)
    assert {True, False} == {*found}


def test_a_text_that_is_added_later_is_compared_too() -> None:
    alike = Likeness(90.0)
    assert not alike.has_near("what is in the old town")
    alike.add("what is in the old town")
    assert alike.has_near("what is in the old towns")
    assert not alike.has_near("where is the harbour")
