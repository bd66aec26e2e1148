"""TODO: rotdistill_core.evaluation.metrics."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """How a metric is shown."""

    title: str
    form: str
    better: int = 0
    """1: more is better, -1: less is, 0: neither."""
    short: str = ".3f"
    """Number format beside an interval."""


COLUMNS = {
    "kl": Column("held-out KL, nats/token", ".4f", -1), "top1": Column("top-1", ".3f", 1), "perplexity": Column("perplexity", ".2f", -1),
    "guard_kl": Column("guard KL", ".4f", -1), "guard_perplexity": Column("guard perplexity", ".2f", -1),
    "hidden_cosine": Column("hidden cosine", ".4f", 1), "residual_rms_diff": Column("residual RMS diff", ".4f", -1),
    "channel_rms_gap": Column("channel RMS gap", ".4f", -1), "factual_completeness": Column("facts", ".3f", 1, ".2f"),
    "hallucination_rate": Column("false answers", ".3f", -1, ".2f"), "answer_chrf": Column("chrF", ".1f", 1, ".1f"),
    "answer_length": Column("length", ".2f", 0, ".2f"), "answer_length_gap": Column("length gap", ".2f", -1, ".2f"),
    "answer_language": Column("in the question's language", ".2f", 1, ".2f"),
    "answer_language_teacher": Column("in the teacher's language", ".2f", 1, ".2f"),
    "parameters": Column("parameters", ",.0f"), "seconds": Column("seconds", ".0f"),
}  # fmt: skip
"""Metric -> how it is shown; one that is not here goes by its own name."""


def column(metric: str) -> Column:
    """Return how a metric is shown."""
    return COLUMNS.get(metric, Column(metric.replace("_", " "), ".4g"))
