"""Results as a table on the terminal, as results.jsonl and as report.md."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.table import Table

from rotdistill_core.ledger import Ledger, write_file
from rotdistill_core.pipeline import Outcome
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
    values = figures(outcome.rows)
    lines = [f"# {loaded.recipe.name}", "", f"Teacher `{loaded.recipe.teacher.model}`, student `{loaded.recipe.student.model}`.", ""]
    lines += ["| variant | " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for variant, metrics in values.items():
        lines.append(f"| {variant} | " + " | ".join(f.format(metrics[n]) if n in metrics else "" for n, _, f in COLUMNS) + " |")
    languages = sorted({row.language for row in outcome.rows if row.language})
    if languages:
        lines += ["", "Held-out KL by language:", "", "| variant | " + " | ".join(languages) + " |", "|---" * (len(languages) + 1) + "|"]
        by = {(r.variant, r.language): r.value for r in outcome.rows if r.metric == "kl" and r.language}
        for variant in values:
            lines.append(
                f"| {variant} | " + " | ".join(f"{by[variant, name]:.3f}" if (variant, name) in by else "" for name in languages) + " |"
            )
    lines += ["", "## Steps", ""]
    seen: set[str] = set()
    for (variant, step), done in outcome.steps.items():
        if done.key not in seen:
            seen.add(done.key)
            lines.append(f"- **{step}** ({variant}{', reused' if done.reused else ''}, {done.seconds:.0f} s)")
            lines += [f"  - {name}: {_short(value)}" for name, value in done.notes.items()]
    lines += ["", "## Answers", ""]
    for identity in next(iter(outcome.answers.values()), {}):
        lines += [f"Question `{identity}`", ""]
        lines += [f"- **{who}**: {' '.join(said[identity].split())}" for who, said in outcome.answers.items()]
    return "\n".join([*lines, ""])


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_short(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_short(v) for v in value)
    return str(value)


def write(loaded: Loaded, outcome: Outcome) -> None:
    """Write results.jsonl and report.md into the run folder and commit them in its ledger."""
    ledger = Ledger(outcome.folder)
    lines = [(json.dumps(item, ensure_ascii=False) + "\n").encode() for item in as_json(outcome.rows)]
    for name, blocks in (("results.jsonl", lines), ("report.md", [markdown(loaded, outcome).encode()])):
        size, digest = write_file(outcome.folder / name, blocks)
        ledger.append("file", step="report", name=name, path=f"{outcome.folder.name}/{name}", bytes=size, sha256=digest)
