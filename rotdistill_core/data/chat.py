"""Chats as a model's template writes them, rendered under limits, with one date for a whole run.

Nothing here needs transformers: `plan` and `run` render the same prompts in the same way.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rotdistill_core.checkpoint.foreign import reading
from rotdistill_core.data.conversations import Conversation, Turn
from rotdistill_core.data.thoughts import MARKS, closed, opens_block
from rotdistill_core.data.vocabularies import TOKENIZER_FILE, tokenizer_of
from rotdistill_core.errors import SetupError
from rotdistill_core.store.plain import read_bytes

MEMORY = 1 << 30
"""Bytes that the process may take that renders templates."""
SECONDS = 10
"""Seconds of a processor that it may take, and one more for every hundred chats."""
PATIENCE = 6
"""So many times these seconds are waited for it: the machine may be busy."""
CHARACTERS = 1 << 20
"""Characters of rendered chats, on top of eight times those of their messages."""
CHATS_AT_ONCE = 20_000
"""Chats that one process renders. It holds one at a time; this process holds all that it says."""
REMEMBERED = 1 << 20
"""Longest job, in characters, whose chats are kept in memory in case they are asked for again."""
TEMPLATE_BYTES = 1 << 20
"""Longest template."""
TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The variables of a template that hold special tokens, in all models."""
OWN_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")
"""Keys of a tokenizer's settings under which a model names further ones."""
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of tokenizers that have no special tokens but those in their files."""
ADDED_TOKENS = "added_tokens_decoder"
"""Key of the tokens that tokenizer_config.json lists."""
CLOCK = "strftime_now"
"""The function by which a template writes the date."""
DEFAULT = "default"
"""Name of the template that chats without tools are written with."""
THINKING = {
    "enable_thinking": re.compile(r"\benable_thinking\b"),
    "thinking": re.compile(r"\b(if|elif|and|or|not) +\(?thinking\b"),
}
"""Variables by which templates let models think before they answer, as they stand there. A message
may have a field of the second name."""
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}User: {{ m.content }}\n"
    "{% else %}Assistant: {{ m.content }}{{ eos_token }}{{ '' if loop.last else '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""How chats are written for a model without a chat template."""

INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
"""Variables without which some installations of Python do not start."""

Message = dict[str, str]
Chat = Sequence[Message]


