"""Conversations: the texts of a run, whatever they are about and whatever file they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from rotdistill_core.data.splits import Split
from rotdistill_core.errors import SetupError
from rotdistill_core.store.hashing import digest

OWN_ANSWER = ".own"
"""Ending of the id of a conversation that the teacher answers once more, itself."""

LESSON = ".lesson"
"""Ending of the id of a lesson: a conversation or text that the teacher writes itself."""


CONTINUED = ".place"
"""Ending of the id of a text that continues the topic of a conversation."""


class Claim(NamedTuple):
    """A statement that an answer may make."""

    what: str
    """The statement, in English."""
    any: tuple[str, ...]
    """Phrases in the question's language; an answer with one of them makes the statement."""


class Turn(NamedTuple):
    """What one side says."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True)
class Conversation:
    """One text of the samples: turns up to a question, and its answer.

    Only the answer is learned and scored; the turns before it are its context. A plain text has no
    question: models read its answer as it is, without a chat template.
    """

    id: str
    language: str
    split: Split
    question: str
    """The last turn before the answer, by the user; empty for a plain text."""
    answer: str | None
    """The answer, or None where the teacher writes it."""
    topic: str = ""
    """What it is about, such as the name of a place; empty if nobody says."""
    earlier: tuple[Turn, ...] = ()
    """The turns before the question: user and assistant in turn, the user first."""
    system: str | None = None
    """Its own system prompt; None for that of the samples."""
    facts: tuple[Claim, ...] = ()
    """What a complete answer states; for evaluators."""
    falsehoods: tuple[Claim, ...] = ()
    """Likely errors of an answer; for evaluators."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain text, which no template writes."""
        return not self.question

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns before the answer, the question last; none of a plain text."""
        return () if self.is_plain else (*self.earlier, Turn("user", self.question))

    @property
    def words(self) -> str:
        """All that is said in it, turn by turn."""
        return "\n".join((*(turn.content for turn in self.turns), self.answer or ""))

    @property
    def characters(self) -> int:
        """The length of `words`."""
        asked = (*(turn.content for turn in self.earlier), self.question) if self.question else ()
        return sum(len(text) + 1 for text in asked) + len(self.answer or "")

    def without_system_prompt(self) -> Conversation:
        """Return it with no system prompt, whatever that of the samples is."""
        return replace(self, system="")

    def system_under(self, style: str) -> str:
        """Return its own system prompt, else that of the samples (`style`).

        Texts outside the domain have none but their own.
        """
        if self.system is None:
            return "" if self.split.outside_domain else style
        return self.system


def first_chat(style: str, conversations: Iterable[Conversation]) -> tuple[str, str]:
    """Return system prompt and question of a conversation, to try a template with.

    It is the first that has a system prompt, else the first.

    Args:
        style: the system prompt of conversations without their own.
        conversations: the texts, one in the domain at least.
    """
    asked = [
        (each.system_under(style), each.question)
        for each in conversations
        if not each.split.outside_domain
    ]
    return next((each for each in asked if each[0]), asked[0])


def prompt_is_too_long(name: str, tokens: int, most: int) -> SetupError:
    """Return the error of a text whose prompt leaves no room for its answer.

    Args:
        name: its id.
        tokens: tokens of its prompt.
        most: the tokens after which texts are cut.
    """
    return SetupError(
        f"text {name}: its prompt alone has {tokens} tokens, and texts are cut after {most}. Raise "
        "samples.max_tokens; if a model was made for no more (max_position_embeddings), shorten "
        "the text."
    )


def facts_digest(conversations: Sequence[Conversation]) -> str:
    """Return the hash of the facts and falsehoods of all conversations.

    It is kept apart from that of the texts, because only evaluators see facts.
    """
    return digest([(each.facts, each.falsehoods) for each in conversations])
