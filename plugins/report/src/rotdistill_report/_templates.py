"""The Jinja templates of this package, with the filters that they use.

Whatever an expression of a template yields is text of others until a filter here has made it markup
(`Markup`): in HTML autoescape escapes it, in Markdown `markdown_text`. Characters that are not seen
become escapes in both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup, escape

from rotdistill_core.characters import visible
from rotdistill_core.evaluation.metrics import UNPROMPTED_TEACHER, metric_named

PLAIN_YAML = re.compile(r"[a-z][a-z0-9.-]*")
MIN_ROWS = 4
"""Lines from which a note of figures is a table."""
LONGEST_EXCERPT = 180
"""Characters of an answer on the first screen."""
ALIGNMENTS_ABOUT = (
    "Over the layer boundaries, on rows that were not fitted: what each aligner measured, its "
    "nulls (what a map reaches that has learned nothing), and then figures of its own."
)
YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
"""Words that YAML takes for something else than text."""


def template(name: str) -> Template:
    """Return one template of the folder `templates`, `*.html.j2` or `*.md.j2`."""
    is_html = name.endswith(".html.j2")
    environment = Environment(
        loader=PackageLoader("rotdistill_report"),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=is_html,  # noqa: S701  (see `finalize`)
        finalize=html_text if is_html else markdown_text,
    )
    environment.filters |= {
        "metric_title": metric_title,
        "note": note_text,
        "note_rows": note_rows,
        "note_summary": note_summary,
        "excerpt": excerpt,
        "cell": table_cell,
        "code": code_markup,
        "span": code_span,
        "fenced": fenced,
        "word": yaml_word,
        "quoted": yaml_string,
    }
    environment.tests["table"] = is_table
    environment.globals["unprompted_title"] = UNPROMPTED_TEACHER
    environment.globals["alignments_about"] = ALIGNMENTS_ABOUT
    return environment.get_template(name)


def html_text(value: object) -> str:
    """Return what an expression yields without characters that are not seen."""
    return Markup(visible(value)) if isinstance(value, Markup) else visible(str(value))  # noqa: S704


def markdown_text(value: object) -> Markup:
    """Return what an expression yields as one line of Markdown: no HTML, no link, no picture.

    Emphasis and code spans stay as they are: they load nothing, and sentences of ours have them.
    """
    if isinstance(value, Markup):
        return value
    text = visible(re.sub(r"[\r\n]+", " ", str(value)))
    return Markup(text.replace("<", "&lt;").replace("](", "]\\("))  # noqa: S704  (escaped here)


def metric_title(name: str) -> str:
    """Return the title of a metric."""
    return metric_named(name).title


def note_text(value: object) -> str:
    """Return a note of a step as one line of text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {note_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(note_text(item) for item in value)
    return str(value)


class NoteRows(NamedTuple):
    """A note of a step as a table."""

    columns: list[str]
    lines: list[tuple[str, list[str]]]
    """What each line is of, and its cells; empty where it has no such figure."""


def is_table(value: object) -> bool:
    """Return whether a note has figures of the same names for several things."""
    return (
        isinstance(value, Mapping)
        and len(value) >= MIN_ROWS
        and all(isinstance(row, Mapping) and row for row in value.values())
    )


def note_rows(value: Mapping[str, Mapping[str, object]]) -> NoteRows:
    """Return a note that is a table, line by line."""
    columns = list(dict.fromkeys(name for row in value.values() for name in row))
    lines = [
        (label, [note_text(row[name]) if name in row else "" for name in columns])
        for label, row in value.items()
    ]
    return NoteRows(columns, lines)


def note_summary(value: Mapping[str, Mapping[str, object]]) -> str:
    """Return a note that is a table in one line: how many lines, and the range of each figure."""
    parts = [f"{len(value)} entries"]
    for name in note_rows(value).columns:
        figures = [row[name] for row in value.values() if name in row]
        numbers = [figure for figure in figures if isinstance(figure, int | float)]
        if len(numbers) == len(figures):
            low, high = (note_text(float(end)) for end in (min(numbers), max(numbers)))
            parts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    return "; ".join(parts)


def excerpt(text: str) -> str:
    """Return the beginning of a text, with `…` where it goes on; at a blank, if one is near."""
    one_line = " ".join(text.split())
    if len(one_line) <= LONGEST_EXCERPT:
        return one_line
    cut = one_line[: LONGEST_EXCERPT + 1]
    words = cut.rpartition(" ")[0]
    kept = words if len(words) > LONGEST_EXCERPT // 2 else cut[:LONGEST_EXCERPT]
    return f"{kept} …"


def table_cell(text: str) -> Markup:
    """Return text for one cell of a Markdown table, in which nothing is markup."""
    one_line = " ".join(text.split())
    escaped = re.sub(r"([\\|`])", r"\\\1", one_line)
    return markdown_text(escaped)


def code_span(text: object) -> Markup:
    """Return text as a code span of Markdown, also in a table.

    The span is fenced by more backquotes than the text has in a row.
    """
    one_line = visible(" ".join(str(text).split())).replace("|", "\\|")
    fence = _fence(one_line, least=1)
    blank = " " if one_line.startswith("`") or one_line.endswith("`") else ""
    return Markup(f"{fence}{blank}{one_line}{blank}{fence}")  # noqa: S704  (code is no markup)


def fenced(text: str, language: str) -> Markup:
    """Return text as a code block of Markdown that no line of the text ends."""
    fence = _fence(text, least=3)
    return Markup(f"{fence}{language}\n{visible(text.rstrip())}\n{fence}")  # noqa: S704


def _fence(text: str, least: int) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def yaml_word(text: str) -> Markup:
    """Return text as a string of YAML, quoted where it has to be."""
    if PLAIN_YAML.fullmatch(text) and text not in YAML_WORDS:
        return Markup(text)  # noqa: S704  (letters, digits, dots and dashes)
    return yaml_string(text)


def yaml_string(text: str) -> Markup:
    """Return text as a quoted string of YAML."""
    # Of JSON's strings YAML takes all but the one control character that JSON leaves as it is.
    return Markup(json.dumps(text).replace("\x7f", "\\u007f"))  # noqa: S704


def code_markup(text: str) -> Markup:
    """Return text as HTML, what stands between backquotes as code."""
    parts = str(escape(text)).split("`")
    marked = [f"<code>{part}</code>" if k % 2 else part for k, part in enumerate(parts)]
    return Markup("".join(marked))  # noqa: S704  (escaped above)