@dataclass(frozen=True)
class ChatFormat:
    """How chats are written for one model."""

    source: str
    """The model's folder, for messages."""
    template: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Special token by the name of its variable."""
    date: str = ""
    """The day that templates write, such as 2025-07-01; empty for today."""
    system_turn: bool = True
    """Whether the system prompt has a turn of its own. Otherwise it goes before the question."""
    thinking: bool = False
    """Whether models are let to think before they answer, where the template has a switch."""
    is_whole: bool = True
    """Whether all is known that the template writes. It may write special tokens that no file of
    the folder names: many classes of transformers have such ones."""

    @classmethod
    def of(cls, tokenizer: Any, date: str = "", thinking: bool = False) -> ChatFormat:
        """Return the format of a transformers tokenizer; the plain one if it has no template.

        Raises:
            SetupError: it has templates, but none for chats without tools.
        """
        source = str(tokenizer.name_or_path)
        tokens = dict(getattr(tokenizer, "special_tokens_map", {}))
        template = _default_template(source, tokenizer.chat_template)
        if template is None:
            first = list(tokenizer("")["input_ids"])[:1]
            names = [tokenizer.convert_ids_to_tokens(token) for token in first]
            template = _plain_template(names, tokens)
        return cls(source, template, tokens, date, thinking=thinking)

    @classmethod
    def read(cls, folder: Path, date: str = "", thinking: bool = False) -> ChatFormat:
        """Return the format of a model's folder, from its files; see `of`.

        Raises:
            SetupError: it has templates, but none for chats without tools, or a file cannot be
                read.
        """
        config = _object(folder / TOKENIZER_CONFIG)
        # transformers reads the older file last, and only where the newer one lists no tokens.
        older = {} if ADDED_TOKENS in config else _object(folder / SPECIAL_TOKENS_FILE)
        special = {**config, **older}
        tokens = _special_tokens(special, folder / TOKENIZER_CONFIG)
        template = _template_of(folder, config)
        if template is None:
            template = _plain_template(_first_tokens(folder), tokens)
        is_plain = config.get("tokenizer_class") in PLAIN_CLASSES
        return cls(
            source=str(folder),
            template=template,
            tokens=tokens,
            date=date,
            thinking=thinking,
            is_whole=is_plain
            or all(name in special for name in SPECIAL_TOKENS if name in template),
        )

    @property
    def is_ours(self) -> bool:
        """Whether the model has no chat template, so that chats are written plainly."""
        return self.template.endswith(PLAIN_TEMPLATE)

    @property
    def switches(self) -> dict[str, bool]:
        """Variable of the template -> whether models think, for those that it has."""
        names = (name for name, pattern in THINKING.items() if pattern.search(self.template))
        return dict.fromkeys(names, self.thinking)

    @property
    def opens_thoughts(self) -> bool:
        """Whether the template begins answers inside a thinking block."""
        if not any(mark in self.template for mark in MARKS):
            return False
        (rendered,) = self._tried([self.messages("", "?")])
        return opens_block(rendered.get("text", ""))

    @property
    def uses_date(self) -> bool:
        """Whether the template writes the date."""
        return CLOCK in self.template

    def same_texts(self, other: ChatFormat) -> bool:
        """Return whether both write every chat alike, and end answers with the same token."""
        names = {*self.tokens, *other.tokens}
        return self.template == other.template and all(
            self.tokens.get(name) == other.tokens.get(name)
            for name in names
            if name in self.template or name == "eos_token"
        )

    def for_style(self, style: str, question: str) -> ChatFormat:
        """Return the format that takes a system prompt, tried with a question.

        A template may know no system role: it refuses such a turn, or leaves it out. Then the
        prompt goes before the question, with a blank line between, as several templates do it.

        Raises:
            SetupError: the template refuses plain chats too, or breaks a limit.
        """
        if not style:
            return self
        alone, with_turn, before = self._tried(
            [
                [{"role": "user", "content": question}],
                self.messages(style, question),
                replace(self, system_turn=False).messages(style, question),
            ]
        )
        if "error" in alone and "error" in with_turn:
            raise SetupError(self._refusal(with_turn["error"]))
        has_prompt = style in with_turn.get("text", "")
        if has_prompt or ("text" in with_turn and style not in before.get("text", "")):
            return self
        if "text" not in before:
            raise SetupError(self._refusal(before.get("error", "")))
        return replace(self, system_turn=False)

    def messages(
        self, system: str, question: str, answer: str | None = None, earlier: Sequence[Turn] = ()
    ) -> list[Message]:
        """Return a chat: system prompt, earlier turns, question, and the answer if one is given.

        An empty system prompt has no turn; a template may then write one of its own.
        """
        turns = [*earlier, Turn("user", question)]
        if answer is not None:
            turns.append(Turn("assistant", answer))
        chat = [{"role": turn.role, "content": turn.content} for turn in turns]
        if system and self.system_turn:
            chat.insert(0, {"role": "system", "content": system})
        elif system:
            chat[0]["content"] = f"{system}\n\n{chat[0]['content']}"
        return chat

    def chat_of(
        self, conversation: Conversation, style: str, answer: str | None = None
    ) -> list[Message]:
        """Return a conversation as a chat.

        Args:
            conversation: any but a plain text.
            style: the system prompt of those that have none of their own.
            answer: the answer; None for a chat that ends with the question.
        """
        system = conversation.system_under(style)
        return self.messages(system, conversation.question, answer, conversation.earlier)

    def prompts(self, chats: Sequence[Chat]) -> list[str]:
        """Return the texts of chats that end with a question, up to where the answers begin.

        Where the template begins answers inside a thinking block, and models are not let to think,
        the block ends at once.

        Raises:
            SetupError: see `render`; or all questions are written alike.
        """
        texts = self.render(chats, generation=True)
        if not self.thinking:
            texts = [closed(text) for text in texts]
        if len(set(texts)) == 1 < len({chat[-1]["content"] for chat in chats}):
            raise SetupError(
                f"{self.source}: its chat template writes every question alike, as "
                f"{texts[0][:80]!r}. Repair the template, or take an instruction-tuned model."
            )
        return texts

    def render(self, chats: Sequence[Chat], generation: bool = False) -> list[str]:
        """Return chats as the template writes them.

        Args:
            chats: the messages of each.
            generation: write what begins an answer, too.

        Raises:
            SetupError: the template refuses a chat, never ends, or takes too much memory.
        """
        texts = []
        for rendered in self._tried(chats, generation):
            if "text" not in rendered:
                raise SetupError(self._refusal(rendered["error"]))
            texts.append(rendered["text"])
        return texts

    def _tried(self, chats: Sequence[Chat], generation: bool = True) -> list[dict[str, str]]:
        """Return the text of each chat, or what is wrong.

        Raises:
            SetupError: the template breaks a limit.
        """
        if not chats:
            return []
        # Questions come twice where the teacher answers them too, and chats are a text's context.
        lines = [json.dumps(list(chat), sort_keys=True) for chat in chats]
        distinct = list(dict.fromkeys(lines))
        found: dict[str, dict[str, str]] = {}
        for first in range(0, len(distinct), CHATS_AT_ONCE):
            block = distinct[first : first + CHATS_AT_ONCE]
            found |= zip(block, self._tried_once(block, generation), strict=False)
        return [found[line] for line in lines if line in found]

    def _tried_once(self, lines: Sequence[str], generation: bool) -> list[dict[str, str]]:
        """Return the text of each chat, given as a line of JSON, or what is wrong; see `_tried`."""
        job = {
            "template": self.template,
            "variables": {
                **self.tokens,
                "add_generation_prompt": generation,
                **_ABSENT,
                **self.switches,
            },
            "date": self.date or datetime.date.today().isoformat(),
            "memory": MEMORY,
            "seconds": SECONDS + len(lines) // 100,
            "characters": CHARACTERS + 8 * sum(map(len, lines)),
        }
        header = json.dumps(job, sort_keys=True)
        text = "\n".join([header, *lines, ""])
        ask = _rendered if len(text) <= REMEMBERED else _rendered.__wrapped__
        try:
            rendered = ask(text)
        except _ProcessError as error:
            raise SetupError(f"{self.source}: {error}") from error
        if rendered is None or "limit" in rendered[-1]:
            limit = f"{job['seconds']} seconds" if rendered is None else "memory"
            raise SetupError(
                f"{self.source}: its chat template does not end within the limits ({limit}; "
                f"{SECONDS} seconds, {MEMORY >> 30} GiB and {CHARACTERS >> 20} million characters "
                "are the most). Repair the template, or take another model."
            )
        return rendered

    def _refusal(self, why: str) -> str:
        return (
            f"{self.source}: its chat template cannot write a chat: {why}. Repair the "
            "template, or take an instruction-tuned model."
        )


_ABSENT: Mapping[str, None] = {"tools": None, "documents": None}
"""What transformers gives to templates where there is none."""


class _ProcessError(Exception):
    """The process that renders templates cannot work here; the message says why."""


@lru_cache(maxsize=32)
def _rendered(job: str) -> list[dict[str, str]] | None:
    """Return what the process says about a job; None if it was stopped by a limit.

    A job decides what it says, so it is asked once, whichever model it comes from.

    Args:
        job: a line with the template and its limits, and a line for each chat; see `_rendering`.

    Raises:
        _ProcessError: the process cannot work here.
    """
    program = Path(__file__).with_name("_rendering.py")
    seconds = json.loads(job.partition("\n")[0])["seconds"] * PATIENCE
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environment |= {"PYTHONPATH": paths, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-s", str(program)],
            input=job,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        *_, why = done.stderr.split("\n")[:-1] or [""]
        # Signals end it at its limits, and an error that has no memory to be told.
        if done.returncode < 0 or "MemoryError" in why:
            return None
        raise _ProcessError(
            f"the process that renders its chat template has failed: {why[:300]}. Run "
            f"`{sys.executable} -c 'import jinja2, resource'` to see whether Python is complete."
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def _plain_template(first: Sequence[str], tokens: Mapping[str, str]) -> str:
    """Return the template of a model that has none.

    Args:
        first: the tokens with which its tokenizer begins every text.
        tokens: its special tokens by name.
    """
    begins = [*first][:1] == [tokens.get("bos_token")]
    return ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE


def _first_tokens(folder: Path) -> list[str]:
    """Return the tokens that the tokenizer of a folder makes of an empty text.

    Raises:
        SetupError: it cannot be loaded.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return []
    with reading(path, "the tokenizer"):
        tokens: list[str] = tokenizer_of(folder).encode("").tokens
    return tokens


