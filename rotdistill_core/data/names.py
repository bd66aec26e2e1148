"""Names that a text must not hold: whether it speaks of something, in whatever spelling.

Lessons must not be about what is held out. A held-out topic is known by its own name, and by what
its question calls it, which may be the name in another language.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property

from rotdistill_core.data.text_files import comparable

WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
UNSPACED = re.compile(
    r"[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1780-\u17ff]+"
)
"""Runs of scripts that are written without blanks: Han, kana, Thai, Lao, Khmer."""
PIECE = 3
"""Characters of a piece of such a run: fewer are words of the language more often than names."""
GRAMMAR = re.compile(r"[\u3040-\u309f]")
"""Hiragana: mostly endings and particles, so at most one of a piece's characters is of them."""
LEAST_LETTERS = 4
"""Letters of a word that is taken for a name without an upper case."""


def folded(text: str) -> str:
    """Return the form in which spellings of one name are equal, accents and hyphens included.

    Letter case, accents, blanks and punctuation make no difference: `Sagrada Família` and
    `sagrada-familia` are one name.
    """
    parts = unicodedata.normalize("NFKD", comparable(text))
    letters = "".join(c for c in parts if not unicodedata.combining(c))
    plain = unicodedata.normalize("NFC", letters)
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split())


class Names:
    """Names by which texts are refused.

    Args:
        names: spellings, each at least one letter or digit.
    """

    def __init__(self, names: Iterable[str]) -> None:
        forms = {folded(name) for name in names}
        self.forms: tuple[str, ...] = tuple(sorted(forms - {""}))
        """The names as they are compared."""

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # A name may go on: `Brandenburg` is in `Brandenburger`. It never begins inside a word,
        # except in scripts without blanks.
        spaced = [re.escape(form) for form in self.forms if not UNSPACED.search(form)]
        unspaced = [re.escape(form) for form in self.forms if UNSPACED.search(form)]
        return re.compile("|".join([*(rf"(?<!\w){form}" for form in spaced), *unspaced]))

    def find(self, text: str) -> str:
        """Return the first of the names in a text, in its compared form; empty if none is."""
        found = self._pattern.search(folded(text)) if self.forms else None
        return found[0] if found else ""


def names_in(question: str, topic: str, known: Iterable[str]) -> Iterator[str]:
    """Yield the names by which a conversation's subject may be called.

    These are its topic, the words of the topic that no known text has, and what looks like a name
    in its question and is in no known text: words in upper case (of scripts without cases: longer
    words), and pieces of scripts without blanks.

    Args:
        question: the question.
        topic: what it is about; may be empty.
        known: texts that speak of other things.
    """
    others = f" {' '.join(map(folded, known))} "

    def is_new(name: str) -> bool:
        form = folded(name)
        if UNSPACED.search(form):
            return form not in others
        return bool(form) and f" {form}" not in others

    if topic:
        yield topic
        yield from (w for w in WORD.findall(topic) if len(w) >= LEAST_LETTERS and is_new(w))
    for run in UNSPACED.findall(question):
        pieces = (run[k : k + PIECE] for k in range(len(run) - PIECE + 1))
        yield from (p for p in pieces if len(GRAMMAR.findall(p)) < 2 and is_new(p))
    yield from (run for run in _runs_of_names(UNSPACED.sub(" ", question)) if is_new(run))


def _runs_of_names(question: str) -> Iterator[str]:
    """Yield the runs of words in upper case (`Machu Picchu`), and long words of scripts without."""
    run: list[str] = []
    end = 0
    for match in WORD.finditer(question):
        word = match[0]
        is_upper, has_case = word[0].isupper(), word[0].lower() != word[0].upper()
        if run and not (is_upper and not question[end : match.start()].strip()):
            yield " ".join(run)
            run = []
        if is_upper:
            run.append(word)
        elif not has_case and word[0].isalpha() and len(word) >= LEAST_LETTERS:
            yield word
        end = match.end()
    if run:
        yield " ".join(run)
