"""What a row says, before ids, languages and splits are settled: its conversation, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NoReturn

from pydantic import TypeAdapter, ValidationError

from rotdistill_core.characters import visible
from rotdistill_core.data.conversations import Claim, Turn
from rotdistill_core.data.rows import Row, misspelt
from rotdistill_core.data.text_files import (
    LINE_END,
    comparable,
    comparable_name,
    foreign_characters,
)
from rotdistill_core.data.thoughts import without_thoughts

Use = Literal["index", "heldout", "guard"]
"""The key of `[samples]` that names a file: it decides what a row needs."""

LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}")
"""A language as in BCP 47: a code of ISO 639, and subtags such as `pt-BR` has."""
RESERVED_ENDINGS = (".own", ".place", ".lesson")
"""Ends of the ids of texts that are made from others."""
LONGEST_CELL = 131_072
"""Characters of a text. More is not one text, but a file whose line ends are lost."""
CLAIMS = "It must be a JSON list of objects with `what` and `any`."
"""What a value of facts or falsehoods holds."""
PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "blurb"),
    ("instruction", "output"),
)
"""Columns of question and answer. The first pair of which a row has the question counts."""
FORMS = (
    "messages, conversations, question and answer, prompt and completion, or instruction and output"
)
"""The columns of a conversation, in words."""
QUESTIONS = {"messages", "conversations", *(pair[0] for pair in PAIRS)}
ANSWERS = {pair[1] for pair in PAIRS}
SHOWN_KEYS = 8
"""Names of columns that a message lists."""
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Role in a file -> role of a chat; `human` and `gpt` are those of ShareGPT."""
_CLAIMS: TypeAdapter[tuple[Claim, ...]] = TypeAdapter(tuple[Claim, ...])


@dataclass(frozen=True)
class Draft:
    """One row's conversation."""

    where: str
    """File and line, or file and row."""
    id: str
    """Empty if the row names none, as is `language`."""
    language: str
    question: str
    """Empty for a plain text."""
    answer: str | None
    topic: str = ""
    has_group: bool = False
    """Whether texts of its topic stay together: it stands in a column `topic`, not `place`."""
    earlier: tuple[Turn, ...] = ()
    system: str | None = None
    facts: tuple[Claim, ...] = ()
    falsehoods: tuple[Claim, ...] = ()
    misspelt: tuple[tuple[str, str], ...] = ()
    """Names of columns that are not read, each with the one that it seems to be meant for."""

    @property
    def answer_hint(self) -> str:
        """What follows "has no answer": a column that seems to be meant for it; mostly nothing."""
        return _hint(dict(self.misspelt), ANSWERS)

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """System prompt and turns before the answer, in a form in which spellings are equal."""
        turns = (turn.content for turn in self.earlier)
        return tuple(comparable_name(text) for text in (self.system or "", *turns, self.question))

    @cached_property
    def text_key(self) -> tuple[str, ...]:
        """What copies of it have in common: `asked`, and the answer in the same form."""
        return (*self.asked, comparable(self.answer or ""))


class BadRowError(ValueError):
    """What is wrong with a row: `column: sentence`."""


class NoQuestionError(BadRowError):
    """A row has no column that is a question; rows of one file mostly share that."""


def drafts_of(
    rows: Iterable[Row], use: Use, problems: list[str], thinking: bool = False
) -> list[Draft]:
    """Return the conversations in the rows of a file.

    Args:
        rows: the rows.
        use: what they are for.
        problems: takes what is wrong, a sentence each that names file, line and column.
        thinking: keep what an assistant thinks before it answers.
    """
    drafts = []
    alike: dict[str, list[str]] = {}
    guesses: dict[tuple[tuple[str, ...], frozenset[str]], dict[str, str]] = {}
    for row in rows:
        # Rows of one file mostly have the same columns, and a comparison of words is slow.
        columns = (row.others, frozenset(row.values))
        if row.others and columns not in guesses:
            guesses[columns] = _meant(*columns, use)
        meant = guesses.get(columns, {})
        try:
            draft = _draft(row, use, meant)
            drafts.append(draft if thinking else _without_thoughts(draft))
        except NoQuestionError as error:
            alike.setdefault(str(error), []).append(row.where)
        except BadRowError as error:
            problems.append(f"{row.where}: {error}")
    for problem, places in alike.items():
        others = f" So it is in {len(places)} rows." if len(places) > 1 else ""
        problems.append(f"{places[0]}: {problem}{others}")
    return drafts


