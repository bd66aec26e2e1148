"""Lessons: more conversations and texts, which the teacher writes before anything is captured.

Candidates are tried block by block in one fixed order until enough are kept. What the teacher
writes for a block depends on the block alone, so a run with more lessons finds the blocks of a run
with fewer, and a killed run goes on where it was.

That a teacher proposes questions when it is given the beginning of a user's turn is from Xu et al.,
Magpie, arXiv:2406.08464; texts drawn from a random first token on are from Liu et al., LLM-QAT,
arXiv:2305.17888.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from rotdistill_core.data.chat import Message
from rotdistill_core.data.conversations import Conversation, Turn
from rotdistill_core.data.languages import NO_LANGUAGE, can_be_told, told_languages
from rotdistill_core.data.lesson_gate import Gate, Reason, one_line
from rotdistill_core.data.lessons import (
    TRIES,
    Candidate,
    LessonKind,
    candidates,
    domain_of,
)
from rotdistill_core.data.splits import Split
from rotdistill_core.data.tokenization import decode_answer, prompt_tokens, tokens_of
from rotdistill_core.errors import SetupError
from rotdistill_core.execution.context import RunContext
from rotdistill_core.execution.engines import connected_once, teacher_answers
from rotdistill_core.plugin.engine import Answer, Asked
from rotdistill_core.store.files import json_blocks
from rotdistill_core.store.hashing import digest
from rotdistill_core.store.layout import RunLayout

if TYPE_CHECKING:
    from rotdistill_core.forward.layerwise import Progress

LESSONS_PER_BLOCK = 128
"""Candidates that are tried together."""
PROPOSAL_TOKENS = 64
"""Longest question that the teacher proposes, in tokens."""
FREE = 1.0
"""Temperature of general texts."""
CALMER = 0.7
"""Temperature of questions that the teacher proposes. At 1 a model of 135 million parameters wrote
no question every other time."""
SHOWN_CHARACTERS = 80
"""Characters that are shown of a proposal which is no question."""
MARK = "@@question@@"
"""Stands where a user's turn begins, to find what a chat template writes before it."""
SHOWN = 10
"""Lessons that the report shows."""
Examples = tuple[tuple[str, str], ...]
"""Questions with their answers."""
SEEDS = 1 << 31
"""Seeds that every engine takes are below this."""


class Lesson(NamedTuple):
    """A lesson: its text, and the tokens that the teacher wrote."""

    conversation: Conversation
    tokens: list[int]
    """Of the answer; of a plain text all tokens."""


def write_lessons(run: RunContext, limit: int) -> list[Lesson]:
    """Return the lessons of a run; the teacher writes those that no run has.

    Args:
        run: the run.
        limit: tokens of a text to fit on; questions that leave no room for an answer are dropped.

    Raises:
        SetupError: the teacher cannot write them.
    """
    wanted = run.recipe.lessons.count
    if not wanted:
        return []
    started = time.monotonic()
    writer = _Writer(run, limit)
    lessons = writer.lessons()
    if writer.made:
        seconds = time.monotonic() - started
        run.log(f"  {'teacher':<12} {f'{len(lessons)} lessons':<16} {seconds:6.1f} s")
    if len(lessons) < wanted:
        run.log(
            f"lessons: the teacher wrote {len(lessons)} of the {wanted} that lessons.count asks "
            f"for. {writer.tried} candidates were tried, and {writer.dropped} dropped; "
            f"{RunLayout.LESSONS} in the run's folder says why. Name more forms or topics, or take "
            'lessons.from = "teacher".'
        )
    summary = writer.summary(lessons)
    run.output(digest(summary)).document(RunLayout.LESSONS, json_blocks(summary))
    return lessons


