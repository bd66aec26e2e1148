"""Texts of which some may be nearly the same as another, found without comparing all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz

KINDS = 16
"""Kinds of characters that are counted: more tell more texts apart, and take longer."""


class Likeness:
    """Texts to which others are compared.

    Two texts of n and m characters that are alike to p percent differ by at most `(1 - p) (n + m)`
    characters that are added or left out. Each of these changes one count of a kind of characters
    by one. So only texts of close lengths and close counts are compared, and none is missed.

    Args:
        least: likeness in percent from which two texts count as one (`rapidfuzz.fuzz.ratio`).
        texts: the first texts.
    """

    def __init__(self, least: float, texts: Iterable[str] = ()) -> None:
        self._least = least
        self._texts: dict[int, list[str]] = {}
        """Length -> the texts of that length."""
        self._counts: dict[int, NDArray[np.int32]] = {}
        """Length -> the counts of each of these texts `[n, KINDS]`, with room for more."""
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Compare later texts with this one, too."""
        texts = self._texts.setdefault(len(text), [])
        counts = self._counts.get(len(text), np.zeros((1, KINDS), np.int32))
        if len(texts) == len(counts):
            counts = np.concatenate([counts, np.zeros_like(counts)])
        counts[len(texts)] = _counts_of(text)
        self._counts[len(text)] = counts
        texts.append(text)

    def has_near(self, text: str) -> bool:
        """Return whether one of the texts is so alike."""
        share = 1 - self._least / 100
        own = _counts_of(text)
        # From |n - m| <= share (n + m).
        shortest = math.ceil(len(text) * (1 - share) / (1 + share) - 1e-9)
        longest = math.floor(len(text) * (1 + share) / (1 - share) + 1e-9)
        for length in range(shortest, longest + 1):
            texts = self._texts.get(length, [])
            if not texts:
                continue
            apart = np.abs(self._counts[length][: len(texts)] - own).sum(1)
            close = np.flatnonzero(apart <= share * (len(text) + length) + 1e-9)
            if any(fuzz.ratio(text, texts[k], score_cutoff=self._least) for k in close.tolist()):
                return True
        return False


def _counts_of(text: str) -> NDArray[np.int32]:
    """Return how many characters of each kind a text has [KINDS]."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.bincount(codes % KINDS, minlength=KINDS).astype(np.int32)
