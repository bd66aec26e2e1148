"""What the engine of a recipe will be asked, and what it says of that before anything is computed.

An engine class may have a member `outlook`; see `HasOutlook`. A plan takes an engine without one
for the teacher itself, answering here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from rotdistill_core.data.conversations import Conversation
from rotdistill_core.data.lessons import LessonTexts, candidates, domain_of
from rotdistill_core.data.splits import Split
from rotdistill_core.data.vocabularies import have_vocabularies, tokenizer_of
from rotdistill_core.planning.chats import Chats
from rotdistill_core.planning.cost import Cost, CostContext
from rotdistill_core.recipe.document import Recipe


class Question(NamedTuple):
    """A prompt, as far as a plan knows it."""

    messages: tuple[Mapping[str, str], ...] = ()
    """The conversation; none where the teacher proposes something, which no plan can know."""
    prompt: str = ""
    """The conversation as the chat template writes it; empty where the teacher is not here."""
    tokens: tuple[int, ...] = ()
    """The same in tokens of the teacher."""


@dataclass(frozen=True)
class Questions:
    """What an engine will be asked in one series of answers."""

    count: int
    """Number of prompts."""
    tokens: int
    """Largest number of tokens of all answers together."""
    _make: Callable[[], dict[str, Question]] = field(repr=False)

    @cached_property
    def by_name(self) -> Mapping[str, Question]:
        """The prompts by name. It takes time to write them, and most engines need none."""
        return self._make()


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What an engine says of questions before it is asked."""

    cost: Cost
    """What its answers take on this machine."""
    note: str
    """Who answers, and what is not in the cost; a phrase."""
    missing: tuple[str, ...] = ()
    """Names of questions that it cannot answer."""


@runtime_checkable
class HasOutlook(Protocol):
    """An engine that knows what its answers cost, or which it cannot give."""

    def outlook(self, context: CostContext, questions: Questions, folder: Path) -> Outlook:
        """Return what answers to questions take here. No weight is loaded for it.

        Args:
            context: the models and texts.
            questions: what is asked.
            folder: that of the recipe, for paths in options.

        Raises:
            RotdistillError: as the engine would later, if it cannot work.
        """


@dataclass(frozen=True, kw_only=True)
class Asking:
    """All that the teacher, or an engine in its name, is asked in a run."""

    recipe: Recipe
    conversations: Sequence[Conversation]
    style: str
    """The system prompt."""
    lesson_texts: LessonTexts
    chats: Chats | None
    """How conversations are written; None where only transformers can tell."""
    teacher: Path | None
    """The teacher's folder; None where it is not here."""
    context: CostContext

    def answers(self) -> Questions:
        """Return the questions of the samples that have no answer."""
        texts = self.context.texts
        return Questions(texts.questions_asked, texts.answer_tokens, self._unanswered)

    def lessons(self) -> Questions:
        """Return what is asked for lessons, as many candidates as there are to be lessons."""
        texts = self.context.texts
        return Questions(texts.lesson_prompts, texts.lesson_tokens, self._candidates)

    def _unanswered(self) -> dict[str, Question]:
        asked = [
            each
            for each in self.conversations
            if each.answer is None and not each.split.outside_domain
        ]
        return self._written({each.id: each for each in asked})

    def _candidates(self) -> dict[str, Question]:
        lessons = self.recipe.lessons
        domain = domain_of(self.conversations, lessons, self.lesson_texts)
        plain = not self.chats or self.chats.teacher is self.chats.student
        tried = list(islice(candidates(domain, lessons, self.recipe.seed, plain), lessons.count))
        asked = {
            each.id: Conversation(each.id, each.language, Split.FIT, each.question, None)
            for each in tried
            if each.question
        }
        written = self._written(asked)
        return {each.id: written.get(each.id, Question()) for each in tried}

    def _written(self, asked: Mapping[str, Conversation]) -> dict[str, Question]:
        """Return conversations as prompts, as far as the teacher's files are here."""
        if not self.chats or not self.teacher or not asked:
            return dict.fromkeys(asked, Question())
        chat = self.chats.teacher
        messages = [tuple(chat.chat_of(each, self.style)) for each in asked.values()]
        prompts = chat.prompts(messages)
        tokens: list[tuple[int, ...]] = [()] * len(prompts)
        if have_vocabularies(self.teacher):
            tokenizer = tokenizer_of(self.teacher)
            encoded = tokenizer.encode_batch(prompts, add_special_tokens=False)
            tokens = [tuple(each.ids) for each in encoded]
        return dict(zip(asked, map(Question, messages, prompts, tokens), strict=True))
