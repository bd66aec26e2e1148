"""Results as a table on the terminal, as results.jsonl and as report.md."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader
from rich.table import Table

from rotdistill_core.ledger import Ledger, write_file
from rotdistill_core.pipeline import Done, Outcome
from rotdistill_core.recipe import Loaded
from rotdistill_core.samples import Row

COLUMNS = (
    ("kl", "held-out KL, nats/token", "{:.4f}"), ("top1", "top-1", "{:.3f}"), ("perplexity", "perplexity", "{:.2f}"),
    ("hidden_cosine", "hidden cosine", "{:.4f}"), ("residual_rms_diff", "residual RMS diff", "{:.4f}"),
    ("parameters", "parameters", "{:,.0f}"), ("seconds", "seconds", "{:.0f}"),
)  # fmt: skip


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return rows as the objects of results.jsonl."""
    return [row._asdict() for row in rows]


def figures(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return variant -> metric -> value for the figures over all layers and languages."""
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.layer is None and row.language is None:
            table.setdefault(row.variant, {})[row.metric] = row.value
    return table


def rich_table(rows: Sequence[Row]) -> Table:
    """Return the variant x metric table for the terminal, the lowest KL in bold."""
    values = figures(rows)
    best = min((v["kl"] for v in values.values() if "kl" in v), default=None)
    table = Table("variant", *(title for _, title, _ in COLUMNS))
    for variant, metrics in values.items():
        cells = [form.format(metrics[name]) if name in metrics else "" for name, _, form in COLUMNS]
        table.add_row(variant, *cells, style="bold" if metrics.get("kl") == best else None)
    return table


def markdown(loaded: Loaded, outcome: Outcome) -> str:
    """Return report.md."""
    by = {(r.variant, r.language): r.value for r in outcome.rows if r.metric == "kl" and r.language}
    first: dict[str, tuple[str, str, Done]] = {}
    for (variant, step), done in outcome.steps.items():
        first.setdefault(done.key, (variant, step, done))
    made = Environment(loader=PackageLoader("rotdistill_core"), trim_blocks=True, lstrip_blocks=True)  # noqa: S701  Markdown, not HTML
    made.filters["short"] = _short
    return made.get_template("report.md.j2").render(
        recipe=loaded.recipe, columns=COLUMNS, values=figures(outcome.rows), by=by, answers=outcome.answers,
        languages=sorted({language for _, language in by}), steps=first.values(),
    )  # fmt: skip


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_short(v)}" for k, v in value.items())
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)


def write(loaded: Loaded, outcome: Outcome) -> None:
    """Write results.jsonl and report.md into the run folder and commit them in its ledger."""
    ledger = Ledger(outcome.folder)
    lines = [(json.dumps(item, ensure_ascii=False) + "\n").encode() for item in as_json(outcome.rows)]
    for name, blocks in (("results.jsonl", lines), ("report.md", [markdown(loaded, outcome).encode()])):
        size, digest = write_file(outcome.folder / name, blocks)
        ledger.append("file", step="report", name=name, path=f"{outcome.folder.name}/{name}", bytes=size, sha256=digest)