def _template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the template for chats without tools, from the file that transformers takes.

    Raises:
        SetupError: there are others alone, or it cannot be read.
    """
    files = sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))
    named = {path.name.removesuffix(".jinja"): path for path in files}
    path = named.get(DEFAULT, folder / TEMPLATE_FILE)
    if path.is_file():
        return _default_template(str(folder), _text(path))
    if named:
        return _default_template(str(folder), dict.fromkeys(named, ""))
    return _default_template(str(folder), config.get("chat_template"))


def _special_tokens(settings: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Return the special tokens that a tokenizer's settings name, by name.

    Args:
        settings: what tokenizer_config.json says, and what is beside it.
        path: that file, for messages.

    Raises:
        SetupError: one is no text.
    """
    found = {name: settings.get(name) for name in SPECIAL_TOKENS}
    # A model may name tokens of its own: `image_token`.
    found |= {
        name: value
        for name, value in settings.items()
        if name.endswith("_token")
        and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
    }
    for key in OWN_TOKENS:
        own = settings.get(key)
        found |= own if isinstance(own, dict) else {}
    return {
        name: _token(value, f"{path}: `{name}`")
        for name, value in found.items()
        if value is not None
    }


def _default_template(source: str, templates: object) -> str | None:
    """Return the template for chats without tools; None if there is no template at all.

    Args:
        source: the model's folder, for messages.
        templates: one template, or several by name, as transformers keeps them.

    Raises:
        SetupError: there are others alone.
    """
    if templates is None:
        return None
    if isinstance(templates, list):
        templates = {
            each.get("name"): each.get("template") for each in templates if isinstance(each, dict)
        }
    names = ""
    if isinstance(templates, dict):
        names = ", ".join(sorted(map(str, templates)))
        templates = templates.get(DEFAULT)
    if isinstance(templates, str) and templates.strip():
        return templates
    if names:
        raise SetupError(
            f"{source}: the tokenizer has no chat template called {DEFAULT}, only {names}; copy "
            f"the one for plain chats to {TEMPLATE_FILE}."
        )
    raise SetupError(
        f"{source}: its chat template is no text, or a blank one. Repair or remove it; without "
        "any, conversations are written plainly."
    )


def _text(path: Path) -> str:
    try:
        return read_bytes(path, TEMPLATE_BYTES).decode()
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SetupError(f"{path}: is not UTF-8 text.") from error


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bytes(path))
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise SetupError(f"{path}: must hold one JSON object.")
    return value


def _token(value: object, where: str) -> str:
    """Return a special token as tokenizer_config.json holds it: a text, or an object with one.

    Raises:
        SetupError: it is neither; `where` names it.
    """
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise SetupError(
            f"{where}: must be a text, or an object with `content` (it is {value!r:.80})."
        )
    return content
