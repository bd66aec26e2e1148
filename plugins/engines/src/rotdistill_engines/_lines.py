"""Answers in a file of JSON lines, found by id, prompt or messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotdistill_core.data.drafts import LONGEST_CELL
from rotdistill_core.data.json_lines import BadLineError, json_object
from rotdistill_core.data.text_files import LINE_END, NotUtf8Error, decode_utf8
from rotdistill_core.data.thoughts import continuing
from rotdistill_core.errors import FEW, RecipeError
from rotdistill_core.plugin.engine import Answer, Asked
from rotdistill_core.store.hashing import sha256_of
from rotdistill_core.store.plain import COLLECTION_BYTES, read_bytes
from rotdistill_engines._reading import AnswerReader, UnusableAnswer

if TYPE_CHECKING:
    from rotdistill_core.forward.generate import AnsweringModel

NAMES = ("id", "prompt", "messages")
"""Keys by one of which a line names what it answers."""
ANSWERS = ("answer", "tokens")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which no tokenizer reads."""
HOW_LINES_LOOK = (
    'A line is one JSON object with "id", "prompt" or "messages", and with "answer" (text) or '
    '"tokens" (ids).'
)


@dataclass(frozen=True)
class AnswerLines:
    """The lines of a file of answers, by what they answer."""

    path: Path
    bytes: int
    """Size of the file."""
    _lines: Mapping[str, tuple[int, dict[str, Any]]]
    """What a line answers -> its number and its content."""

    @classmethod
    def read(cls, path: Path) -> AnswerLines:
        """Return the lines of a file.

        Raises:
            RecipeError: it cannot be read, a line is no answer, or two answer the same.
        """
        try:
            data = read_bytes(path, COLLECTION_BYTES)
            text = decode_utf8(data)
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from error
        except NotUtf8Error as error:
            raise RecipeError(f"{path}: {error}.") from error
        return cls(path, len(data), dict(_read(path, text)))

    def find(
        self,
        name: str,
        prompts: Iterable[str | Sequence[int]],
        messages: Iterable[Mapping[str, str]],
    ) -> tuple[int, dict[str, Any]] | None:
        """Return number and content of the line that answers a prompt; None if there is none.

        Args:
            name: its id.
            prompts: forms of it, as text and as token ids; empty ones are in no line.
            messages: the conversation that it is written from; none if there is none.
        """
        keys = [("id", name), *(("prompt", prompt) for prompt in prompts)]
        for kind, value in (*keys, ("messages", [dict(message) for message in messages])):
            if found := value and self._lines.get(_key(kind, value)):
                return found
        return None


class FileOfAnswers:
    """A file that answers in the teacher's name; see `Answering`.

    Args:
        path: the file.
        model: the teacher.

    Raises:
        RecipeError: the file cannot be read, a line is no answer, or two answer the same.
    """

    def __init__(self, path: Path, model: AnsweringModel) -> None:
        self.path = path
        self.reader = AnswerReader(model)
        self.at_once = 0
        self.about: dict[str, Any] = {
            "engine": "file",
            "version": version("rotdistill-engines"),
            "file": path.name,
            "sha256": sha256_of(path),
        }
        self._lines = AnswerLines.read(path)

    def chunks(self, _: Mapping[str, Asked]) -> None:
        """Return None: each answer stands for itself."""

    def answers(self, asked: Mapping[str, Asked]) -> Iterator[tuple[str, Answer]]:
        """Yield the answer of each prompt.

        Raises:
            RecipeError: the file does not answer some prompts; it names them.
        """
        places = {name: self._place_of(name, each) for name, each in asked.items()}
        missing = [name for name, place in places.items() if place is None]
        if missing:
            raise RecipeError(
                f"{self.path}: does not answer {len(missing)} of {len(asked)} texts: "
                f"{listed_names(missing)}. Add a line for each. {HOW_LINES_LOOK}"
            )
        for name, place in places.items():
            if place is not None:
                number, line = place
                yield name, self._answer(number, line, asked[name])

    def _place_of(self, name: str, asked: Asked) -> tuple[int, dict[str, Any]] | None:
        """Return number and content of the line that answers a prompt."""
        prompts = (asked.prompt, self._prompt_text(asked))
        return self._lines.find(name, prompts, asked.messages)

    def _answer(self, number: int, line: Mapping[str, Any], asked: Asked) -> Answer:
        ended = line.get("finish_reason", "stop") != "length"
        try:
            if "tokens" not in line:
                return self.reader.of_text(self._text(line, asked), ended, asked)
            tokens = line["tokens"]
            whole = len(tokens) <= asked.max_tokens
            text = line.get("answer") if whole else None
            return self.reader.of_tokens(tokens[: asked.max_tokens], text, ended and whole, asked)
        except UnusableAnswer as error:
            raise _wrong(self.path, number, f"its answer cannot be used: {error}") from error

    def _text(self, line: Mapping[str, Any], asked: Asked) -> str:
        """Return the text of an answer as it follows the prompt.

        Whoever names the prompt itself has answered it word by word. Others have answered the
        question, with thoughts or without.
        """
        answer: str = line["answer"]
        return answer if "prompt" in line else continuing(self._prompt_text(asked), answer)

    def _prompt_text(self, asked: Asked) -> str:
        text: str = self.reader.tokenizer.decode(
            list(asked.prompt), clean_up_tokenization_spaces=False
        )
        return text


def listed_names(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return f"{', '.join(names[:FEW])}{more}"


def _read(path: Path, text: str) -> Iterator[tuple[str, tuple[int, dict[str, Any]]]]:
    """Yield the lines by what they answer.

    Raises:
        RecipeError: a line is no answer, or two answer the same.
    """
    first: dict[str, int] = {}
    for number, line in enumerate(LINE_END.split(text), 1):
        if not line.strip():
            continue
        content = _parsed(path, number, line)
        for kind in NAMES:
            if kind not in content:
                continue
            key = _key(kind, content[kind])
            if key in first:
                raise _wrong(
                    path,
                    number,
                    f"answers the same {kind} as line {first[key]}. Remove one of them",
                )
            first[key] = number
            yield key, (number, content)


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        content = json_object(line)
    except BadLineError as error:
        raise RecipeError(f"{path}, line {number}{error}") from error
    if not {*NAMES} & content.keys():
        raise _wrong(path, number, f"does not say what it answers. {HOW_LINES_LOOK[:-1]}")
    if not {*ANSWERS} & content.keys():
        raise _wrong(path, number, f"has no answer. {HOW_LINES_LOOK[:-1]}")
    if problem := _text_problem(content.get("answer", "")):
        raise _wrong(path, number, f'"answer" {problem}')
    if not isinstance(content.get("tokens", []), list):
        raise _wrong(path, number, '"tokens" is no list of token ids')
    return content


def _text_problem(answer: object) -> str:
    """Return why something is no text that a tokenizer can read; empty if it is one."""
    if not isinstance(answer, str):
        return "is no text"
    if len(answer) > LONGEST_CELL:
        return f"has {len(answer)} characters; {LONGEST_CELL} are the most"
    lone = LONE_SURROGATE.search(answer)
    return f"holds U+{ord(lone[0]):04X}, which is no character of a text; remove it" if lone else ""


def _wrong(path: Path, number: int, problem: str) -> RecipeError:
    return RecipeError(f"{path}, line {number}: {problem}.")


def _key(kind: str, value: object) -> str:
    return json.dumps([kind, value], sort_keys=True)
