"""The process that renders chat templates: a program of its own, which reads one job from stdin.

A template is somebody else's program. The sandbox of jinja keeps it from doing anything but make
text; it may still never end, or fill the memory. Only a process of its own can be stopped whatever
it does, so this one runs under limits and imports nothing but jinja.

The environment is that of transformers (`_compile_jinja_template`), apart from the clock, which
stands still, and from random choices, which are always the same.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_eval_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


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
    return environment


def _limit(memory: int, seconds: int) -> None:
    """Limit this process. Beyond the memory it gets a MemoryError, beyond the time it is killed."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if sys.platform != "darwin":  # which does not know this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Render the chats of a job; print a JSON list of `{"text": ...}` or `{"error": ...}`."""
    job = json.loads(sys.stdin.read())
    _limit(job["memory"], job["seconds"])
    try:
        template = _environment(job["date"]).from_string(job["template"])
    except MemoryError:
        print(json.dumps([{"limit": "memory"}]))
        return
    except Exception as error:
        print(json.dumps([{"error": _words(error)}] * len(job["chats"])))
        return
    rendered = []
    left = job["characters"]
    for chat in job["chats"]:
        random.seed(0)
        try:
            # Piece by piece, so that a text without end is noticed.
            pieces = []
            for piece in template.generate(**job["variables"], **chat):
                left -= len(piece)
                if left < 0:
                    raise MemoryError
                pieces.append(piece)
            rendered.append({"text": "".join(pieces)})
        except MemoryError:
            rendered.append({"limit": "memory"})
            break
        except Exception as error:
            rendered.append({"error": _words(error)})
    print(json.dumps(rendered))


def _words(error: Exception) -> str:
    """Return what an error says, on one line of a length that people read."""
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if line else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}{where}"


if __name__ == "__main__":
    main()
