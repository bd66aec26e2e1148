"""The Jinja templates of this package, with the filters that they use."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, Template, select_autoescape
from markupsafe import Markup, escape

from rotdistill_core.evaluation.metrics import metric_named


def template(name: str) -> Template:
    """Return one template of the folder `templates`; HTML is escaped, Markdown is not."""
    environment = Environment(
        loader=PackageLoader("rotdistill_report"),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
    )
    environment.filters |= {
        "metric_title": metric_title,
        "note": note_text,
        "cell": table_cell,
        "code": code_markup,
        "svg": Markup,
    }
    return environment.get_template(name)


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


def table_cell(text: str) -> str:
    """Return text for one cell of a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def code_markup(text: str) -> Markup:
    """Return text as HTML, what stands between backquotes as code."""
    parts = str(escape(text)).split("`")
    marked = [f"<code>{part}</code>" if k % 2 else part for k, part in enumerate(parts)]
    return Markup("".join(marked))  # noqa: S704  (escaped above)
