"""Which lessons are let in: none about what is held out, none twice, none that is no question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum

from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.lessons import Candidate, LessonKind
from rotdistill_core.data.likeness import Likeness
from rotdistill_core.data.names import Names, folded, names_in
from rotdistill_core.data.splits import Split
from rotdistill_core.data.text_files import foreign_characters

NEAR = 90.0
"""Likeness of two questions, in percent, from which they count as one (`rapidfuzz.fuzz.ratio`)."""
LONGEST_QUESTION = 300
"""Characters of a question that the teacher may propose."""
LEAST_LETTERS = 6
"""Letters of a question or text that the teacher writes; of scripts without blanks, characters."""
FEW = 3
"""Dropped lessons that are kept as examples, for each reason."""


MARKED = 0.9
"""Share of the questions of a language with a question mark from which proposed ones need one."""
QUESTION_MARKS = "?\uff1f\u061f\u055e\u037e"
GREEK_MARK = ";"
"""The question mark of Greek; elsewhere it asks nothing."""


class Reason(StrEnum):
    """Why a lesson is dropped."""

    NO_QUESTION = "the teacher wrote no question of one line"
    NO_MARK = "it has no question mark, as the questions of the index have"
    OTHER_LANGUAGE = "the question is in another language"
    HELDOUT_QUESTION = "the question names a held-out topic"
    HELDOUT_ANSWER = "the answer names a held-out topic"
    VALIDATION = "the question names a topic that options are chosen on"
    REPEATED = "the question was asked before"
    NEAR = "nearly the same was written before"
    NO_ROOM = "the question leaves no room for an answer (samples.max_tokens)"
    EMPTY = "the answer is empty"


def _asked(conversation: Conversation) -> str:
    """Return all turns before the answer: an earlier one may name what the question is about."""
    return "\n".join(turn.content for turn in conversation.turns)


def one_line(text: str) -> str:
    """Return the question in what the teacher wrote as a user's turn: its first line, if it is one.

    Empty where that is too short or too long, or holds characters that no text has.
    """
    first, *_ = [line.strip() for line in text.strip().split("\n")]
    letters = sum(c.isalnum() for c in first)
    is_fine = letters >= LEAST_LETTERS and len(first) <= LONGEST_QUESTION
    return first if is_fine and not any(foreign_characters(first)) else ""


class Gate:
    """Lets in lessons that may be fitted on, and counts the others.

    Args:
        heldout: names of held-out topics, which no lesson has in question or answer.
        others: names of topics that options are chosen on, which no question is about.
        taken: questions and texts that no lesson repeats.
        marked: languages in which proposed questions need a question mark.
    """

    def __init__(
        self,
        heldout: Names,
        others: Names,
        taken: Iterable[str],
        marked: Iterable[str] = (),
    ) -> None:
        self.heldout = heldout
        self.others = others
        self.marked = frozenset(marked)
        self.dropped: Counter[Reason] = Counter()
        """Reason -> candidates that were dropped for it."""
        self.examples: dict[Reason, list[str]] = {}
        """Reason -> the first texts that were dropped for it."""
        self._seen = {folded(text) for text in taken}
        self._alike = Likeness(NEAR, self._seen)

    @classmethod
    def of(cls, conversations: Sequence[Conversation], forms: Iterable[str]) -> Gate:
        """Return the gate of a run.

        Args:
            conversations: all of its texts.
            forms: of questions, in the languages at hand.
        """
        known = [
            f"{each.topic} {each.words}"
            for each in conversations
            if each.split in (Split.FIT, Split.VALIDATION)
        ]
        known += forms
        heldout = [each for each in conversations if each.split == Split.HELDOUT]
        names = names_in(((_asked(each), each.topic) for each in heldout), known)
        validation = {each.topic for each in conversations if each.split == Split.VALIDATION}
        taken = (text for each in conversations for text in (each.question, each.answer) if text)
        return cls(Names(names), Names(validation), taken, _marked_languages(conversations))

    def admits(self, candidate: Candidate, question: str) -> bool:
        """Return whether a question may be asked; from then on it counts as asked.

        Args:
            candidate: where it comes from.
            question: the question, or the plain text.
        """
        reason = self._reason(candidate, question)
        if reason:
            self.drop(reason, question)
            return False
        form = folded(question)
        if form not in self._seen:
            self._seen.add(form)
            self._alike.add(form)
        return True

    def admits_answer(self, question: str, answer: str) -> bool:
        """Return whether an answer may be fitted on."""
        if not answer.strip():
            self.drop(Reason.EMPTY, question)
        elif name := self.heldout.find(answer):
            self.drop(Reason.HELDOUT_ANSWER, f"{question} ({name})")
        else:
            return True
        return False

    def drop(self, reason: Reason, text: str) -> None:
        """Count a candidate that is dropped."""
        self.dropped[reason] += 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < FEW:
            kept.append(text)

    def _reason(self, candidate: Candidate, question: str) -> Reason | None:
        form = folded(question)
        if sum(c.isalnum() for c in form) < LEAST_LETTERS and not candidate.question:
            return Reason.NO_QUESTION
        if self.heldout.find(question):
            return Reason.HELDOUT_QUESTION
        if candidate.kind == LessonKind.DOMAIN and self.others.find(question):
            return Reason.VALIDATION
        if form in self._seen:
            return Reason.REPEATED
        # Forms with another topic in them are alike on purpose.
        if not candidate.question and self._alike.has_near(form):
            return Reason.NEAR
        return Reason.NO_MARK if self._lacks_mark(candidate, question) else None

    def _lacks_mark(self, candidate: Candidate, question: str) -> bool:
        is_proposed = candidate.kind == LessonKind.DOMAIN and not candidate.question
        needs_one = is_proposed and candidate.language in self.marked
        return needs_one and not _has_mark(question, candidate.language)


def _has_mark(question: str, language: str) -> bool:
    is_greek = language.partition("-")[0] == "el"
    return any(c in QUESTION_MARKS or (is_greek and c == GREEK_MARK) for c in question)


def _marked_languages(conversations: Sequence[Conversation]) -> set[str]:
    """Return the languages in which nearly all questions to fit on have a question mark."""
    counts: Counter[str] = Counter()
    marked: Counter[str] = Counter()
    for each in conversations:
        if each.split == Split.FIT and each.question:
            counts[each.language] += 1
            marked[each.language] += _has_mark(each.question, each.language)
    return {language for language, count in counts.items() if marked[language] >= MARKED * count}