class _Writer:
    """Tries candidates until there are enough lessons.

    Args:
        run: the run.
        limit: tokens of a text to fit on.
    """

    def __init__(self, run: RunContext, limit: int) -> None:
        self.run = run
        self.limit = limit
        self.made = 0
        """Answers and proposals that were made now."""
        self.tried = 0
        """Candidates that were tried."""
        self._written = self._told = 0
        """Lessons of the blocks before, and the count that was told last."""
        self._connect = connected_once(run)
        self._heads: dict[tuple[LessonKind, Examples], str] = {}
        self._settings = run.recipe.lessons
        self._domain = domain_of(run.conversations, self._settings, run.lesson_texts)
        self._gate = Gate.of(run.conversations, [form for _, form in run.lesson_texts.forms])

    @property
    def dropped(self) -> int:
        """Candidates that were dropped."""
        return self._gate.dropped.total()

    def lessons(self) -> list[Lesson]:
        """Return the lessons, at most as many as are asked for."""
        wanted = self._settings.count
        # Plain texts are of no use to a student that reads other tokens.
        plain = self.run.pair.one_tokenizer
        waiting = candidates(self._domain, self._settings, self.run.recipe.seed, plain)
        waiting = islice(waiting, TRIES * wanted + LESSONS_PER_BLOCK)
        kept: list[Lesson] = []
        while len(kept) < wanted:
            missing = wanted - len(kept)
            block = list(islice(waiting, min(LESSONS_PER_BLOCK, missing)))
            if not block:
                break
            self.tried += len(block)
            kept += self._kept(block)
            self._written = len(kept)
            self._tell()
        return kept

    def _tell(self, more: int = 0) -> None:
        """Tell how many lessons there are; the count stands still where some are dropped.

        Args:
            more: answers of the block at hand.
        """
        self._told = max(self._told, self._written + more)
        self.run.progress(self._told, self._settings.count, "lessons are written")

    def summary(self, lessons: Sequence[Lesson]) -> dict[str, Any]:
        """Return what the run's folder and the report say of lessons, as JSON values."""
        by_kind: dict[str, int] = {}
        for lesson in lessons:
            kind = _kind_of(lesson.conversation)
            by_kind[kind] = by_kind.get(kind, 0) + 1
        step = max(len(lessons) // SHOWN, 1)
        tokenizer = self.run.pair.teacher.tokenizer
        return {
            "asked_for": self._settings.count,
            "written": len(lessons),
            "kinds": by_kind,
            "tried": self.tried,
            "dropped": {
                str(reason): {"count": count, "examples": self._gate.examples[reason]}
                for reason, count in self._gate.dropped.items()
            },
            "examples": [
                {
                    "id": lesson.conversation.id,
                    "language": lesson.conversation.language,
                    "question": lesson.conversation.question,
                    "answer": decode_answer(tokenizer, lesson.tokens),
                }
                for lesson in lessons[::step][:SHOWN]
            ],
        }

    def _kept(self, block: Sequence[Candidate]) -> list[Lesson]:
        """Return the lessons that candidates become."""
        tokenizer = self.run.pair.teacher.tokenizer
        proposed = self._proposed(block)
        texts: list[Lesson] = []
        asked: dict[str, Conversation] = {}
        questions = {
            each.id: each.question or self._question(proposed[each.id])
            for each in block
            if each.kind != LessonKind.TEXT
        }
        foreign = self._foreign(block, questions)
        for candidate in block:
            if candidate.kind == LessonKind.TEXT:
                texts += self._text(candidate, proposed[candidate.id])
                continue
            question = questions[candidate.id]
            if not question:
                text = decode_answer(tokenizer, proposed[candidate.id].tokens)
                shown = " ".join(text.split())[:SHOWN_CHARACTERS]
                self._gate.drop(Reason.NO_QUESTION, f"{candidate.language}: {shown}")
            elif candidate.id in foreign:
                self._gate.drop(Reason.OTHER_LANGUAGE, f"{candidate.language}: {question}")
            elif self._gate.admits(candidate, question):
                asked[candidate.id] = _conversation(candidate, question)
        answered = self._answered(asked)
        return sorted([*texts, *answered], key=lambda lesson: lesson.conversation.id)

    def _foreign(self, block: Sequence[Candidate], questions: Mapping[str, str]) -> set[str]:
        """Return the candidates whose proposed question is not in the language that was wanted."""
        wanted = {
            each.id: each.language.partition("-")[0]
            for each in block
            if each.kind == LessonKind.DOMAIN
            and not each.question
            and questions[each.id]
            and can_be_told(each.language)
        }
        if not wanted:
            return set()
        told = told_languages({name: questions[name] for name in wanted}, self._domain.languages)
        return {
            name for name, language in wanted.items() if told[name] not in (language, NO_LANGUAGE)
        }

    def _proposed(self, block: Sequence[Candidate]) -> dict[str, Answer]:
        """Return what the teacher proposes: questions, and plain texts."""
        self._learn_heads(block)
        prompts = {
            candidate.id: Asked(
                prompt=tuple(self._beginning(candidate)),
                max_tokens=self._proposal_tokens(candidate),
                temperature=FREE if candidate.kind == LessonKind.TEXT else CALMER,
                seed=self._seed(candidate.id, "proposed"),
            )
            for candidate in block
            if not candidate.question
        }
        return self._answers(
            prompts, f"lessons-proposed-{block[0].number:06d}", lambda *_: self._tell()
        )

    def _proposal_tokens(self, candidate: Candidate) -> int:
        if candidate.kind == LessonKind.TEXT:
            return self._settings.tokens
        return PROPOSAL_TOKENS

    def _beginning(self, candidate: Candidate) -> list[int]:
        """Return the tokens after which the teacher writes a question or a plain text."""
        tokenizer = self.run.pair.teacher.tokenizer
        if candidate.kind == LessonKind.TEXT:
            chance = random.Random(self._seed(candidate.id, "token"))  # noqa: S311  no secret
            return [*tokenizer("")["input_ids"], chance.choice(self._first_tokens)]
        return tokens_of(tokenizer, self._heads[candidate.kind, candidate.examples])

    def _learn_heads(self, block: Sequence[Candidate]) -> None:
        """Find what the chat template writes before a user's turn, after each set of examples.

        Without examples there is no system prompt either: the question is a general one.

        Raises:
            SetupError: the template does not write the user's turn as it is.
        """
        chat = self.run.chats.teacher
        new: dict[tuple[LessonKind, Examples], list[Message]] = {}
        for candidate in block:
            key = (candidate.kind, candidate.examples)
            is_asked = candidate.kind == LessonKind.TEXT or candidate.question
            if not is_asked and key not in self._heads:
                new[key] = self._chat_before(candidate)
        for key, text in zip(new, chat.render(list(new.values())), strict=True):
            head, found, _ = text.partition(MARK)
            if not found:
                raise SetupError(
                    f"{chat.source}: its chat template does not write a question as it is, so the "
                    'teacher cannot propose any. Set lessons.from = "questions" and '
                    "lessons.general = 0."
                )
            self._heads[key] = head

    def _chat_before(self, candidate: Candidate) -> list[Message]:
        """Return a chat that ends with the user's turn that the teacher is to write."""
        style = self.run.style if candidate.kind == LessonKind.DOMAIN else ""
        earlier = [
            turn
            for question, answer in candidate.examples
            for turn in (Turn("user", question), Turn("assistant", answer))
        ]
        return self.run.chats.teacher.messages(style, MARK, None, earlier)

    @cached_property
    def _first_tokens(self) -> list[int]:
        """The tokens that a plain text may begin with: those of whole characters."""
        tokenizer = self.run.pair.teacher.tokenizer
        special = set(tokenizer.all_special_ids)
        ids = [k for k in sorted(tokenizer.get_vocab().values()) if k not in special]
        texts = tokenizer.batch_decode([[k] for k in ids])
        return [k for k, text in zip(ids, texts, strict=True) if text and "\ufffd" not in text]

    def _question(self, proposal: Answer) -> str:
        """Return the question in what the teacher proposed; empty if there is none."""
        text = decode_answer(self.run.pair.teacher.tokenizer, proposal.tokens)
        if proposal.finish == "length" and "\n" not in text:
            return ""
        return one_line(text)

    def _text(self, candidate: Candidate, proposal: Answer) -> list[Lesson]:
        """Return the lesson that a plain text is; none if it is dropped."""
        tokenizer = self.run.pair.teacher.tokenizer
        written = list(proposal.tokens)
        if proposal.finish == "stop":
            written.pop()  # the token that ends an answer is part of no text
        tokens = [*self._beginning(candidate), *written]
        text = decode_answer(tokenizer, tokens)
        if not self._gate.admits(candidate, text):
            return []
        return [Lesson(_conversation(candidate, ""), tokens)]

    def _answered(self, asked: Mapping[str, Conversation]) -> list[Lesson]:
        """Return the lessons that questions become."""
        run = self.run
        tokenizer, chat = run.pair.teacher.tokenizer, run.chats.teacher
        prompts = prompt_tokens(tokenizer, run.style, asked.values(), chat) if asked else {}
        wanted = {}
        for name, each in asked.items():
            if len(prompts[name]) >= self.limit:
                self._gate.drop(Reason.NO_ROOM, each.question)
                continue
            wanted[name] = Asked(
                prompt=tuple(prompts[name]),
                max_tokens=self._settings.tokens,
                temperature=self._settings.temperature,
                seed=self._seed(name, "answer"),
                messages=tuple(chat.chat_of(each, run.style)),
            )
        first = min(asked, default="")
        answers = self._answers(
            wanted,
            f"lessons-answers-{first.partition('.')[0]}",
            lambda done, *_: self._tell(done),
        )
        return [
            Lesson(asked[name], list(answer.tokens))
            for name, answer in answers.items()
            if self._gate.admits_answer(
                asked[name].question, decode_answer(tokenizer, answer.tokens)
            )
        ]

    def _answers(
        self, asked: Mapping[str, Asked], series: str, progress: Progress
    ) -> dict[str, Answer]:
        """Return what the teacher writes after prompts, in their order."""
        if not asked:
            return {}
        kept = teacher_answers(self.run, asked, series, self._connect, progress)
        self.made += kept.made
        return {name: kept.answers[name] for name in asked}

    def _seed(self, name: str, purpose: str) -> int:
        return int(digest(self.run.recipe.seed, name, purpose), 16) % SEEDS


def _conversation(candidate: Candidate, question: str) -> Conversation:
    """Return the text of a lesson, which the teacher answers."""
    return Conversation(
        id=candidate.id,
        language=candidate.language,
        split=Split.FIT,
        question=question,
        answer=None,
        topic=candidate.topic,
        system="" if candidate.kind == LessonKind.GENERAL else None,
    )


def _kind_of(conversation: Conversation) -> str:
    if conversation.is_plain:
        return LessonKind.TEXT.value
    return LessonKind.DOMAIN.value if conversation.system is None else LessonKind.GENERAL.value