def _meant(others: Iterable[str], has: frozenset[str], use: Use) -> dict[str, str]:
    """Return the misspelt columns of a row -> those that are meant, where these would be read."""
    unread = {"text"} if use != "guard" else set()
    if has & QUESTIONS:
        unread |= QUESTIONS
    if has & (ANSWERS | {"messages", "conversations"}):
        unread |= ANSWERS
    if "instruction" not in has:
        unread.add("input")
    return misspelt(others, has | unread)


def _hint(meant: Mapping[str, str], wanted: Iterable[str]) -> str:
    """Return which misspelt column may hold one of those that are wanted; empty for none."""
    for name, key in meant.items():
        if key in wanted:
            return f" (it has {visible(name)}; did you mean {key}?)"
    return ""


def _draft(row: Row, use: Use, meant: Mapping[str, str]) -> Draft:
    """Return the conversation in a row.

    Args:
        row: the row.
        use: what it is for.
        meant: its misspelt columns -> those that are meant.

    Raises:
        BadRowError: it holds none.
    """
    name = _name(row, "id")
    if name.endswith(RESERVED_ENDINGS):
        raise BadRowError(
            f"id: {name} must not end with {' or '.join(RESERVED_ENDINGS)}, which are ours."
        )
    system, turns, answer = _plain_text(row) if _is_plain(row, use) else _chat(row, use, meant)
    return Draft(
        where=row.where,
        id=name,
        language=_language(row),
        question=turns[-1].content if turns else "",
        answer=answer,
        topic=_name(row, "topic") or _name(row, "place"),
        has_group=bool(_name(row, "topic")),
        earlier=tuple(turns[:-1]),
        system=system,
        facts=_claims(row, "facts"),
        falsehoods=_claims(row, "falsehoods"),
        misspelt=tuple(meant.items()),
    )


def _is_plain(row: Row, use: Use) -> bool:
    return use == "guard" and row.has("text")


def _plain_text(row: Row) -> tuple[None, tuple[Turn, ...], str]:
    """Return a text that models read as it is, in the form of `_chat`.

    Raises:
        BadRowError: it cannot be read.
    """
    return None, (), _text(row.values["text"], "text", verbatim=True)


def _without_thoughts(draft: Draft) -> Draft:
    """Return a draft without what the assistant thinks in it.

    Raises:
        BadRowError: a turn holds nothing else.
    """
    if not draft.question:
        return draft
    answer = without_thoughts(draft.answer) if draft.answer else draft.answer
    earlier = tuple(
        turn._replace(content=without_thoughts(turn.content)) if turn.role == "assistant" else turn
        for turn in draft.earlier
    )
    if answer == "" or not all(turn.content for turn in earlier):
        raise BadRowError("a turn of the assistant holds thoughts and no answer.")
    if (answer, earlier) == (draft.answer, draft.earlier):
        return draft
    return replace(draft, answer=answer, earlier=earlier)


# Messages.


