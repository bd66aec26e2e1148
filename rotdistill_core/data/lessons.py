"""Lessons: which questions the teacher is asked on top of the samples, and which are refused.

Candidates come in one fixed order, whatever the count: the first lessons of a longer list are those
of a shorter one, so a run with more lessons finds what a run with fewer has made. Languages and the
share of general lessons are balanced in every beginning of that order.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import NamedTuple

from rotdistill_core.data.conversations import LESSON, Conversation
from rotdistill_core.data.drafts import LANGUAGE
from rotdistill_core.data.languages import NO_LANGUAGE
from rotdistill_core.data.names import folded
from rotdistill_core.data.splits import Split
from rotdistill_core.data.text_files import (
    LINE_END,
    NotUtf8Error,
    decode_utf8,
    foreign_characters,
)
from rotdistill_core.errors import RecipeError
from rotdistill_core.recipe.document import Lessons, Recipe
from rotdistill_core.store.plain import read_bytes

SLOT = "{topic}"
"""What a form has in place of a topic."""
FORM_COLUMNS = ("language", "form")
TOPIC_COLUMNS = ("topic", "language")
TRIES = 4
"""Largest number of candidates that are tried for each lesson that is asked for."""
LATIN = "LATIN"
"""First word of the Unicode names of Latin letters."""
EXAMPLE_TURNS = 2
"""Questions of the index that the teacher reads before it proposes one."""
SORTED_PAIRS = 200_000
"""Pairs of form and topic that are all made and sorted. There is one pair for each two texts, so
more of them come in an order that needs no list."""
WINDOW = 1_000
"""Questions of which the examples for one proposal are chosen."""
SHUFFLE_ROUNDS = 4
"""Rounds of the Feistel network; four make it as good as chance (Luby and Rackoff, 1988)."""


class LessonKind(StrEnum):
    """What a lesson is for."""

    DOMAIN = "domain"
    """A question of the domain, answered under the system prompt."""
    GENERAL = "general"
    """A question outside the domain, proposed and answered without the system prompt."""
    TEXT = "text"
    """A plain text outside the domain, which the teacher writes from one token on."""


@dataclass(frozen=True)
class Candidate:
    """A lesson that may be tried."""

    number: int
    """Place in the order of candidates, from 0."""
    kind: LessonKind
    language: str
    question: str = ""
    """Empty where the teacher proposes it."""
    topic: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    """Questions with their answers, which the teacher reads before it proposes one."""

    @property
    def id(self) -> str:
        """The id of its text."""
        return f"{self.number:06d}{LESSON}"


class LessonTexts(NamedTuple):
    """The files that a recipe names for its lessons."""

    forms: tuple[tuple[str, str], ...] = ()
    """Pairs of language and form, a question with `SLOT` in place of its topic."""
    topics: tuple[tuple[str, str], ...] = ()
    """Pairs of language and topic; the language is empty where a topic is for all of them."""


NO_LESSON_TEXTS = LessonTexts()
"""Those of a recipe that names none."""


def read_lesson_texts(lessons: Lessons, base: Path) -> LessonTexts:
    """Read the forms and topics that a recipe names for its lessons.

    Args:
        lessons: the recipe's [lessons].
        base: folder of the recipe, to which names are relative.

    Raises:
        RecipeError: naming file, line and column of everything that is wrong.
    """
    problems: list[str] = []
    forms = _rows(base / lessons.forms, "forms", FORM_COLUMNS, problems) if lessons.forms else []
    topics = (
        _rows(base / lessons.topics, "topics", TOPIC_COLUMNS, problems) if lessons.topics else []
    )
    for where, cells in forms:
        if not LANGUAGE.fullmatch(cells[0]):
            problems.append(f"{where}: language: must be a code of ISO 639 such as en.")
        if cells[1].count(SLOT) != 1:
            problems.append(
                f"{where}: form: must hold {SLOT} once, where the name of a topic is put."
            )
    for where, cells in topics:
        if cells[1] and not LANGUAGE.fullmatch(cells[1]):
            problems.append(f"{where}: language: must be a code of ISO 639 such as en, or empty.")
        if not folded(cells[0]):
            problems.append(f"{where}: topic: {cells[0]} has no letter or digit.")
    if problems:
        raise RecipeError(*problems)
    return LessonTexts(
        tuple((_tag(cells[0]), cells[1]) for _, cells in forms),
        tuple((_tag(cells[1]), cells[0]) for _, cells in topics),
    )


def checked_lesson_texts(
    recipe: Recipe, base: Path, conversations: Sequence[Conversation]
) -> LessonTexts:
    """Return the files that a recipe names for its lessons, after trying to make questions.

    Without lessons no file is read.

    Raises:
        RecipeError: a file is wrong, or no question can be made.
    """
    if not recipe.lessons.count:
        return NO_LESSON_TEXTS
    texts = read_lesson_texts(recipe.lessons, base)
    available(domain_of(conversations, recipe.lessons, texts), recipe.lessons)
    return texts


def _tag(language: str) -> str:
    """Return a language tag as tables of texts have it: the code in lower case."""
    code, dash, subtags = language.partition("-")
    return f"{code.lower()}{dash}{subtags}"


def _rows(
    path: Path, option: str, columns: Sequence[str], problems: list[str]
) -> list[tuple[str, list[str]]]:
    """Return the rows of a table, each with its file and line.

    A first line with other words is a row already. The last column of topics may be missing.
    """
    try:
        text = decode_utf8(read_bytes(path))
    except NotUtf8Error as error:
        problems.append(f"{path}: {error}. lessons.{option} names it.")
        return []
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}. lessons.{option} names it.")
        return []
    rows = []
    for number, line in enumerate(LINE_END.split(text), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if not any(cells) or (number == 1 and cells == list(columns[: len(cells)])):
            continue
        where = f"{path}: line {number}"
        if columns == TOPIC_COLUMNS and len(cells) == 1:
            cells.append("")
        if len(cells) != len(columns) or not cells[0]:
            problems.append(
                f"{where}: needs the columns {', '.join(columns)}, with a tab between them."
            )
            continue
        foreign = sorted(set(foreign_characters("".join(cells))))
        if foreign:
            problems.append(
                f"{where}: holds {', '.join(foreign)}, which is no character of a text; remove it."
            )
            continue
        rows.append((where, cells))
    return rows


@dataclass(frozen=True)
class Domain:
    """What the samples say of the domain: languages, topics, forms, questions."""

    languages: dict[str, int]
    """Language -> questions to fit on."""
    examples: dict[str, tuple[tuple[str, str], ...]]
    """Language -> the questions to fit on, with their answers."""
    topics: tuple[tuple[str, str], ...]
    """Pairs of language and topic. Each topic is asked in every language whose script it fits."""
    forms: dict[str, tuple[tuple[bool, str], ...]]
    """Language -> its forms, each with whether it was derived from a question."""
    scripts: dict[str, frozenset[str]]
    """Language -> scripts of its questions."""

    @cached_property
    def _topic_scripts(self) -> list[frozenset[str]]:
        """Scripts of each topic."""
        return [_scripts(topic) for _, topic in self.topics]

    def topics_in(self, language: str) -> tuple[list[str], list[str]]:
        """Return the different topics that are asked in a language: its own, and borrowed ones.

        Topics of no language are its own. It borrows those that its readers can read: Latin letters
        are read everywhere.
        """
        own = dict.fromkeys(topic for origin, topic in self.topics if origin in ("", language))
        readable = self.scripts[language] | {LATIN}
        borrowed = dict.fromkeys(
            topic
            for (_, topic), scripts in zip(self.topics, self._topic_scripts, strict=True)
            if topic not in own and scripts <= readable
        )
        return list(own), list(borrowed)


def domain_of(
    conversations: Sequence[Conversation], lessons: Lessons, texts: LessonTexts
) -> Domain:
    """Return what lessons are drawn from: the conversations to fit on, and the files for lessons.

    Topics of conversations that are not fitted are left out, so that options are chosen, and
    scores measured, on topics that no lesson has.
    """
    fit = [each for each in conversations if each.split == Split.FIT and each.question]
    questions: dict[str, dict[str, str]] = {}
    for each in fit:
        questions.setdefault(each.language, {}).setdefault(each.question, each.answer or "")
    own = [(each.language, each.topic) for each in fit if each.topic]
    forms: dict[str, list[tuple[bool, str]]] = {}
    for language, form in texts.forms:
        forms.setdefault(language, []).append((False, form))
    if lessons.source == "questions":
        for each in fit:
            if each.topic and each.question.count(each.topic) == 1:
                form = each.question.replace(each.topic, SLOT)
                forms.setdefault(each.language, []).append((True, form))
    return Domain(
        languages={language: len(asked) for language, asked in questions.items()},
        examples={
            language: tuple(each for each in asked.items() if each[1])
            for language, asked in questions.items()
        },
        topics=tuple(dict.fromkeys(texts.topics or own)),
        forms={language: tuple(dict.fromkeys(each)) for language, each in forms.items()},
        scripts={language: _scripts("".join(asked)) for language, asked in questions.items()},
    )


def candidates(
    domain: Domain, lessons: Lessons, seed: int, texts: bool = True
) -> Iterator[Candidate]:
    """Yield the candidates in their order; without end, unless all questions are used up.

    Args:
        domain: what they are drawn from.
        lessons: the recipe's [lessons].
        seed: the recipe's.
        texts: whether plain texts are of use; otherwise all general lessons are questions.
    """
    outside = LessonKind.GENERAL
    if texts and lessons.general_from == "texts":
        outside = LessonKind.TEXT
    draw = _proposed if lessons.source == "teacher" else _asked
    asked = {language: iter(draw(domain, language, seed)) for language in domain.languages}
    balance = _Balance(domain.languages)
    for number, is_general in enumerate(_general_ones(lessons.general)):
        if is_general:
            yield Candidate(number, outside, NO_LANGUAGE)
            continue
        found = balance.draw(asked)
        if found is None:
            return
        language, (question, topic, examples) = found
        yield Candidate(number, LessonKind.DOMAIN, language, question, topic, examples)


def available(domain: Domain, lessons: Lessons) -> int:
    """Return how many candidates there are, at most as many as are asked for.

    Nothing is drawn: forms times topics are far more than texts.

    Raises:
        RecipeError: no question of the domain can be made.
    """
    left = _questions(domain, lessons, lessons.count)
    if lessons.count and not left:
        raise RecipeError(
            f'lessons: from = "{lessons.source}" makes no question: the texts to fit on have '
            f"{len(domain.topics)} topics, and {sum(map(len, domain.forms.values()))} forms are in "
            f"their languages ({', '.join(domain.languages)}). Name forms as lessons.forms and "
            'topics as lessons.topics, or write from = "teacher".'
        )
    for number, is_general in zip(
        range(lessons.count), _general_ones(lessons.general), strict=False
    ):
        if not is_general:
            if not left:
                return number
            left -= 1
    return lessons.count


def _questions(domain: Domain, lessons: Lessons, enough: int) -> float:
    """Return how many questions of the domain there are; without end where the teacher proposes.

    Languages are left out once there are enough.
    """
    if lessons.source == "teacher":
        return math.inf if domain.languages else 0
    found = 0
    for language in domain.languages:
        if found >= enough:
            break
        forms = domain.forms.get(language, ())
        found += len(forms) * sum(map(len, domain.topics_in(language))) if forms else 0
    return found


def _general_ones(share: float) -> Iterator[bool]:
    """Yield whether each candidate is a general one; every beginning has the share."""
    general = 0
    for number in count(1):
        is_general = int(number * share) > general
        general += is_general
        yield is_general


def lesson_notes(
    recipe: Recipe, conversations: Sequence[Conversation], texts: LessonTexts
) -> list[str]:
    """Return that too few different questions can be made, if that is so."""
    lessons = recipe.lessons
    if not lessons.count:
        return []
    domain = domain_of(conversations, lessons, texts)
    found = available(domain, lessons)
    if found == lessons.count:
        return []
    return [
        f"lessons: {found} of the {lessons.count} that lessons.count asks for can be made at most: "
        f"{len(domain.topics)} topics and the forms of their languages make no more questions. "
        'Name more forms or topics, or take lessons.from = "teacher".'
    ]


_Drawn = tuple[str, str, tuple[tuple[str, str], ...]]
"""Question, topic, and examples."""


class _Balance:
    """Deals items of several languages so that every beginning has the shares of the whole."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = dict(weights)
        self._credit = dict.fromkeys(weights, 0)

    def draw(self, items: Mapping[str, Iterator[_Drawn]]) -> tuple[str, _Drawn] | None:
        """Return the next item and its language; None when no language has one left.

        A language that has none left leaves its share to the others.
        """
        while self._weights:
            for language, weight in self._weights.items():
                self._credit[language] += weight
            richest = max(self._weights, key=lambda language: self._credit[language])
            item = next(items[richest], None)
            if item is not None:
                self._credit[richest] -= sum(self._weights.values())
                return richest, item
            del self._weights[richest]
        return None


