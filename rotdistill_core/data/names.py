"""Names that a text must not hold: whether it speaks of something, in whatever spelling.

Lessons must not be about what is held out. A held-out topic is known by its own name, and by what
its question calls it, which may be the name in another language.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

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
        # A name may go on: `Brandenburg` is in `Brandenburger`. It never begins inside a word,
        # except in scripts without blanks.
        unspaced = {form for form in self.forms if UNSPACED.search(form)}
        self._after_blanks = _Forms({*self.forms} - unspaced)
        self._anywhere = _Forms(unspaced)

    def find(self, text: str) -> str:
        """Return the first of the names in a text, in its compared form; empty if none is."""
        if not self.forms:
            return ""
        text = folded(text)
        begins_word = True
        for place, character in enumerate(text):
            found = begins_word and self._after_blanks.at(text, place)
            found = found or self._anywhere.at(text, place)
            if found:
                return found
            begins_word = character == " "
        return ""


class _Forms:
    """Forms of names, to be found at a place of a text in a time that many names do not change.

    Args:
        forms: the forms, none of them empty.
    """

    def __init__(self, forms: Iterable[str]) -> None:
        self._forms = frozenset(forms)
        lengths: dict[str, set[int]] = {}
        for form in self._forms:
            lengths.setdefault(form[0], set()).add(len(form))
        self._lengths = {first: sorted(sizes) for first, sizes in lengths.items()}
        """First character of forms -> their lengths."""

    def at(self, text: str, place: int) -> str:
        """Return the shortest form that begins at a place of a text; empty if none does."""
        return next(self.all_at(text, place), "")

    def all_at(self, text: str, place: int) -> Iterator[str]:
        """Yield the forms that begin at a place of a text."""
        for length in self._lengths.get(text[place], ()):
            if (form := text[place : place + length]) in self._forms:
                yield form


def names_in(subjects: Iterable[tuple[str, str]], known: Iterable[str]) -> set[str]:
    """Return the names by which the subjects of conversations may be called.

    These are its topic, the words of the topic that no known text has, and what looks like a name
    in its question and is in no known text: words in upper case (of scripts without cases: longer
    words), and pieces of scripts without blanks.

    Args:
        subjects: question of each conversation, and what it is about; that may be empty.
        known: texts that speak of other things.
    """
    asked = list(subjects)
    maybe = {name for question, topic in asked for name in _maybe_names(question, topic)}
    forms = {name: folded(name) for name in maybe}
    speak = _spoken_of({*forms.values()} - {""}, known)
    new = {name for name, form in forms.items() if form and form not in speak}
    return {topic for _, topic in asked if topic} | new


def _maybe_names(question: str, topic: str) -> Iterator[str]:
    """Yield what may be a name of a conversation's subject, if no other text has it."""
    yield from (word for word in WORD.findall(topic) if len(word) >= LEAST_LETTERS)
    for run in UNSPACED.findall(question):
        pieces = (run[k : k + PIECE] for k in range(len(run) - PIECE + 1))
        yield from (piece for piece in pieces if len(GRAMMAR.findall(piece)) < 2)
    yield from _runs_of_names(UNSPACED.sub(" ", question))


def _spoken_of(forms: Iterable[str], texts: Iterable[str]) -> set[str]:
    """Return those of some forms that a text has, where `Names` would find them.

    Each text is read once, whatever the number of forms: only those are looked for in it that begin
    with one of its words, or, in scripts without blanks, with two of its characters.
    """
    forms = set(forms)
    unspaced = {form for form in forms if UNSPACED.search(form)}
    words = _Forms(form for form in forms - unspaced if " " not in form)
    longer = _grouped(forms - unspaced, lambda form: form.partition(" ")[0])
    pieces = _grouped(unspaced, lambda form: form[:2])
    found: set[str] = set()
    seen: set[str] = set()
    for text in map(folded, texts):
        own = {*text.split()}
        for word in own - seen:
            found.update(words.all_at(word, 0))
        seen |= own
        padded = f" {text}"
        for word in own & longer.keys():
            found.update(form for form in longer[word] if f" {form}" in padded)
        if pieces and UNSPACED.search(text):
            for piece in ({*text} | {*map("".join, pairwise(text))}) & pieces.keys():
                found.update(form for form in pieces[piece] if form in text)
    return found


def _grouped(forms: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for form in forms:
        groups.setdefault(key(form), []).append(form)
    return groups


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