def _chat(
    row: Row, use: Use, meant: Mapping[str, str]
) -> tuple[str | None, tuple[Turn, ...], str | None]:
    """Return system prompt, turns up to the question, and answer of a row.

    Raises:
        BadRowError: it has no conversation, or one that cannot be read.
    """
    own = _system(row.values["system"], "system") if row.has("system") else None
    if row.has("messages"):
        system, turns = _turns(row.values["messages"], "messages", "role", "content")
    elif row.has("conversations"):
        system, turns = _turns(row.values["conversations"], "conversations", "from", "value")
    else:
        system, turns = _pair(row, use, meant)
    answer = turns.pop().content if turns[-1].role == "assistant" else None
    if own is not None and system is not None and own != system:
        raise BadRowError("system: the messages have another system prompt; leave one of them out.")
    if answer is None and use == "guard":
        hint = _hint(meant, ANSWERS)
        raise BadRowError(f"has no answer{hint}; a conversation outside the domain needs one.")
    return (own if system is None else system), tuple(turns), answer


def _pair(row: Row, use: Use, meant: Mapping[str, str]) -> tuple[str | None, list[Turn]]:
    """Return system prompt and turns of a row with question and answer in columns of their own.

    Raises:
        BadRowError: there is no question.
    """
    pairs = [pair for pair in PAIRS if pair[0] in row.values]
    if not pairs:
        _refuse_without_question(row, use, meant)
    first = next((pair for pair in pairs if row.has(*pair)), pairs[0])
    question, answer = (row.values.get(key) for key in first)
    if isinstance(question, list | tuple):  # the chat format in two parts
        whole = [*question, *(answer if isinstance(answer, list | tuple) else [])]
        if isinstance(answer, str):
            whole.append({"role": "assistant", "content": answer})
        return _turns(whole, first[0], "role", "content")
    asked = _text(question, first[0])
    if first[0] == "instruction" and _is_filled(row.values.get("input")):
        asked = f"{asked}\n\n{_text(row.values['input'], 'input')}"
    turns = [Turn("user", asked)]
    if answer is not None:
        turns.append(Turn("assistant", _text(answer, first[1])))
    return None, turns


def _is_filled(value: object) -> bool:
    return value is not None and value != ""


def _refuse_without_question(row: Row, use: Use, meant: Mapping[str, str]) -> NoReturn:
    has = ", ".join([*sorted(row.values), *row.others][:SHOWN_KEYS]) or "nothing"
    wanted = FORMS + (", or text" if use == "guard" else "")
    guessed = next((key for key in meant.values() if key in QUESTIONS), "")
    hint = f"; did you mean {guessed}?" if guessed else ""
    raise NoQuestionError(f"has no question (it has {visible(has):.200}{hint}). It needs {wanted}.")