def _asked(domain: Domain, language: str, seed: int) -> Iterator[_Drawn]:
    """Yield the questions of a language, each group in hashed order.

    A topic is asked in its own language before it is asked in others: that is what users do, and a
    small teacher answers such questions best. Given forms come before derived ones.
    """
    for topics in domain.topics_in(language):
        for wanted in (False, True):
            forms = [form for derived, form in domain.forms.get(language, ()) if derived == wanted]
            for form, topic in _pairs(forms, topics, (seed, language)):
                yield form.replace(SLOT, topic), topic, ()


def _pairs(
    forms: Sequence[str], topics: Sequence[str], key: tuple[object, ...]
) -> Iterator[tuple[str, str]]:
    """Yield all pairs in an order that a hash decides: that of each pair, or that of its number.

    In the first order a further topic leaves the others where they are. It needs all pairs at once.
    """
    if len(forms) * len(topics) <= SORTED_PAIRS:
        pairs = [(form, topic) for form in forms for topic in topics]
        yield from sorted(pairs, key=lambda pair: _hash(*key, *pair))
        return
    for place in shuffled_places(len(forms) * len(topics), *key):
        form, topic = divmod(place, len(topics))
        yield forms[form], topics[topic]


def shuffled_places(size: int, *key: object) -> Iterator[int]:
    """Yield the numbers below `size`, each once, in an order that the key decides.

    A Feistel network permutes the numbers of an even count of bits, and those beyond the size are
    left out. So nothing is held in memory, and the first number costs no more than another.
    """
    half = (size.bit_length() + 1) // 2
    mask = (1 << half) - 1
    for number in range(1 << 2 * half):
        left, right = number >> half, number & mask
        for turn in range(SHUFFLE_ROUNDS):
            left, right = right, left ^ (int(_hash(*key, turn, right), 16) & mask)
        place = left << half | right
        if place < size:
            yield place


def _proposed(domain: Domain, language: str, seed: int) -> Iterator[_Drawn]:
    """Yield, without end, questions of the index that the teacher reads before it proposes one."""
    own = domain.examples[language]
    for number in count():
        shown = own
        if len(own) > WINDOW:
            first = int(_hash(seed, language, number), 16) % (len(own) - WINDOW + 1)
            shown = own[first : first + WINDOW]
        order = {
            _hash(seed, language, number, question): k for k, (question, _) in enumerate(shown)
        }
        yield "", "", tuple(shown[order[place]] for place in sorted(order)[:EXAMPLE_TURNS])


def _hash(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _scripts(text: str) -> frozenset[str]:
    """Return the scripts of the letters of a text, by the first word of their Unicode names."""
    if text.isascii():
        return frozenset({LATIN} if any(map(str.isalpha, text)) else ())
    return frozenset(unicodedata.name(c, "?").split()[0] for c in set(text) if c.isalpha())
