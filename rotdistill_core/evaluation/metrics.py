"""The metrics that the project reports: name, title, direction, number format.

A metric is a string; evaluators of other distributions may report any. One that is not in
`METRICS` is shown by its own name. Figures of the teacher itself, kept for comparison, carry the
suffix `_teacher`; the pseudo metric `failed` marks a variant that broke a check.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

FAILED = "failed"
"""Pseudo metric of a variant that broke a check; its value is the number of broken checks."""
TEACHER_SUFFIX = "_teacher"
"""Ends the name of a metric that measures the teacher instead of the variant."""
UNPROMPTED_TEACHER = "teacher, no prompt"
"""Title of the teacher that is asked as the variants are, where the system prompt is baked in."""
UNPROMPTED_METRICS = ("kl", "top1")
"""The metrics by which it is compared with itself under the prompt."""
ANSWER_PREFIX = "answer_"
"""Begins the name of a metric that compares generated answers with the teacher's."""


class Direction(IntEnum):
    """Which way a metric improves; the value is the sign of an improvement."""

    LOWER = -1
    NEITHER = 0
    HIGHER = 1


class Metric(NamedTuple):
    """How one metric is shown."""

    title: str
    format: str
    """Format specification of a figure."""
    direction: Direction = Direction.NEITHER
    interval_format: str = ".3f"
    """Format specification of a figure that is followed by its interval."""
    header: str = ""
    """The title on two lines, for a narrow column; empty where `title` is short enough."""

    @property
    def column_header(self) -> str:
        """The title as the header of a narrow column."""
        return self.header or self.title


METRICS = {
    "kl": Metric(
        "held-out KL, nats/token", ".4f", Direction.LOWER, header="held-out KL,\nnats/token"
    ),
    "top1": Metric("top-1", ".3f", Direction.HIGHER),
    "perplexity": Metric("perplexity", ".2f", Direction.LOWER),
    "guard_kl": Metric("guard KL", ".4f", Direction.LOWER),
    "guard_perplexity": Metric(
        "guard perplexity", ".2f", Direction.LOWER, header="guard\nperplexity"
    ),
    "hidden_cosine": Metric("hidden cosine", ".4f", Direction.HIGHER, header="hidden\ncosine"),
    "residual_rms_diff": Metric(
        "residual RMS diff", ".4f", Direction.LOWER, header="residual\nRMS diff"
    ),
    "channel_rms_gap": Metric("channel RMS gap", ".4f", Direction.LOWER),
    "factual_completeness": Metric("facts", ".3f", Direction.HIGHER, ".2f"),
    "hallucination_rate": Metric("false answers", ".3f", Direction.LOWER, ".2f"),
    "answer_chrf": Metric("chrF", ".1f", Direction.HIGHER, ".1f"),
    "answer_length": Metric("length", ".2f", Direction.NEITHER, ".2f"),
    "answer_length_gap": Metric("length gap", ".2f", Direction.LOWER, ".2f"),
    "answer_language": Metric("in the question's language", ".2f", Direction.HIGHER, ".2f"),
    "answer_language_teacher": Metric("in the teacher's language", ".2f", Direction.HIGHER, ".2f"),
    "answer_repeats": Metric("repeating themselves", ".2f", Direction.LOWER, ".2f"),
    "parameters": Metric("parameters", ",.0f"),
    "seconds": Metric("seconds", ".0f"),
}
"""Name -> how the metric is shown, in the order of tables."""


def metric_named(name: str) -> Metric:
    """Return how a metric is shown; an unknown one goes by its own name, in four digits."""
    return METRICS.get(name, Metric(name.replace("_", " "), ".4g"))


def teacher_metric(name: str) -> str:
    """Return the name under which the teacher's own figure of a metric is reported."""
    return name + TEACHER_SUFFIX


def is_teacher_metric(name: str) -> bool:
    """Return whether a metric measures the teacher.

    `answer_language_teacher` does not: it measures whether the variant answers in the teacher's
    language, and is in `METRICS`.
    """
    return name.endswith(TEACHER_SUFFIX) and name not in METRICS


def is_answer_metric(name: str) -> bool:
    """Return whether a metric compares generated answers with the teacher's."""
    return name.startswith(ANSWER_PREFIX)


def in_table_order(names: Iterable[str]) -> list[str]:
    """Return metrics, each once: those of `METRICS` in its order, then the others in theirs."""
    given = dict.fromkeys(names)
    known = [name for name in METRICS if name in given]
    return known + [name for name in given if name not in METRICS]