def _turns(
    messages: object, key: str, role_key: str, content_key: str
) -> tuple[str | None, list[Turn]]:
    """Return system prompt and turns of a list of messages.

    Args:
        messages: the value of the column.
        key: the name of the column, for errors.
        role_key, content_key: the keys of a message.

    Raises:
        BadRowError: naming the message that cannot be read.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRowError(f"{key}: must be a list of messages (it is {messages!r:.40}).")
    system = None
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        where = f"{key}.{number}"
        role, content = _message(message, where, role_key, content_key)
        if role == "system":
            if number:
                raise BadRowError(f"{where}.{role_key}: a system prompt stands first, and once.")
            system = content
            continue
        wanted = "assistant" if len(turns) % 2 else "user"
        if role != wanted:
            raise BadRowError(
                f"{where}.{role_key}: must be {wanted} (it is {role}): user and assistant speak in "
                "turn, the user first."
            )
        turns.append(Turn("assistant" if len(turns) % 2 else "user", content))
    if not turns:
        raise BadRowError(f"{key}: has no turn of a user.")
    return system, turns


def _message(message: object, where: str, role_key: str, content_key: str) -> tuple[str, str]:
    """Return role and content of a message.

    Raises:
        BadRowError: it has none that is read.
    """
    if not isinstance(message, Mapping):
        raise BadRowError(f"{where}: must be an object with {role_key} and {content_key}.")
    role = message.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        raise BadRowError(
            f"{where}.{role_key}: must be system, user or assistant (it is {role!r:.40})."
        )
    if message.get("tool_calls"):
        raise BadRowError(f"{where}.tool_calls: calls of tools are not read; leave the row out.")
    content = message.get(content_key)
    if isinstance(content, list | tuple):
        content = _joined(content, f"{where}.{content_key}")
    read = _system if role == "system" else _text
    return ROLES[role], read(content, f"{where}.{content_key}")


def _joined(parts: Sequence[Any], where: str) -> str:
    """Return the texts of a content that comes in parts.

    Raises:
        BadRowError: a part is no text.
    """
    texts = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise BadRowError(
                f"{where}.{number}: must be a text, as {{'type': 'text', 'text': ...}} (its type "
                f"is {kind!r:.40}); images and sounds are not read."
            )
        texts.append(text)
    return "".join(texts)


# Single values.


def _text(value: object, where: str, verbatim: bool = False) -> str:
    """Return a text without the blanks around it, its line ends as `\\n`.

    Args:
        value: what the row holds.
        where: the column, for errors.
        verbatim: keep the blanks.

    Raises:
        BadRowError: it is no text, is empty or too long, or holds what no text holds.
    """
    if not isinstance(value, str):
        raise BadRowError(f"{where}: must be a text (it is {value!r:.40}).")
    if len(value) > LONGEST_CELL:
        raise BadRowError(f"{where}: has {len(value)} characters; {LONGEST_CELL} are the most.")
    text = LINE_END.sub("\n", value)
    _require_characters(text, where, allowed="\n\t")
    if not text.strip():
        raise BadRowError(f"{where}: is empty.")
    return text if verbatim else text.strip()


def _system(value: object, where: str) -> str:
    """Return a system prompt; an empty one says that the text has none.

    Raises:
        BadRowError: it is no text.
    """
    return "" if value == "" else _text(value, where)


def _name(row: Row, key: str) -> str:
    """Return a value of one line; empty if the row has none.

    Raises:
        BadRowError: it is no text, or holds what no line holds.
    """
    value = row.values.get(key, "")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRowError(f"{key}: must be a text (it is {value!r:.40}).")
    if len(value) > LONGEST_CELL:
        raise BadRowError(f"{key}: has {len(value)} characters; {LONGEST_CELL} are the most.")
    _require_characters(value, key)
    return value.strip()


def _require_characters(text: str, where: str, allowed: str = "") -> None:
    if text.isprintable():  # as most texts are
        return
    foreign = sorted(set(foreign_characters(text, allowed)))
    if foreign:
        raise BadRowError(
            f"{where}: holds {', '.join(foreign)}, which is no character of a text; remove it."
        )


def _language(row: Row) -> str:
    """Return the language that a row names, in lower case up to its subtags; empty if none.

    Raises:
        BadRowError: it is no code of a language.
    """
    language = _name(row, "language")
    if language and not LANGUAGE.fullmatch(language):
        raise BadRowError(
            "language: must be a code of ISO 639 such as en, or a tag such as pt-BR (it is "
            f"{language!r:.40})."
        )
    primary, dash, subtags = language.partition("-")
    # Case means nothing in a language tag, and results are grouped by it.
    return f"{primary.lower()}{dash}{subtags}"


def _claims(row: Row, column: str) -> tuple[Claim, ...]:
    """Return the claims of a row; none if it has none.

    Raises:
        BadRowError: they cannot be read.
    """
    value = row.values.get(column)
    if value is None:
        return ()
    read = _CLAIMS.validate_json if isinstance(value, str) else _CLAIMS.validate_python
    try:
        claims = read(value)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        where = f"{column}{f', at {at}' if at else ''}"
        raise BadRowError(f"{where}: {first['msg']}. {CLAIMS}") from error
    texts = [text for claim in claims for text in (claim.what, *claim.any)]
    for text in texts:
        _require_characters(text, column)
    if not all(text.strip() for text in texts) or not all(claim.any for claim in claims):
        raise BadRowError(f"{column}: an empty statement or phrase is found in no answer. {CLAIMS}")
    return claims
