"""Results as objects, what they break, and a table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console, ConsoleOptions
from rich.table import Table

from rotdistill_core.recipe import Check
from rotdistill_core.samples import Row

COLUMNS = (
    ("kl", "held-out KL,\nnats/token", "{:.4f}"), ("top1", "top-1", "{:.3f}"), ("perplexity", "perplexity", "{:.2f}"),
    ("guard_kl", "guard KL", "{:.4f}"), ("guard_perplexity", "guard\nperplexity", "{:.2f}"),
    ("hidden_cosine", "hidden\ncosine", "{:.4f}"), ("residual_rms_diff", "residual\nRMS diff", "{:.4f}"),
    ("parameters", "parameters", "{:,.0f}"), ("seconds", "seconds", "{:.0f}"),
)  # fmt: skip


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return rows as the objects of results.jsonl; a value that is not finite, which JSON does not have, is text: `nan`, `inf`."""
    return [row._asdict() | {"value": row.value if math.isfinite(row.value) else str(row.value)} for row in rows]


def gates(rows: Sequence[Row], check: Check) -> dict[str, list[str]]:
    """Return variant -> what breaks the recipe's checks. Ratios are to `base`, else the first that has the metric; 0.1 % is rounding."""
    found: dict[str, list[str]] = {}
    for variant, metric in dict.fromkeys((row.variant, row.metric) for row in rows if not math.isfinite(row.value)):
        found.setdefault(variant, []).append(f"{metric} is not a number.")
    table = figures(rows)
    for key, metric, sign in (("kl_ratio", "kl", 1), ("guard", "guard_kl", 1), ("facts", "factual_completeness", -1)):
        limit, base = getattr(check, key), next((n for n in ("base", *table) if metric in table.get(n, ())), None)
        for name in (n for n in table if limit is not None and n != base):
            own, its = table[name].get(metric, math.nan), table[base][metric] if base else math.nan
            if not sign * own <= sign * limit * its + 1e-3 * its + 1e-6 and (base is None or metric in table[name]):
                found.setdefault(name, []).append(f"{metric} is {own:.4g}; check.{key} = {limit:g} of {base}'s {its:.4g}.")
    return found


def figures(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return variant -> metric -> value for the figures over all layers, languages and texts."""
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.layer is None and row.language is None and row.text is None:
            table.setdefault(row.variant, {})[row.metric] = row.value
    return table


class WideTable(Table):
    """A table that is never cut: wider than the terminal, its columns come below each other, each time behind the first.

    Columns with `overflow="fold"` hold text, which may wrap.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Yield as many plain tables as the width needs."""
        most = [max(console.measure(text).maximum for text in (c.header, *c.cells)) for c in self.columns]
        least = [min(size, 16) if c.overflow == "fold" else size for size, c in zip(most, self.columns, strict=True)]
        parts = [[0]]
        for k in range(1, len(least)):
            if len(parts[-1]) > 1 and sum(least[j] + 3 for j in [*parts[-1], k]) + 1 > options.max_width:
                parts.append([0])
            parts[-1].append(k)
        for part in parts:
            table = Table(title=self.title if part is parts[0] else None)
            widths = {k: size if size == most[k] else None for k, size in enumerate(least)}
            table.columns = [replace(self.columns[k].copy(), width=widths[k], overflow="fold") for k in part]
            for row, *cells in zip(self.rows, *(self.columns[k].cells for k in part), strict=True):
                table.add_row(*cells, style=row.style)
            yield table


def rich_table(rows: Sequence[Row]) -> WideTable:
    """Return the variant x metric table for the terminal, the lowest KL in bold."""
    values = figures(rows)
    best = min((v["kl"] for v in values.values() if "kl" in v and math.isfinite(v["kl"])), default=None)
    table = WideTable("variant", *(title for _, title, _ in COLUMNS))
    for variant, metrics in values.items():
        cells = [form.format(metrics[name]) if name in metrics else "" for name, _, form in COLUMNS]
        name = f"{variant} (failed)" if "failed" in metrics else variant
        table.add_row(name, *cells, style="bold" if metrics.get("kl") == best else None)
    return table
