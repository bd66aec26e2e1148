"""Results as objects and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from rotdistill_core.samples import Row

COLUMNS = (
    ("kl", "held-out KL, nats/token", "{:.4f}"), ("top1", "top-1", "{:.3f}"), ("perplexity", "perplexity", "{:.2f}"),
    ("guard_kl", "guard KL", "{:.4f}"), ("guard_perplexity", "guard perplexity", "{:.2f}"),
    ("hidden_cosine", "hidden cosine", "{:.4f}"), ("residual_rms_diff", "residual RMS diff", "{:.4f}"),
    ("parameters", "parameters", "{:,.0f}"), ("seconds", "seconds", "{:.0f}"),
)  # fmt: skip


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return rows as the objects of results.jsonl."""
    return [row._asdict() for row in rows]


def figures(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return variant -> metric -> value for the figures over all layers, languages and texts."""
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.layer is None and row.language is None and row.text is None:
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
