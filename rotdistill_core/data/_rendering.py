"""The process that renders chat templates: a program of its own, which reads one job from stdin.

The first line is a JSON object: template, variables, date, and the limits. Each further line is the
messages of a chat. One chat is in memory at a time, so a job has as many as it likes.

A template is somebody else's program. The sandbox of jinja keeps it from doing anything but make
text; it may still never end, or fill the memory. Only a process of its own can be stopped whatever
it does, so this one runs under limits and imports nothing but jinja.

The environment is that of transformers (`_compile_jinja_template`), apart from the clock, which
stands still. A template that leaves anything to chance is refused.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CHANCE = "it writes another text each time, by chance"
"""What is said of a template that makes random choices."""


class Generation(Extension):
    """The block `generation`, which marks answers and changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012  jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a call that renders the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_body"), [], [], body)
        return block.set_lineno(line)

    @pass_eval_context
    def _body(self, _: Any, caller: Any) -> Any:
        return caller()


class TemplateDict:
    """The function `dict` of templates, which has no methods but `fromkeys`."""

    def __call__(self, *words: Any, **named: Any) -> dict[Any, Any]:
        """Return a dict."""
        return dict(*words, **named)

    def fromkeys(self, *words: Any) -> dict[Any, Any]:
        """Return a dict of keys."""
        return dict.fromkeys(*words)


class TemplateNamespace(Namespace):
    """The class `namespace` of templates; no name in it begins with an underscore."""

    def __init__(*words: Any, **named: Any) -> None:  # so that `self` may be one of the names
        """Keep the values."""
        own, rest = words[0], words[1:]
        values = dict(*rest, **named)
        for name in values:
            _refuse_hidden(name)
        Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: Any) -> None:
        """Keep a value."""
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the attribute {name!r} of a namespace begins with an underscore")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _environment(date: str) -> ImmutableSandboxedEnvironment:
    """Return the environment of templates.

    Args:
        date: the day that it is, such as 2025-07-01; it is midnight.
    """
    now = datetime.fromisoformat(date)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    environment.globals["dict"] = TemplateDict()
    environment.globals["namespace"] = TemplateNamespace
    return environment


def _limit(memory: int, seconds: int) -> None:
    """Limit this process. Beyond the memory it gets a MemoryError, beyond the time it is killed."""
    _lower(resource.RLIMIT_CPU, seconds, seconds + 1)
    if sys.platform != "darwin":  # which does not know this limit
        _lower(resource.RLIMIT_AS, memory, memory)
    _lower(resource.RLIMIT_CORE, 0, 0)


def _lower(kind: int, soft: int, hard: int) -> None:
    """Lower a limit. One that the system has set lower already stays."""
    _, most = resource.getrlimit(kind)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def main() -> None:
    """Render the chats of a job; print `{"text": ...}` or `{"error": ...}`, a line for each."""
    job = json.loads(sys.stdin.readline())
    _limit(job["memory"], job["seconds"])
    try:
        template = _environment(job["date"]).from_string(job["template"])
    except MemoryError:
        print(json.dumps({"limit": "memory"}))
        return
    except Exception as error:
        said = json.dumps({"error": _words(error)})
        for _ in sys.stdin:
            print(said)
        return
    left = job["characters"]
    is_tried = False
    for line in sys.stdin:
        try:
            variables = {**job["variables"], "messages": json.loads(line)}
            text = _written(template, variables, left, seed=0)
            # Once is enough: what a template leaves to chance, it leaves to it in every chat.
            if not is_tried and text != _written(template, variables, left, seed=1):
                raise TemplateError(CHANCE)
            is_tried = True
            left -= len(text)
            said = json.dumps({"text": text})
        except MemoryError:
            print(json.dumps({"limit": "memory"}))
            break
        except Exception as error:
            said = json.dumps({"error": _words(error)})
        print(said)


def _written(template: Template, variables: dict[str, Any], most: int, seed: int) -> str:
    """Return a chat as the template writes it.

    Args:
        template: the template.
        variables: messages, special tokens and the rest.
        most: characters that the text may have.
        seed: decides random choices.

    Raises:
        MemoryError: it is longer.
    """
    random.seed(seed)
    # Piece by piece, so that a text without end is noticed.
    pieces = []
    for piece in template.generate(**variables):
        most -= len(piece)
        if most < 0:
            raise MemoryError
        pieces.append(piece)
    return "".join(pieces)


def _words(error: Exception) -> str:
    """Return what an error says, on one line of a length that people read."""
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if line else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}{where}"


if __name__ == "__main__":
    main()
